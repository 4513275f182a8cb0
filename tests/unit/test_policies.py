import pytest

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.policies import POLICIES
from apparate_llm.core import Verb


@pytest.mark.parametrize(
    ("confidence", "may_release", "verb"),
    [
        (0.95, True, Verb.RELEASE),
        (0.9, True, Verb.RELEASE),
        (0.95, False, Verb.HOLD),
        (0.5, True, Verb.HOLD),
        (0.3, True, Verb.HOLD),
        (0.29, True, Verb.STOP),
        (0.0, False, Verb.STOP),
    ],
)
def test_static_compares_with_its_two_thresholds(confidence, may_release, verb):
    policy = POLICIES["static"](EarlyExitConfig(threshold=0.9, hold_threshold=0.3))
    assert policy.decide(confidence, may_release) is verb


def test_off_never_takes_an_exit():
    assert POLICIES["off"](EarlyExitConfig(policy="off")).decide(1.0, True) is Verb.STOP


def test_every_policy_of_the_schema_exists():
    from typing import get_args

    assert set(POLICIES) == set(get_args(EarlyExitConfig.model_fields["policy"].annotation))
