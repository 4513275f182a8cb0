import json

import pytest

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.adaptive import AdaptivePolicy
from apparate_llm.controller.policies import make_policy
from apparate_llm.core import Decision, Exit
from apparate_llm.ramps.lookup import lookup_confidence


def make(depths=(0,), **options) -> AdaptivePolicy:
    policy = make_policy(EarlyExitConfig(max_exits=4, **options), depth=0, depths=depths, num_layers=30)
    assert isinstance(policy, AdaptivePolicy)
    return policy


def proposed(confidence: float, number: int = 0, depth: int = 0) -> Exit:
    return Exit(9, 1, depth, number, confidence)


def teach(policy: AdaptivePolicy, *, pass_ms: float = 20.0, row_ms: float = 0.2, draft_step_ms: float = 1.0) -> None:
    """What a machine costs."""
    for _ in range(8):
        for rows in (1, 2, 4, 8, 16, 32, 64):
            policy.on_decode_step(1, rows, pass_ms + row_ms * rows)
            policy.on_draft_step(policy.depth, rows, draft_step_ms)


def test_sure_exits_are_released_likely_ones_held_and_hopeless_ones_left():
    policy = make()
    teach(policy, row_ms=1.0)
    assert policy.start(1) == 4
    assert policy.decide(proposed(0.99), joint_acceptance=1.0, may_release=True, num_tokens=1) is Decision.RELEASE
    assert policy.decide(proposed(0.99), joint_acceptance=1.0, may_release=False, num_tokens=1) is Decision.HOLD
    assert policy.decide(proposed(0.6), joint_acceptance=1.0, may_release=True, num_tokens=1) is Decision.HOLD
    assert policy.decide(proposed(0.003), joint_acceptance=1.0, may_release=True, num_tokens=1) is Decision.STOP


def test_exits_are_looked_up_until_they_prove_wrong_and_again_when_they_prove_right():
    policy = make()
    teach(policy)
    policy.start(1)
    assert policy.looks_up and policy.wants_lookup(16, True) and not make().looks_up

    def looked_up_frac(agrees: bool) -> float:
        looked_up = 0
        for _ in range(400):
            if policy.wants_lookup(16, True):
                looked_up += 1
                exit_ = Exit(9, 1, 0, 0, lookup_confidence(16), lookup_length=16)
                policy.decide(exit_, joint_acceptance=1.0, may_release=False, num_tokens=1)
                policy.on_verdict(exit_, agrees)
        return looked_up / 400

    assert looked_up_frac(False) < 0.25, "it is tried now and then"
    assert 0.0 < looked_up_frac(False) < 0.1
    assert [looked_up_frac(True) for _ in range(6)][-1] == 1.0


def test_no_exit_is_looked_up_in_a_step_that_measures_a_plain_pass():
    policy = make()
    teach(policy)
    steps = [(policy.start(1), policy.looks_up) for _ in range(64)]
    assert {looks_up for draft_steps, looks_up in steps if draft_steps == 0} == {False}
    policy = make()
    teach(policy, draft_step_ms=100.0)
    steps = [(policy.start(1), policy.looks_up) for _ in range(64)]
    assert (0, True) in steps, "they cost no draft step"


def test_another_draft_step_pays_while_it_brings_more_than_it_costs():
    policy = make()
    teach(policy, draft_step_ms=2.0)
    policy.start(1)
    assert policy.wants_another_step(1, [0.9], 2)
    assert not policy.wants_another_step(1, [0.02], 2)
    assert policy.wants_another_step(1, [0.1] * 12, 24), "a draft step shared by many pays sooner"


def test_dear_draft_steps_or_rows_stop_exits_but_for_a_probe():
    for costs in ({"draft_step_ms": 40.0}, {"row_ms": 30.0}):
        policy = make()
        teach(policy, **costs)
        draft_steps = [policy.start(8) for _ in range(2000)]
        assert set(draft_steps) == {0, 1}
        assert draft_steps.count(1) <= 2000 / 64


def test_plain_passes_are_measured_now_and_then():
    policy = make()
    teach(policy)
    draft_steps = [policy.start(1) for _ in range(1024)]
    assert draft_steps.count(0) < 12 and 0 in draft_steps[:8]


def test_verdicts_move_what_a_confidence_is_worth():
    policy = make()
    teach(policy)
    policy.start(1)
    for _ in range(256):
        policy.on_verdict(proposed(0.99), False)
    assert policy.decide(proposed(0.99), joint_acceptance=1.0, may_release=True, num_tokens=1) is not Decision.RELEASE
    decided = policy.decide(proposed(0.99, number=1), joint_acceptance=1.0, may_release=True, num_tokens=1)
    assert decided is Decision.RELEASE, "own draft steps"


def test_a_cheap_divergence_that_saves_much_is_taken_when_the_budget_is_full():
    policy = make()
    later = [proposed(0.9, 1), proposed(0.9, 2)]
    for exit_ in later:
        exit_.probability = 0.9
    assert policy.verify_divergence(0.3, [], fill_frac=0.5)
    assert not policy.verify_divergence(0.3, [], fill_frac=0.01)
    assert not policy.verify_divergence(2.0, [], fill_frac=1.0) and policy.verify_divergence(2.0, later, fill_frac=1.0)


