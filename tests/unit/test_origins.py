"""Where tokens came from: in the ledger, and in the answer a client gets."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from apparate_llm.api import answers
from apparate_llm.api.answers import CALLER, AnswerMiddleware, Caller, reporting
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from vllm.sampling_params import RequestOutputKind, SamplingParams

from apparate_llm.controller.budget import AccuracyBudget, Bucket
from apparate_llm.core import Exit
from apparate_llm.engine.origins import MAX_UNCLAIMED, REPORT_KEY, Reports, Trace
from apparate_llm.engine.verdicts import RequestExits, VerdictLedger


def exit_at(position: int, token_id: int = 5, depth: int = 2) -> Exit:
    return Exit(position, token_id, depth, round_number=0, confidence=0.9)


def test_every_emitted_token_has_its_origin_and_verdicts_come_late():
    ledger = VerdictLedger(AccuracyBudget(0.9))
    request = RequestExits(releasable=True, bucket=Bucket.of_request(0.9), trace=Trace("key"))
    ledger.add_request("a", request)
    ledger.emit("a", 1, now_s=0.0)
    released = [exit_at(11, 5), exit_at(12, 6, depth=0)]
    ledger.release("a", released)
    ledger.record(
        ledger.due("a", first_position=10, num_scheduled=1, first_row=0), [5], [0.0]
    )  # the second comes later
    ledger.emit("a", 1, now_s=0.1)
    request.held = [exit_at(14), exit_at(15), exit_at(16)]
    request.held[1].diverged = True
    ledger.checked(request, num_held=3, num_accepted=2)
    ledger.emit("a", 3, now_s=0.2)
    ledger.record(ledger.due("a", first_position=11, num_scheduled=1, first_row=0), [9], [0.3])
    ledger.release("a", [exit_at(18)])
    ledger.end_request("a")
    report = ledger.report("key")["a"]
    assert report["origins"] == [
        "checked",
        "released",
        "released_diverged",
        "checked",
        "held",
        "held_diverged",
        "checked",
        "unverified",
    ]
    assert len(report["origins"]) == ledger.counts.emitted == 8
    assert report["exits_by_depth"] == {2: 4, 0: 1} and report["tpt_ms"] == pytest.approx(200 / 7)
    assert ledger.counts.decode_tokens == 7 and ledger.counts.decode_s == pytest.approx(0.2)
    assert ledger.report("key") == {}


def test_a_stop_token_among_accepted_exits_ends_the_trace_there():
    trace = Trace("key")
    trace.accepted([exit_at(3), exit_at(4)])
    trace.emitted(1)
    assert trace.origins == ["held"]


def test_a_request_that_has_not_been_ended_yet_reports_and_once_only():
    ledger = VerdictLedger(AccuracyBudget(0.0))
    ledger.add_request("a", RequestExits(releasable=True, bucket=Bucket.of_request(0.0), trace=Trace("key")))
    ledger.emit("a", 1, now_s=0.0)
    assert ledger.report("key")["a"]["origins"] == ["checked"]
    ledger.end_request("a")
    assert ledger.report("key") == {}


def test_reports_nobody_asks_for_are_forgotten():
    reports = Reports()
    for number in range(MAX_UNCLAIMED + 1):
        reports.keep("a", Trace(f"key {number}"), None)
    assert reports.take("key 0") == {} and reports.take("key 1") != {}


@pytest.fixture(autouse=True)
def words(monkeypatch):
    monkeypatch.setattr(answers, "texts_of", lambda before, token_ids, tokenizer: [f"w{token}" for token in token_ids])


def report(origins: list[str]) -> dict:
    return {"origins": origins, "exits_by_depth": {2: 1}, "tpt_ms": 12.5}


def output(*choices: tuple[int, list[int]]) -> SimpleNamespace:
    return SimpleNamespace(
        prompt_token_ids=[1, 2], outputs=[SimpleNamespace(index=index, token_ids=ids) for index, ids in choices]
    )


def run_reporting(outputs, by_request, kind, extra_args=None):
    caller, seen = Caller(), {}

    async def generate(params):
        seen["params"] = params
        for one in outputs:
            yield one

    async def ask(method, key):
        seen["key"] = key
        return [{}, by_request]  # two engines: the second had the request

    params = SamplingParams(output_kind=kind, extra_args=extra_args or {"early_exit_report": 1})

    async def drive():
        return [one async for one in reporting(generate, params, caller, ask=ask, tokenizer=object)]

    got = asyncio.run(drive())
    assert got == list(outputs) and seen["params"].extra_args[REPORT_KEY] == seen["key"]
    assert REPORT_KEY not in params.extra_args
    return caller.reports


def test_a_report_counts_tokens_by_origin_and_names_their_texts():
    parts = [output((0, [7])), output((0, [8, 9]))]
    (told,) = run_reporting(parts, {"r": report(["checked", "held", "released_diverged"])}, RequestOutputKind.DELTA)
    assert told["tokens"]["checked"] == told["tokens"]["held"] == told["divergences"] == 1
    assert told["texts"] == ["w7", "w8", "w9"] and told["exits_by_depth"] == {2: 1} and told["tpt_ms"] == 12.5


def test_what_a_stop_string_cut_off_is_not_in_the_report():
    whole = [output((0, [7])), output((0, [7, 8]))]
    (told,) = run_reporting(whole, {"r": report(["checked", "held", "checked"])}, RequestOutputKind.CUMULATIVE)
    assert told["origins"] == ["checked", "held"] and sum(told["tokens"].values()) == 2


def test_several_answers_to_one_request_are_told_apart():
    parts = [output((1, [4])), output((0, [7, 8]))]
    by_request = {"1_r": report(["checked"]), "0_r": report(["checked", "held"])}
    told = run_reporting(parts, by_request, RequestOutputKind.DELTA)
    assert [(one["index"], one["texts"]) for one in told] == [(0, ["w7", "w8"]), (1, ["w4"])]


def test_a_report_that_fails_costs_the_answer_nothing():
    caller = Caller()

    async def generate(params):
        yield output((0, [7]))

    async def ask(method, key):
        raise RuntimeError("no worker")

    params = SamplingParams(extra_args={"early_exit_report": 1})

    async def drive():
        return [one async for one in reporting(generate, params, caller, ask=ask, tokenizer=object)]

    assert len(asyncio.run(drive())) == 1 and caller.reports == []


def answered(path: str, *, reports: list[dict], key: str = "", by_key: dict | None = None) -> httpx.Response:
    app = FastAPI()
    app.add_middleware(AnswerMiddleware)
    app.state.early_exit = SimpleNamespace(classes_by_key=by_key or {})

    @app.post("/whole")
    async def whole():
        CALLER.get().reports.extend(reports)
        return {"id": "x", "text": "ä", "class": CALLER.get().key_class}

    @app.post("/stream")
    async def stream():
        caller = CALLER.get()

        async def events():
            yield 'data: {"id": "x", "model": "m", "choices": [{"text": "a"}]}\n\n'
            caller.reports.extend(reports)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://s") as http:
            return await http.post(path, headers={"Authorization": f"Bearer {key}"})

    return asyncio.run(ask())


def test_a_whole_answer_carries_the_report():
    got = answered("/whole", reports=[{"index": 0}])
    assert got.json() == {"id": "x", "text": "ä", "class": None, "early_exit": [{"index": 0}]}
    assert int(got.headers["content-length"]) == len(got.content)
    assert answered("/whole", reports=[]).json() == {"id": "x", "text": "ä", "class": None}


def test_a_stream_carries_the_report_in_a_chunk_before_its_end():
    lines = [line for line in answered("/stream", reports=[{"index": 0}]).text.split("\n\n") if line]
    assert len(lines) == 3 and lines[-1] == "data: [DONE]"
    chunk = json.loads(lines[1].removeprefix("data: "))
    assert chunk == {"id": "x", "model": "m", "choices": [], "early_exit": [{"index": 0}]}
    assert len([line for line in answered("/stream", reports=[]).text.split("\n\n") if line]) == 2


def test_a_key_tells_the_class_of_a_request():
    from hashlib import sha256

    by_key = {sha256(b"sk-1").hexdigest(): "interactive"}
    assert answered("/whole", reports=[], key="sk-1", by_key=by_key).json()["class"] == "interactive"
    assert answered("/whole", reports=[], key="sk-2", by_key=by_key).json()["class"] is None
