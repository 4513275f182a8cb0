"""Two tensor-parallel ranks: rank 0 decides, the other follows, and what fails on one of them fails on both."""

import json
from typing import Any

import pytest

from tests.harness import Engine, greedy, token_prompts
from tests.tiny import build_lens_ramps

PROMPTS = token_prompts(4, shared=20)
LOSSLESS = {"accuracy_bound": 0.0}
# Ours, from the scheduler's message to the drafts: without an exchange, between two, and in the middle of one.
FAULTS = [
    ("runner", "_requests_change"),
    ("runner", "_with_verdict_rows"),
    ("ledger", "verify_released"),
    ("runner", "_verify_held"),
    ("clock", "completed"),
    ("step", "emit"),
    ("step", "learn"),
    ("shallow pass", "states"),
    ("model", "forward_shallow"),
    ("ramps", "predict"),
    ("policy", "wants_another_step"),
    ("step", "commit"),
    ("ledger", "release"),
]


@pytest.fixture(scope="module")
def ranks():
    """Engines of two ranks; one that waits for ever ends the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "120")
        yield {"tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def expected(tiny_llama, ranks):
    with Engine(tiny_llama, **ranks) as plain:
        return plain.tokens(PROMPTS, greedy(60))


@pytest.fixture(scope="module")
def engine(tiny_llama, lens_ramps, ranks, expected):
    options = {"ramps": str(lens_ramps(depth=3)), "threshold": 0.01, "hold_threshold": 0.0, "accuracy_bound": 0.2}
    with Engine(tiny_llama, {**options, "feedback_log": "/dev/full"}, **ranks) as engine:
        yield engine


def statuses(engine: Engine) -> list:
    """Of each rank, without what deciding took and when it answered: these are its own, and no decision depends on
    them."""
    answers = engine.llm.collective_rpc("early_exit_status")
    for status in answers:
        del status["distributions"]["controller_ms"], status["clock_s"]
        status["failure"] = status["failure"] is not None  # which part and why, the one that failed knows
    return answers


def break_rank(engine: Engine, rank: int, name: str, method: str) -> None:
    """The method's next call on this rank raises."""

    def inject(worker: Any) -> None:
        runner = worker.model_runner
        if worker.rank != rank:
            return
        drafter = runner.exit_drafter
        owner = {
            "runner": runner,
            "step": runner.step,
            "ledger": runner.ledger,
            "clock": runner.clock,
            "drafter": drafter,
            "shallow pass": drafter.model,
            "model": runner.model,
            "ramps": drafter.ramps,
            "policy": type(drafter.policy),
        }[name]
        original = getattr(owner, method)

        def failing(*args: Any, **kwargs: Any) -> Any:
            setattr(owner, method, original)
            raise RuntimeError(f"injected into {method} of rank {rank}")

        setattr(owner, method, failing)

    engine.llm.collective_rpc(inject)


def configure(engine: Engine, **changes: Any) -> list:
    return engine.llm.collective_rpc("early_exit_configure", args=(changes,))


def test_two_ranks_decide_alike_and_lossless_requests_get_the_tokens_of_two_plain_ranks(engine, expected):
    assert engine.tokens(PROMPTS, greedy(60, extra_args=LOSSLESS)) == expected
    counts = engine.counts()
    assert counts["accepted"] > 0 and counts["released"] == counts["fallbacks"] == 0
    engine.tokens(PROMPTS, greedy(60))
    first, second = statuses(engine)
    assert first["counts"]["released"] > 10 and first["counts"]["divergences"] > 0
    assert first == second
    assert first["active"], "a feedback log on a full disk is no failure"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_rank_fails_on_both_and_comes_back_on_both(rank, engine, expected):
    params = [greedy(12, extra_args=LOSSLESS if i % 2 else {}) for i in range(len(PROMPTS))]
    for name, method in FAULTS:
        assert configure(engine) == [None, None]
        before, _ = statuses(engine)
        break_rank(engine, rank, name, method)
        tokens = engine.tokens(PROMPTS, params)
        assert tokens[1::2] == [own[:12] for own in expected[1::2]], method
        first, second = statuses(engine)
        assert first == second, method
        assert not first["active"] and first["counts"]["fallbacks"] == before["counts"]["fallbacks"] + 1, method
        engine.check_integrity()
    assert configure(engine) == [None, None]
    before = engine.counts()
    engine.tokens(PROMPTS, greedy(12))
    first, second = statuses(engine)
    assert first == second and first["active"] and first["counts"]["released"] > before["released"]


@pytest.mark.long
def test_a_rank_that_fails_where_the_model_is_compiled_leaves_no_other_waiting(tiny_llama, lens_ramps, ranks):
    """The other rank is inside the blocks of its draft step by then."""
    options = {"ramps": str(lens_ramps(depth=3)), "threshold": 0.01, "hold_threshold": 0.0, "accuracy_bound": 0.0}
    with Engine(tiny_llama, options, enforce_eager=False, **ranks) as engine:
        tokens = engine.tokens(PROMPTS, greedy(60))
        assert engine.counts()["accepted"] > 0
        for rank in (0, 1):
            break_rank(engine, rank, "model", "forward_shallow")
            assert engine.tokens(PROMPTS, greedy(60)) == tokens
            first, second = statuses(engine)
            assert first == second and not first["active"]
            assert configure(engine) == [None, None]


def test_two_ranks_learn_the_same_and_begin_with_what_rank_0_remembers(tiny_llama, ranks, tmp_path):
    path = tmp_path / "state.json"
    ramps = build_lens_ramps(tmp_path / "ramps", tiny_llama, depth=2, confidence_offset=6.0, others=(1, 3))
    options = {"ramps": str(ramps), "policy": "adaptive", "accuracy_bound": 0.2, "controller_state": str(path)}
    with Engine(tiny_llama, options) as engine:
        engine.tokens(PROMPTS, greedy(40))
    document = json.loads(path.read_text())  # as if two ranks had learned it
    document["identity"]["ranks"] = 2
    path.write_text(json.dumps(document))
    assert document["state"]["calibrations"]

    def state(worker: Any) -> Any:
        runner = worker.model_runner
        return json.loads(json.dumps(runner.exit_drafter.policy.state())), runner.memory.state is not None

    def see_other_tokens(worker: Any) -> None:
        """Rank 1 alone, in the shadow of the ramp in use."""
        sets = worker.model_runner.exit_drafter.ramp_sets
        original = sets[3].predict
        if worker.rank == 1:
            sets[3].predict = lambda *args, **kwargs: (proposed := original(*args, **kwargs))._replace(
                token_ids=(proposed.token_ids + 1) % 160
            )

    def shadows(worker: Any) -> Any:
        choice = worker.model_runner.exit_drafter.policy.depth_choice
        return {depth: (own.agreement, own.active_agreement, own.num_samples) for depth, own in choice.shadows.items()}

    with Engine(tiny_llama, options, **ranks) as engine:
        assert engine.llm.collective_rpc(state) == [(document["state"], True), (document["state"], False)]
        engine.llm.collective_rpc(see_other_tokens)
        engine.tokens(PROMPTS, greedy(100))
        first, second = statuses(engine)
        assert first["controller"]["verify_ms"] and first["controller"]["calibration"]
        assert first == second, "rank 0's clock is not everybody's"
        of_first, of_second = engine.llm.collective_rpc(shadows)
        assert of_first == of_second and {1, 3} <= of_first.keys(), "rank 0's shadow is not everybody's"