def test_a_deeper_ramp_that_agrees_more_takes_over_and_gives_way_when_it_costs_too_much():
    policy = make(depths=(0, 2))
    teach(policy)
    policy.on_draft_step(2, 1, 1.5)
    right = {0: 4, 2: 9}  # of ten

    def go_on() -> None:
        for i in range(400):
            active, other = policy.depth, 2 - policy.depth
            policy.on_shadow(other, active_agrees=i % 10 < right[active], agrees=i % 10 < right[other])
            policy.on_decode_step(1, 2, 20.4)

    go_on()
    assert policy.depth == 2
    for _ in range(50):
        policy.on_draft_step(2, 1, 15.0)
    go_on()
    assert policy.depth == 0


def test_a_depth_that_was_asked_for_stays():
    policy = make(depths=(0,), depth=0)
    assert not policy.wants_shadow()


def test_a_longer_step_has_to_bring_more_while_requests_wait_for_their_first_token():
    policy = make()
    teach(policy, row_ms=1.0)
    sure = {"joint_acceptance": 1.0, "may_release": True, "num_tokens": 16}

    def serve(num_steps: int, *, joining: int) -> int:
        for _ in range(num_steps):
            for _ in range(joining):
                policy.on_request()
            planned = policy.start(16)
        return planned

    assert serve(150, joining=0) > 0
    assert (
        policy.decide(proposed(0.7), **sure) is Decision.HOLD
        and policy.decide(proposed(0.99), **sure) is Decision.RELEASE
    )
    assert serve(150, joining=1) == 0
    assert policy.status()["waiting_requests"] == pytest.approx(3.6, abs=0.2)
    assert (
        policy.decide(proposed(0.7), **sure) is Decision.STOP and policy.decide(proposed(0.99), **sure) is Decision.STOP
    )
    assert serve(400, joining=0) > 0, "nobody waits any more"
    assert policy.decide(proposed(0.7), **sure) is Decision.HOLD


def test_a_lone_request_keeps_nobody_waiting():
    alone, short_answers = make(), make()
    for policy in (alone, short_answers):
        teach(policy, row_ms=1.0)
        for _ in range(100):
            if policy is short_answers:
                policy.on_request()
            policy.start(1)
    decisions = [
        [
            policy.decide(proposed(confidence / 100), joint_acceptance=1.0, may_release=False, num_tokens=1)
            for confidence in range(1, 100)
        ]
        for policy in (alone, short_answers)
    ]
    assert decisions[0] == decisions[1] and set(decisions[0]) == {Decision.HOLD, Decision.STOP}


def test_prompts_that_a_server_begins_with_do_not_keep_exits_away():
    """A first pass that reads four of them was its mean for hundreds of steps, and exits seemed to save nothing."""
    policy = make()
    teach(policy)
    policy.on_step(1250.0)
    for _ in range(40):
        policy.on_step(24.0)
    assert policy.start(4) > 0


def test_the_first_draft_step_of_a_process_does_not_count():
    policy = make()
    for ms in (3.4, 0.9, 0.9, 0.9):
        policy.on_draft_step(0, 4, ms)
    assert policy.costs.draft_step_ms(0, 4) == pytest.approx(0.9)


def test_draft_steps_that_are_dear_are_seldom_tried():
    """Each costs ten passes here."""
    policy = make()
    teach(policy, draft_step_ms=200.0)
    assert sum(policy.start(4) for _ in range(1000)) <= 3


def test_slow_draft_steps_at_first_do_not_keep_exits_away():
    """A server once took next to none for 2000 steps, with a single draft step in 100, most likely after a slow one."""
    policy = make()
    for _ in range(32):
        policy.on_decode_step(4, 4, 16.0)
    for ms in (15.0, 15.0):
        policy.on_draft_step(0, 4, ms)
    assert policy.best_rate(0, 4)[1] == 0

    def steps_until_exits_pay() -> int:
        for step in range(1000):
            if policy.start(4):
                policy.on_draft_step(0, 4, 1.0)
            if policy.best_rate(0, 4)[1]:
                return step
        return 1000

    assert steps_until_exits_pay() < 250


def test_what_it_learned_survives_as_json():
    policy = make(depths=(0, 2))
    teach(policy)
    policy.start(1)
    for _ in range(100):
        policy.decide(proposed(0.9), joint_acceptance=1.0, may_release=False, num_tokens=1)
        policy.on_verdict(proposed(0.9), False)
    other = make(depths=(0, 2))
    other.restore(json.loads(json.dumps(policy.state())))
    assert other.state() == policy.state()
    assert other.best_rate(0, 1) == policy.best_rate(0, 1)
    json.dumps(policy.status())


@pytest.mark.parametrize("damage", [{"depth": 7}, {"calibrations": [[0, 0]]}, {"draft_steps": None}])
def test_a_damaged_state_changes_nothing(damage):
    policy = make(depths=(0, 2))
    before = policy.state()
    with pytest.raises((ValueError, TypeError, KeyError)):
        policy.restore({**before, **damage})
    assert policy.state() == before
