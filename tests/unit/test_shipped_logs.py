"""The feedback logs that ship, and what the policies make of them."""

import pytest

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.feedback import read_header, read_steps
from apparate_llm.controller.policies import make_policy
from apparate_llm.controller.replay import LogCosts, Replayed, oracle, replay
from apparate_llm.replay import shipped_logs
from scripts.replay_policies import SETTINGS


@pytest.fixture(scope="module", params=["smollm2-135m", "qwen2.5-coder-0.5b"])
def log(request):
    """(header, steps, costs)"""
    path = shipped_logs()[request.param]
    steps = list(read_steps(path))
    return read_header(path), steps, LogCosts(steps)


def run(log, policy: str, **options) -> Replayed:
    header, steps, costs = log
    config = EarlyExitConfig(policy=policy, **options)
    made = make_policy(config, depth=0, depths=(0,), num_layers=header["num_layers"])
    return replay(steps, costs, made, accuracy_bound=config.accuracy_bound, kind="agreement")


@pytest.mark.parametrize("bound", [0.01, 0.05])
def test_adaptive_beats_the_best_static_threshold_and_the_papers_policy(log, bound):
    adaptive = run(log, "adaptive", accuracy_bound=bound)
    assert adaptive.worst_share <= bound
    others = [
        run(log, policy, accuracy_bound=bound, **options)
        for policy in ("static", "apparate")
        for options in SETTINGS[policy]
    ]
    assert len(others) == 12
    for other in others:
        assert adaptive.tpt_ratio < other.tpt_ratio


def test_a_bound_makes_it_faster_and_the_oracle_is_faster_still(log):
    _, steps, costs = log
    lossless, small, large = (run(log, "adaptive", accuracy_bound=bound).tpt_ratio for bound in (0.0, 0.01, 0.05))
    assert oracle(steps, costs, depth=0).tpt_ratio < large < small <= lossless < 1.0


def test_the_logs_are_small_and_hold_no_text(log):
    header, steps, _ = log
    assert len(steps) > 1000
    assert {step.num_requests for step in steps} >= {1, 2, 4, 8}
    assert "prompt" not in header
    assert sum(path.stat().st_size for path in shipped_logs().values()) < 1 << 20
