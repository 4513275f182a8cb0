"""A fake OpenAI server with set delays and known stream shapes, for the client's tests."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

# What the first word of the prompt asks for: delays in seconds before each chunk, and each chunk's text.
SHAPES: dict[str, list[tuple[float, str]]] = {
    "steady": [(0.10, "a"), *[(0.05, "b")] * 4],
    "bursts": [(0.10, "a"), (0.10, "bcd"), (0.10, "efg")],
    "single": [(0.05, "a")],
}
TOKENS = {"steady": 5, "bursts": 7, "single": 1}

app = FastAPI()


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Any:
    body = await request.json()
    assert body["stream"] and body["temperature"] == 0.0
    kind = body["messages"][0]["content"].split()[0]
    if kind == "refused":
        return JSONResponse({"error": "no"}, status_code=429)
    return StreamingResponse(_stream(kind), media_type="text/event-stream")


async def _stream(kind: str):
    def event(**chunk: Any) -> str:
        return f"data: {json.dumps(chunk)}\n\n"

    yield event(choices=[{"delta": {"role": "assistant", "content": ""}}])
    for delay, text in SHAPES.get(kind, SHAPES["steady"]):
        await asyncio.sleep(delay)
        yield event(choices=[{"delta": {"content": text}}])
        if kind == "broken":
            return
        if kind == "error":
            yield event(error={"message": "boom"})
            return
    yield event(choices=[{"delta": {}, "finish_reason": "stop"}])
    yield event(choices=[], usage={"completion_tokens": TOKENS.get(kind, 5) + 1})
    yield "data: [DONE]\n\n"


@contextmanager
def fake_server() -> Iterator[str]:
    """Base URL of a running fake server."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
