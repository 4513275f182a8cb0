from typing import Any, get_args

import pytest

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.policies import POLICIES, make_policy
from apparate_llm.controller.policy import LEAST_VERDICTS
from apparate_llm.core import Decision, Exit


def proposed(confidence: float, *, draft_step: int = 0, depth: int = 0) -> Exit:
    return Exit(position=9, token_id=1, depth=depth, draft_step=draft_step, confidence=confidence)


def make(name: str, **options: Any):
    return make_policy(EarlyExitConfig(policy=name, **options), depth=0, depths=(0,), num_layers=30)


@pytest.mark.parametrize(
    ("confidence", "may_release", "decision"),
    [
        (0.95, True, Decision.RELEASE),
        (0.9, True, Decision.RELEASE),
        (0.95, False, Decision.HOLD),
        (0.5, True, Decision.HOLD),
        (0.3, True, Decision.HOLD),
        (0.29, True, Decision.STOP),
        (0.0, False, Decision.STOP),
    ],
)
def test_static_compares_with_its_two_thresholds(confidence, may_release, decision):
    policy = make("static", threshold=0.9, hold_threshold=0.3)
    assert policy.decide(proposed(confidence), joint_acceptance=1.0, may_release=may_release, num_tokens=1) is decision


def test_static_keeps_the_batch_within_max_batch_tokens():
    policy = make("static", max_batch_tokens=4, max_exits=3)
    assert [policy.start(num_requests) for num_requests in (1, 2, 3, 4, 5)] == [3, 1, 0, 0, 0]


def test_off_never_takes_an_exit():
    policy = make("off")
    assert policy.start(1) == 0
    assert policy.decide(proposed(1.0), joint_acceptance=1.0, may_release=True, num_tokens=1) is Decision.STOP


def test_every_policy_of_the_schema_exists():
    assert set(POLICIES) == set(get_args(EarlyExitConfig.model_fields["policy"].annotation))


def test_an_unknown_parameter_of_a_policy_is_named():
    with pytest.raises(ValueError, match=r"policy adaptive has no parameter 'patience'"):
        make_policy(EarlyExitConfig(), depth=0, depths=(0,), num_layers=30, parameters={"patience": 3})


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"off"}))
def test_on_a_sibling_exits_diverge_after_enough_verdicts_on_their_like(name):
    def make_one(sibling):
        return make_policy(EarlyExitConfig(policy=name), depth=0, depths=(0, 2), num_layers=30, sibling=sibling)

    policy = make_one(True)
    alike, later, deeper = proposed(0.9), proposed(0.9, draft_step=1), proposed(0.9, depth=2)
    looked_up = Exit(position=9, token_id=1, depth=0, draft_step=0, confidence=0.9, lookup_length=12)
    sampled = Exit(position=9, token_id=1, depth=0, draft_step=0, confidence=0.9, greedy=False)
    for _ in range(LEAST_VERDICTS - 1):
        policy.on_verdict(proposed(0.5), True)
    assert not policy.may_diverge(alike)
    policy.on_verdict(proposed(0.5), False)
    assert policy.may_diverge(alike)
    assert not any(policy.may_diverge(exit_) for exit_ in (later, deeper, looked_up, sampled))
    assert make_one(False).may_diverge(alike)


def test_what_a_sibling_has_heard_is_kept_with_what_it_learned():
    def make_one():
        return make_policy(EarlyExitConfig(), depth=0, depths=(0,), num_layers=30, sibling=True)

    policy, again = make_one(), make_one()
    for _ in range(LEAST_VERDICTS):
        policy.on_verdict(proposed(0.9), True)
    again.restore(policy.state())
    assert again.may_diverge(proposed(0.9)) and not make_one().may_diverge(proposed(0.9))
