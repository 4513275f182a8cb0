"""Two tensor-parallel ranks: rank 0 decides, the other follows."""

import pytest

from tests.harness import Engine, greedy, token_prompts

PROMPTS = token_prompts(4, shared=20)


@pytest.fixture(autouse=True)
def threads_are_not_bound(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def statuses(engine: Engine) -> list:
    """Of each rank, without what deciding took and when it answered: these are its own, and no decision depends on
    them."""
    found = engine.llm.collective_rpc("early_exit_status")
    for status in found:
        del status["distributions"]["controller_ms"], status["clock_s"]
    return found


def test_two_ranks_decide_alike_and_lossless_requests_get_the_tokens_of_two_plain_ranks(tiny_llama, lens_ramps):
    with Engine(tiny_llama, tensor_parallel_size=2) as plain:
        expected = plain.tokens(PROMPTS, greedy(60))
    knobs = {"ramps": str(lens_ramps(depth=3)), "threshold": 0.01, "hold_threshold": 0.0, "accuracy_bound": 0.2}
    with Engine(tiny_llama, knobs, tensor_parallel_size=2) as engine:
        lossless = greedy(60, extra_args={"accuracy_bound": 0.0})
        assert engine.tokens(PROMPTS, lossless) == expected
        counts = engine.counts()
        assert counts["accepted"] > 0 and counts["released"] == counts["fallbacks"] == 0
        engine.tokens(PROMPTS, greedy(60))
        first, second = statuses(engine)
        assert first["counts"]["released"] > 10 and first["counts"]["diverged"] > 0
        assert first == second


def test_two_ranks_learn_the_same(tiny_llama, lens_ramps):
    knobs = {"ramps": str(lens_ramps(depth=2)), "policy": "adaptive", "accuracy_bound": 0.2}
    with Engine(tiny_llama, knobs, tensor_parallel_size=2) as engine:
        engine.tokens(PROMPTS, greedy(100))
        first, second = statuses(engine)
    assert first["controller"]["completion_ms"] and first["controller"]["calibration"]
    assert first == second, "rank 0's clock is not everybody's"
