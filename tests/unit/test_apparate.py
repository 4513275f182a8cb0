"""The paper's algorithm against examples worked by hand."""

import pytest

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.apparate import Seen, adjust_ramps, replay_window, tune_thresholds, utilities
from apparate_llm.controller.policies import make_policy
from apparate_llm.core import Decision, Exit

RIGHT, WRONG = True, False


def test_replaying_a_window_by_hand():
    records = [(Seen(0.1, RIGHT),), (Seen(0.3, WRONG),), (Seen(0.6, RIGHT),), (None,)]
    assert replay_window(records, [0.0], [10.0]) == (1.0, 0.0)
    assert replay_window(records, [0.2], [10.0]) == (1.0, 2.5)  # one of four exits, rightly
    assert replay_window(records, [0.5], [10.0]) == (0.75, 5.0)  # two exit, one of them a divergence
    two = [(Seen(0.5, WRONG), Seen(0.1, RIGHT))]
    assert replay_window(two, [0.2, 0.2], [10.0, 4.0]) == (1.0, 4.0)  # not at the first ramp, rightly at the second
    assert replay_window(two, [0.6, 0.2], [10.0, 4.0]) == (0.0, 10.0)


def test_one_threshold_rises_to_just_before_the_error_that_the_bound_forbids():
    records = [(Seen(0.05, RIGHT),)] * 8 + [(Seen(0.3, RIGHT),)] * 7 + [(Seen(0.5, WRONG),)]
    (threshold,) = tune_thresholds(records, [10.0], 0.01)
    assert 0.3 < threshold <= 0.5
    (loose,) = tune_thresholds(records, [10.0], 1 / 16)
    assert loose > 0.5
    assert tune_thresholds([(Seen(0.0005, WRONG),)] * 16, [10.0], 0.01) == [0.0]
    assert tune_thresholds([], [10.0], 0.01) == [0.0]


def test_of_two_ramps_the_one_that_saves_more_for_the_accuracy_goes_first():
    # The shallow ramp saves more but errs once in four; the deep one never errs.
    records = [(Seen(0.2, i != 0), Seen(0.1, RIGHT)) for i in range(4)]
    shallow, deep = tune_thresholds(records, [10.0, 5.0], 0.1)
    assert shallow <= 0.2 and deep > 0.1
    shallow, _ = tune_thresholds(records, [10.0, 5.0], 0.25)
    assert shallow > 0.2


def test_utilities_by_hand():
    # Ramps after 10 and 20 of 40 ms; 30 % exit at the first, 20 % at the second; each costs 1 ms.
    first, second = utilities([0.3, 0.2], [10.0, 20.0, 40.0], [1.0, 1.0])
    assert first == pytest.approx(0.3 * 10 - 0.7 * 1)
    assert second == pytest.approx(0.2 * 20 - 0.5 * 1)


def test_a_ramp_that_costs_more_than_it_saves_gives_way_to_a_deeper_one():
    assert adjust_ramps(0, -0.1, (0, 2, 4)) == 2
    assert adjust_ramps(4, -0.1, (0, 2, 4)) == 4
    assert adjust_ramps(2, 0.5, (0, 2, 4)) == 0
    assert adjust_ramps(0, 0.5, (0, 2, 4)) == 0  # index 0 is a ramp like any other


def verdicts(policy, count: int, *, confidence: float, agrees: bool) -> None:
    for _ in range(count):
        exit_ = Exit(0, 0, policy.depth, 0, confidence)
        policy.decide(exit_, joint_acceptance=1.0, may_release=True, num_tokens=1)
        policy.on_verdict(exit_, agrees)


def test_it_begins_closed_opens_after_a_window_and_closes_after_a_wrong_one():
    policy = make_policy(EarlyExitConfig(policy="apparate"), depth=0, depths=(0,), num_layers=30)
    sure = Exit(0, 0, 0, 0, 0.9)
    assert policy.decide(sure, joint_acceptance=1.0, may_release=True, num_tokens=1) is Decision.STOP
    policy.on_decode_step(1, 1, 30.0)
    verdicts(policy, 15, confidence=0.9, agrees=True)
    assert policy.threshold == 0.0
    verdicts(policy, 1, confidence=0.9, agrees=True)
    assert policy.threshold > 0.1
    assert policy.decide(sure, joint_acceptance=1.0, may_release=True, num_tokens=1) is Decision.RELEASE
    assert policy.decide(sure, joint_acceptance=1.0, may_release=False, num_tokens=1) is Decision.STOP, "it never holds"
    verdicts(policy, 16, confidence=0.9, agrees=False)
    assert policy.threshold <= 0.1
    assert policy.decide(sure, joint_acceptance=1.0, may_release=True, num_tokens=1) is Decision.STOP


def test_every_128_verdicts_the_ramp_is_adjusted():
    policy = make_policy(EarlyExitConfig(policy="apparate"), depth=0, depths=(0, 2), num_layers=30)
    policy.on_decode_step(1, 1, 30.0)
    policy.on_draft_step(0, 1, 20.0)
    verdicts(policy, 127, confidence=0.2, agrees=False)  # never exits, so the ramp only costs
    assert policy.depth == 0
    verdicts(policy, 1, confidence=0.2, agrees=False)
    assert policy.depth == 2


def test_two_periods_that_end_within_one_step_adjust_once():
    """All verdicts of a step come before the next exit is proposed."""
    policy = make_policy(EarlyExitConfig(policy="apparate"), depth=0, depths=(0, 2, 4), num_layers=30)
    policy.on_decode_step(1, 1, 30.0)
    policy.on_draft_step(0, 1, 20.0)
    exit_ = Exit(0, 0, 0, 0, 0.2)
    policy.decide(exit_, joint_acceptance=1.0, may_release=True, num_tokens=1)
    for _ in range(300):
        policy.on_verdict(exit_, False)
    assert policy.depth == 2
