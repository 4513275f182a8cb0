from typing import Any, get_args

import pytest

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.policies import POLICIES, make_policy
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
    assert policy.decide(proposed(confidence), joint_acceptance=1.0, may_release=may_release, num_rows=1) is decision


def test_static_keeps_the_batch_within_max_batch_tokens():
    policy = make("static", max_batch_tokens=4, max_exits=3)
    assert [policy.start(num_requests) for num_requests in (1, 2, 3, 4, 5)] == [3, 1, 0, 0, 0]


def test_off_never_takes_an_exit():
    policy = make("off")
    assert policy.start(1) == 0
    assert policy.decide(proposed(1.0), joint_acceptance=1.0, may_release=True, num_rows=1) is Decision.STOP


def test_every_policy_of_the_schema_exists():
    assert set(POLICIES) == set(get_args(EarlyExitConfig.model_fields["policy"].annotation))


def test_an_unknown_parameter_of_a_policy_is_named():
    with pytest.raises(ValueError, match=r"policy adaptive has no parameter 'patience'"):
        make_policy(EarlyExitConfig(), depth=0, depths=(0,), num_layers=30, patience=3)
