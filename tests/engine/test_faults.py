"""A fault in any of our entry points, whatever the engine is doing: the texts are plain vLLM's, all adds up, and exits
come back without a restart."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from apparate_llm.config import RequestOptions
from apparate_llm.engine import output, runner, runtime_config
from apparate_llm.exits import step, verify
from apparate_llm.exits.histograms import Histogram
from apparate_llm.exits.token_origins import REPORT_KEY
from tests.harness import Engine, greedy, token_prompts

PROMPTS = token_prompts(2, length=20, shared=30)
NUM_TOKENS = 16
REGEX = "(w1|w2|w3|w4|w5)( (w6|w7|w8|w9))*"
# Engine state -> what the requests ask for, steps before the fault.
STATES: dict[str, tuple[dict[str, Any], int]] = {
    "prefill": ({}, 0),  # prompts are read in several steps
    "decode": ({"extra_args": {"accuracy_bound": 0.0}}, 3),  # held exits are with the scheduler
    "exits outstanding": ({}, 3),
    "structured output": ({"structured": REGEX}, 3),
    "plain": ({"extra_args": {"early_exit": 0}}, 3),
}
# Ours, and where it is called: every hook's parts, from the scheduler's message to the output of the step.
TARGETS = [
    "runner._requests_change",
    "runner._with_verdict_rows",
    "step.due",
    "step.verify_released",
    "runner._verify_held",
    "step.verify_held",
    "runner._verify_greedy",
    "runner._go_on",
    "step.emit",
    "step._count",
    "step.learn",
    "runner._propose",
    "step.count_drafting",
    "step.commit",
    "step.put_off",
    "shallow pass.append",
    "runner.take_draft_token_ids",
    "ledger.add_request",
    "ledger.end_request",
    "ledger.due",
    "ledger.verify_released",
    "ledger.count_held",
    "ledger.emit",
    "ledger.release",
    "ledger.count_emitted",
    "ledger.check_integrity",
    "budget.release",
    "budget.prove_right",
    "budget.earn",
    "budget.share",
    "ledger.ended",
    "clock.scheduled",
    "clock.completed",
    "clock.start",
    "clock.stop",
    "policy.start",
    "policy.decide",
    "policy.on_verdict",
    "policy.on_decode_step",
    "drafter.run",
    "drafter.predict",
    "drafter.free_slots",
    "scheduler._check_computed",
    "scheduler._released_of",
    "scheduler._hold",
    "runner module.admit_request",
    "step module.best_and_regret",
    "step module.verify_sampled",
    "verify module.best_and_regret",
    "runtime_config module.parse_request_options",
    "output.extending",
]
ASIDE = {"runtime_config module.parse_request_options"}  # costs the request its options
ELSEWHERE = {
    "runner.take_draft_token_ids",
    "scheduler._check_computed",
    "scheduler._released_of",
    "scheduler._hold",
}


def owner_of(engine: Engine, name: str) -> Any:
    own = engine.runner
    return {
        "runner": own,
        "step": own.step,
        "shallow pass": own.exit_drafter.model,
        "ledger": own.ledger,
        "budget": own.ledger.budget,
        "clock": own.clock,
        "policy": type(own.exit_drafter.policy),
        "drafter": own.exit_drafter,
        "scheduler": engine.scheduler,
        "runner module": runner,
        "step module": step,
        "verify module": verify,
        "runtime_config module": runtime_config,
        "output": output.EarlyExitOutput,
    }[name]


@contextmanager
def fault(owner: Any, method: str, *, once: bool) -> Iterator[list[int]]:
    """Within, the method raises: at its next call, or at every one. Yields the number of faults, in a list."""
    original, raised = getattr(owner, method), [0]
    was_there = vars(owner).get(method)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if once and raised[0]:
            return original(*args, **kwargs)
        raised[0] += 1
        raise RuntimeError(f"injected into {method}")

    setattr(owner, method, failing)
    try:
        yield raised
    finally:
        if was_there is None:
            delattr(owner, method)
        else:
            setattr(owner, method, was_there)


def params_of(state: str) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    given = dict(STATES[state][0])
    if regex := given.pop("structured", None):
        given["structured_outputs"] = StructuredOutputsParams(regex=regex)
    return greedy(NUM_TOKENS, **given)


def configure(engine: Engine, **changes: Any) -> str | None:
    return engine.llm.collective_rpc("early_exit_configure", args=(changes,))[0]


CHUNKS = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True}


@pytest.fixture(scope="module")
def expected(tiny_llama):
    with Engine(tiny_llama, **CHUNKS) as plain:
        return {state: plain.tokens(PROMPTS, params_of(state)) for state in STATES}


@pytest.fixture(scope="module")
def engine(tiny_llama, lens_ramps, expected):
    options = {"ramps": str(lens_ramps(depth=4)), "hold_threshold": 0.0, "threshold": 0.01, "accuracy_bound": 0.9}
    with Engine(tiny_llama, options, **CHUNKS) as engine:
        yield engine


def run_with_fault(engine: Engine, target: str, state: str, *, once: bool, names: Iterator[int]) -> tuple[int, list]:
    """Faults raised, and the tokens of all requests."""
    number = next(names)
    ids = [f"{number}-{i}" for i in range(len(PROMPTS))]
    owner, method = target.rsplit(".", 1)
    num_before = STATES[state][1]
    tokens: dict[str, list[int]] = {}

    def add() -> None:
        for request_id, prompt in zip(ids, PROMPTS, strict=True):
            engine.add(request_id, prompt, params_of(state))

    if num_before:  # requests are under way
        add()
        for _ in range(num_before):
            tokens.update(engine.step())
        if state == "exits outstanding":
            while not engine.counts()["outstanding"]:
                tokens.update(engine.step())
    with fault(owner_of(engine, owner), method, once=once) as raised:
        if not num_before:
            add()
        while engine.llm.llm_engine.has_unfinished_requests():
            tokens.update(engine.step())
        engine.idle()
    return raised[0], [tokens[request_id] for request_id in ids]


@pytest.mark.parametrize("target", TARGETS)
def test_a_fault_leaves_plain_texts_and_exits_come_back(target, engine, expected):
    names = iter(range(TARGETS.index(target) * 100, 10**6))
    num_faults = 0
    for state in STATES:
        for once in (True, False) if state == "exits outstanding" else (True,):
            assert configure(engine) is None and engine.status()["active"], "exits come back"
            before = engine.counts()
            raised, tokens = run_with_fault(engine, target, state, once=once, names=names)
            assert tokens == expected[state], (state, once)
            engine.idle()
            engine.llm.collective_rpc("early_exit_check_integrity")
            after, status = engine.counts(), engine.status()
            if raised and target not in ASIDE | ELSEWHERE:
                assert after["fallbacks"] > before["fallbacks"] and not status["active"], (state, once)
                assert status["failure"]["error"] == "RuntimeError" and status["failure"]["returns_in_s"] <= 3600
            if once:
                assert after["emitted"] - before["emitted"] == NUM_TOKENS * len(PROMPTS), state
            assert after["outstanding"] == 0
            num_faults += raised
    engine.scheduler.num_failures = 0
    assert num_faults, "nobody calls it"
    assert configure(engine) is None
    before = engine.counts()
    assert engine.tokens(PROMPTS, greedy(NUM_TOKENS)) == expected["prefill"]
    after = engine.counts()
    assert after["released"] > before["released"] and after["fallbacks"] == before["fallbacks"]


def test_drafts_that_come_after_the_output_may_fail_too(engine, expected, monkeypatch):
    """As where an answer begins or ends: the tokens leave first."""
    assert configure(engine) is None
    emit = engine.runner.step.emit
    monkeypatch.setattr(engine.runner.step, "emit", lambda *args: emit(*args) is not None)
    raised, tokens = run_with_fault(engine, "scheduler._hold", "decode", once=False, names=iter([10**6]))
    assert raised > 1 and tokens == expected["decode"]
    engine.scheduler.num_failures = 0


def test_what_a_request_asks_for_in_any_shape_costs_nobody_anything(engine, expected):
    """As on a server that runs without our endpoint plugin, which refuses all this."""
    assert configure(engine) is None
    values = [
        None,
        True,
        -1,
        1.5,
        2**64 - 1,
        float("nan"),
        float("inf"),
        "",
        "x",
        [],
        [1],
        {},
        {"a": [1]},
        b"x",
        object(),
    ]
    keys = [*RequestOptions.model_fields, REPORT_KEY, "early_exit_unknown", 7]
    asked = [{"early_exit_report": 1, key: value} for key in keys for value in values]
    before = engine.counts()
    params = [greedy(2, extra_args=own) for own in asked]
    outputs = engine.generate([PROMPTS[0]] * len(asked), params)
    assert {tuple(each.outputs[0].token_ids) for each in outputs} == {tuple(expected["prefill"][0][:2])}
    after = engine.status()
    assert after["active"] and after["counts"]["fallbacks"] == before["fallbacks"]
    for key in ("x", "", 1, None):
        engine.llm.collective_rpc("early_exit_report", args=(key,))


def test_a_policy_that_failed_is_made_anew_and_one_that_fails_again_forgets(engine):
    assert configure(engine, policy="adaptive") is None
    safety = engine.runner.safety
    safety._failed_s.clear()
    engine.tokens(PROMPTS, greedy(NUM_TOKENS))
    learned = engine.runner.exit_drafter.policy.state()
    for keeps in (True, False):
        with fault(type(engine.runner.exit_drafter.policy), "start", once=True):
            engine.tokens(PROMPTS, greedy(2))
        assert not engine.status()["active"]
        assert configure(engine) is None
        assert (engine.runner.exit_drafter.policy.state()["calibrations"] == learned["calibrations"]) is keeps
    assert configure(engine, policy="static") is None


def test_exits_come_back_by_themselves_after_the_pause(engine, expected):
    assert configure(engine) is None
    before = engine.counts()
    with fault(engine.runner.step, "learn", once=True):
        assert engine.tokens(PROMPTS, greedy(NUM_TOKENS)) == expected["prefill"]
    assert engine.tokens(PROMPTS, greedy(NUM_TOKENS)) == expected["prefill"]
    status = engine.status()
    assert not status["active"] and status["failure"]["part"] == "drafting" and status["failure"]["returns_in_s"] > 0
    engine.runner.safety.returns_s = engine.runner.clock.now_s  # the pause is over
    assert engine.tokens(PROMPTS, greedy(NUM_TOKENS)) == expected["prefill"]
    after = engine.status()
    assert after["active"] and after["failure"] is None
    assert after["counts"]["recoveries"] == before["recoveries"] + 1
    assert after["counts"]["released"] > status["counts"]["released"]


def test_a_reset_says_whether_it_was_done(engine):
    assert configure(engine) is None
    with fault(runtime_config.PolicySwitch, "make", once=True):
        assert engine.llm.collective_rpc("early_exit_forget") == [False]
    assert engine.llm.collective_rpc("early_exit_forget") == [True], "after a failure, too"
    assert configure(engine) is None


def test_what_is_no_part_of_exits_does_not_switch_them_off(tiny_llama, lens_ramps, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("apparate_llm.controller.state.SAVE_EVERY_S", 0.0)
    (tmp_path / "file").write_text("")
    options = {
        "ramps": str(lens_ramps(depth=4)),
        "hold_threshold": 0.0,
        "feedback_log": "/dev/full",
        "controller_state": str(tmp_path / "file" / "state.json"),
    }

    def fail(self, value):
        raise RuntimeError("injected")

    with Engine(tiny_llama, options, **CHUNKS) as engine:
        monkeypatch.setattr(Histogram, "observe", fail)
        ramps, calls = engine.runner.exit_drafter.ramps, []
        original = ramps.predict

        def predict(*args, **kwargs):
            calls.append(1)
            draft = original(*args, **kwargs)
            return draft._replace(confidences=[float("nan")] * len(draft.confidences)) if len(calls) % 2 else draft

        ramps.predict = predict
        params = greedy(NUM_TOKENS, extra_args={"early_exit_report": 1, REPORT_KEY: "k"})
        assert engine.tokens(PROMPTS, params) == expected["prefill"]
        status = engine.status()
        assert status["active"] and status["counts"]["fallbacks"] == 0 and len(calls) > 4
        assert status["counts"]["accepted"] > 0 and engine.runner.memory.feedback.num_lost > 0
