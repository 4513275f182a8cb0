"""A fake llama.cpp server: its flags, its start, and the streams it answers with. `python -m tests.fake_llama FLAGS`
runs it; FakeTransport of tests/fake_server.py takes `answer`."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

# What the prompt asks for: steps of (delay before it in seconds, texts of its tokens). A token has a chunk of its own;
# None: the one that ends an answer, which has none.
SHAPES: dict[str, list[tuple[float, Sequence[str | None]]]] = {
    "steady": [(0.10, ["a"]), *[(0.05, ["b"])] * 4, (0.05, [None])],
    "drafted": [(0.10, ["a"]), (0.10, ["b", "c", "d"]), (0.10, ["e", "f", None])],
    "drafted, counted at once": [(0.10, ["a"]), (0.10, ["b", "c", "d"]), (0.10, ["e", "f", None])],  # of older versions
    "cut off": [(0.10, ["a"]), (0.05, ["b"]), (0.05, ["c"])],  # by max_tokens
    "silent": [(0.10, [""]), (0.05, ["ab"]), (0.05, [""]), (0.05, ["cd"]), (0.05, [None])],  # half a character
}
LOADING = 2  # answers to /health before the model is loaded
PROMPT_TOKENS = 12

app = FastAPI()
app.state.asked = 0
app.state.bodies = []


@app.get("/health")
async def health() -> Response:
    app.state.asked += 1
    if app.state.asked <= LOADING:
        return JSONResponse({"error": {"code": 503, "message": "Loading model"}}, status_code=503)
    return JSONResponse({"status": "ok"})


@app.get("/metrics")
async def metrics() -> Response:
    return JSONResponse({"error": {"code": 501, "message": "start it with --metrics"}}, status_code=501)


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    return {"data": [{"id": "fake.gguf"}]}


@app.get("/seen")
async def seen() -> dict[str, Any]:
    """For tests: what it was started with, and asked."""
    return {"argv": sys.argv[1:], "environment": dict(os.environ), "bodies": app.state.bodies}


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    body = await request.json()
    app.state.bodies.append(body)
    return StreamingResponse(answer(body), media_type="text/event-stream")


async def answer(body: dict[str, Any]) -> AsyncIterator[str]:
    kind = body["messages"][0]["content"]
    tokens, counts = 0, body.get("timings_per_token", False)

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({'choices': choices, **more})}\n\n"

    def timings() -> dict[str, Any]:
        return {"timings": {"cache_n": 0, "prompt_n": PROMPT_TOKENS, "predicted_n": tokens}} if counts else {}

    for delay_s, texts in SHAPES.get(kind, SHAPES["steady"]):
        await asyncio.sleep(delay_s)
        for number, text in enumerate(texts):
            is_first = tokens == 0
            if "at once" not in kind:
                tokens += 1
            elif number == 0:
                tokens += len(texts)
            if is_first:
                delta = {"role": "assistant", "content": None}
                yield event([{"delta": delta, "finish_reason": None}], **({} if text else timings()))
            if text:
                yield event([{"delta": {"content": text}, "finish_reason": None}], **timings())
    yield event([{"delta": {}, "finish_reason": "length" if kind == "cut off" else "stop"}])
    yield event([], usage={"completion_tokens": tokens, "prompt_tokens": PROMPT_TOKENS}, **timings())
    yield "data: [DONE]\n\n"


def main() -> None:
    if "--version" in sys.argv:
        print("version: 11434 (fake)\nbuilt with care", file=sys.stderr)
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--model", "--host", "--threads", "--parallel", "--ctx-size", "--cache-ram", "--alias"):
        parser.add_argument(name, *(["-m"] if name == "--model" else []))
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
