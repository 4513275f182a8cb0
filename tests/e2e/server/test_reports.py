"""What a server says of its exits: with an answer, and to those who listen."""

import asyncio
import json

import httpx
import pytest

from apparate_llm.api.access import BODY_TIMEOUT_S
from apparate_llm.sse import event_data


def ask_with_report(client, **more):
    return client.completions.create(
        model="tiny",
        prompt="w3 w5 w9",
        temperature=0,
        max_tokens=60,
        extra_body={"ignore_eos": True, "vllm_xargs": {"early_exit_report": 1}},
        **more,
    )


def test_an_answer_says_where_its_tokens_came_from(server, client):
    def totals():
        return httpx.get(f"{server}/early_exit/status").json()["counts"]

    before = totals()
    (report,) = ask_with_report(client).model_extra["early_exit"]
    after = totals()
    tokens = report["tokens"]
    assert sum(tokens.values()) == len(report["origins"]) == 60
    assert tokens["held"] + tokens["held_divergence"] == after["accepted"] - before["accepted"]
    assert tokens["released"] > 0 and tokens["unverified"] <= after["unverified"] - before["unverified"]
    assert report["divergences"] == after["divergences"] - before["divergences"]
    assert sum(report["exits_by_depth"].values()) == 60 - tokens["checked"] and report["tpt_ms"] > 0
    chunks = list(ask_with_report(client, stream=True))
    assert [chunk.model_extra.get("early_exit") is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    (streamed,) = chunks[-1].model_extra["early_exit"]
    assert "".join(streamed["texts"]) == "".join(choice.text for chunk in chunks for choice in chunk.choices)
    plain = client.completions.create(model="tiny", prompt="w3", max_tokens=4)
    assert "early_exit" not in plain.model_extra


def test_events_tell_the_totals(server):
    with httpx.stream("GET", f"{server}/early_exit/events", timeout=10) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        status = json.loads(next(event_data(stream.iter_bytes())))
    assert status["active"] and status["counts"]["emitted"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_of_every_prompt_is_reported_under_its_index(client, stream):
    answer = client.completions.create(
        model="tiny",
        prompt=["w3", "w8 w8 w1"],
        max_tokens=12,
        n=3,
        temperature=1.0,
        stream=stream,
        extra_body={"ignore_eos": True, "vllm_xargs": {"early_exit_report": 1}},
    )
    texts = dict.fromkeys(range(6), "")
    for chunk in answer if stream else [answer]:
        reports = (chunk.model_extra or {}).get("early_exit")
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [report["index"] for report in reports] == list(texts) and len(set(texts.values())) > 1
    for report in reports:
        assert "".join(report["texts"]) == texts[report["index"]] and len(report["origins"]) == 12


HELLO = [{"role": "user", "content": "w1 w2"}]
ROUTES = {
    "/v1/completions": {"prompt": "w1 w2"},
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/chat/completions/batch": {"messages": [HELLO, [{"role": "user", "content": "w9"}]]},
    "/v1/messages": {"messages": HELLO},
    "/v1/responses": {"input": "w1 w2"},
    "/invocations": {"prompt": "w1 w2"},
    "/inference/v1/generate": {"token_ids": [5, 6, 7], "output_mode": "text"},
}


def text_of(part):
    """Of a whole answer or an event of a stream, by choice."""
    if "choices" in part:
        choices = [(one["index"], one.get("message") or one.get("delta") or {}, one) for one in part["choices"]]
        return {index: own.get("content") or one.get("text") or "" for index, own, one in choices}
    if "content" in part:
        return {0: "".join(block.get("text", "") for block in part["content"])}
    if "output" in part:
        return {0: "".join(block["text"] for item in part["output"] for block in item["content"])}
    delta = part.get("delta") if part.get("type") in ("content_block_delta", "response.output_text.delta") else ""
    return {0: delta if isinstance(delta, str) else delta.get("text", "")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_every_route_reports_and_refuses_a_bad_option(server, path, stream):
    body = {"model": "tiny", "temperature": 0, "stream": stream, **ROUTES[path]}
    body |= {"max_output_tokens": 20} if path == "/v1/responses" else {"max_tokens": 20}

    def asking(**options):
        if path == "/inference/v1/generate":
            return {**body, "sampling_params": {"max_tokens": 20, "temperature": 0, "extra_args": options}}
        return {**body, "vllm_xargs": options}

    with httpx.Client(base_url=server, timeout=60) as http:
        refused = http.post(path, json=asking(early_exit=7))
        assert refused.status_code == 400 and "early_exit: Input should be 0 or 1" in refused.text
        if path.endswith("batch"):
            body.pop("stream")
        answer = http.post(path, json=asking(early_exit_report=1))
        assert answer.status_code == 200, answer.text
    is_stream = answer.headers["content-type"].startswith("text/event-stream")
    assert is_stream == (stream and not path.endswith("batch"))
    parts = (
        [json.loads(data) for data in event_data([answer.content]) if data != "[DONE]"]
        if is_stream
        else [answer.json()]
    )
    texts: dict[int, str] = {}
    for part in parts:
        for index, text in text_of(part).items():
            texts[index] = texts.get(index, "") + text
    (reports,) = [report for part in parts if (report := {**part, **part.get("response", {})}.get("early_exit"))]
    assert {report["index"]: "".join(report["texts"]) for report in reports} == texts and all(texts.values())
    assert all(sum(report["tokens"].values()) == len(report["texts"]) <= 20 for report in reports)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "more", [{"stop": ["w"]}, {"stop": ["w"], "include_stop_str_in_output": True}, {"echo": True}, {"min_p": 0.1}]
)
def test_texts_are_the_choices_own_whatever_ends_it(server, more, stream):
    """A tiny model's every word has a w in it."""
    body = {"model": "tiny", "prompt": "w3 w5 w9", "temperature": 0, "max_tokens": 30, "stream": stream, **more}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    answer = httpx.post(f"{server}/v1/completions", json={**body, "vllm_xargs": {"early_exit_report": 1}}, timeout=60)
    parts = (
        [json.loads(data) for data in event_data([answer.content]) if data != "[DONE]"] if stream else [answer.json()]
    )
    text = "".join(choice["text"] for part in parts for choice in part["choices"])
    (report,) = next(part["early_exit"] for part in parts if "early_exit" in part)
    (usage,) = [part["usage"] for part in parts if part.get("usage")]
    assert "".join(report["texts"]) == (text.removeprefix("w3 w5 w9") if more.get("echo") else text)
    assert len(report["texts"]) == sum(report["tokens"].values()) == usage["completion_tokens"]
    assert sum(report["exits_by_depth"].values()) == len(report["texts"]) - report["tokens"]["checked"]
    assert report["divergences_at_worst"] == report["divergences"] + report["tokens"]["unverified"]


def test_idle_listeners_and_one_that_never_reads_cost_nobody_anything(server, client):
    async def listen():
        loop = asyncio.get_running_loop()
        port = int(server.rpartition(":")[2])
        request = b"GET /early_exit/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
        writers = []
        for _ in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            writers.append(writer)
        _, slow = await asyncio.open_connection("127.0.0.1", port)
        slow.write(request[:20])  # and then nothing more
        half = b"PATCH /early_exit/config HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        reader, unfinished = await asyncio.open_connection("127.0.0.1", port)
        unfinished.write(half)
        answer = await loop.run_in_executor(None, lambda: ask_with_report(client))
        assert answer.usage.completion_tokens == 60
        status = await loop.run_in_executor(None, lambda: httpx.get(f"{server}/early_exit/status"))
        assert status.json()["active"]
        assert b" 408 " in await asyncio.wait_for(reader.readline(), BODY_TIMEOUT_S + 10)
        for writer in (*writers, slow, unfinished):
            writer.close()

    asyncio.run(listen())
