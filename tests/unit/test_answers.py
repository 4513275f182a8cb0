"""Reports in the answers of vLLM's routes: whole ones and streams of every kind, cut in any way."""

import asyncio
import json
from hashlib import sha256
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from apparate_llm.api.answers import CALLER, AnswerMiddleware
from apparate_llm.sse import event_data
from tests.fake_server import SPLITTERS

CHUNK = {"id": "x", "model": "m", "choices": [{"text": f"a{SPLITTERS}"}]}


def event(chunk, name=""):
    data = chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)
    return f"event: {name}\n" * bool(name) + f"data: {data}\n\n"


def answered(*parts, kind="text/event-stream", reports=({"index": 0},), at=-1, wanted=True, key="", by_key=None):
    """The client's response where a route sends these parts, and the reports are there by part `at`."""
    app = FastAPI()
    app.add_middleware(AnswerMiddleware)
    app.state.early_exit = SimpleNamespace(tenants_by_key=by_key or {})

    @app.post("/")
    async def route():
        caller = CALLER.get()
        caller.wants_report = wanted

        async def body():
            for number, part in enumerate(parts):
                if number == at % len(parts):
                    caller.reports.extend(reports)
                yield part

        if kind == "application/json" and len(parts) == 1:
            caller.reports.extend(reports)
            return Response(parts[0], media_type=kind)
        return StreamingResponse(body(), media_type=kind, headers={"X-Tenant": str(caller.key_tenant)})

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://s") as http:
            return await http.post("/", headers={"Authorization": f"Bearer {key}"})

    return asyncio.run(ask())


def chunks_of(response):
    return [data if data == "[DONE]" else json.loads(data) for data in event_data([response.content])]


@pytest.mark.parametrize("body", ['{"text":"\u00e4\u2028","tpt":1e-07}', "{}", '{"a":{}} \n'])
def test_a_whole_answer_carries_the_reports_in_order_and_is_else_as_it_was(body):
    got = answered(body, kind="application/json", reports=[{"index": 1}, {"index": 0}])
    assert got.json() == {**json.loads(body), "early_exit": [{"index": 0}, {"index": 1}]}
    assert got.text.startswith(body.rstrip().removesuffix("}"))
    assert int(got.headers["content-length"]) == len(got.content)
    for as_it_is in (
        answered(body, kind="application/json", reports=()),
        answered(body, kind="application/json", wanted=False),
    ):
        assert as_it_is.text == body


def test_a_whole_answer_may_come_in_parts():
    assert answered('{"a":', "1", "}", kind="application/json").json() == {"a": 1, "early_exit": [{"index": 0}]}


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_carries_the_report_in_a_chunk_before_its_end(size):
    whole = event(CHUNK) + ": ping\n\n" + event("[DONE]")
    parts = [whole.encode()[at : at + size] for at in range(0, len(whole.encode()), size)]
    got = answered(*parts)
    first, report, end = chunks_of(got)
    assert first == CHUNK and end == "[DONE]" and ": ping\n\n" in got.text
    assert report == {"id": "x", "model": "m", "choices": [], "early_exit": [{"index": 0}]}
    assert answered(*parts, reports=()).content == answered(*parts, wanted=False).content == whole.encode()


@pytest.mark.parametrize(
    ("ending", "named", "where"),
    [
        ({"type": "response.completed", "response": {"id": "r", "text": "\u2028"}}, True, "response"),
        ({"type": "response.incomplete", "response": {"id": "r"}}, True, "response"),
        ({"type": "message_stop"}, True, None),
        ({"type": "message-end", "delta": {}}, False, None),
    ],
)
def test_streams_without_done_carry_it_in_the_event_that_ends_them(ending, named, where):
    text_event = event({"type": "text", "text": 'a "message_stop" and "response.completed"'})
    after = [event("[DONE]")] if not named else []
    got = answered(text_event, event(ending, ending["type"] if named else ""), *after, at=1)
    first, last = chunks_of(got)[:2]
    assert "early_exit" not in str(first)
    assert (last if where is None else last[where]).pop("early_exit") == [{"index": 0}] and last == ending
    assert (f"event: {ending['type']}\n" in got.text) == named
    assert got.text.count("early_exit") == 1


def test_a_stream_of_another_kind_tells_it_at_its_end():
    assert chunks_of(answered(event(CHUNK), event({"end": 1}))) == [CHUNK, {"end": 1}, {"early_exit": [{"index": 0}]}]


def test_a_key_tells_the_tenant_of_a_request():
    by_key = {sha256(b"sk-1").hexdigest(): "interactive"}
    assert answered("", key="sk-1", by_key=by_key).headers["X-Tenant"] == "interactive"
    assert answered("", key="sk-2", by_key=by_key).headers["X-Tenant"] == "None"
