"""A fake OpenAI server with set delays and known stream shapes: over HTTP, or in virtual time, where delays are exact
however busy the machine is."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

# Characters at which str.splitlines splits and a line of an event stream does not end.
SPLITTERS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"

# What the first word of the prompt asks for: chunks of (delay before it in seconds, its text, tokens in it).
SHAPES: dict[str, list[tuple[float, str, int]]] = {
    "steady": [(0.10, "a", 1), *[(0.05, "b", 1)] * 4],
    "bursts": [(0.10, "a", 1), (0.10, "bcd", 3), (0.10, "efg", 3)],
    "stall": [(0.05, "a", 1), (0.05, "b", 1), (0.40, "c", 1), (0.05, "d", 1)],
    "silent": [(0.10, "a", 1), (0.10, "", 1), (0.10, "bc", 1)],  # a token whose text comes with the next one
    "single": [(0.05, "a", 1)],
    "lines": [(0.10, "a", 1), (0.10, f"b{SPLITTERS}", 1)],  # and without a blank after the colon
    "broken": [(0.05, "a", 1)],
    "cut": [(0.05, "a", 1)],
    "error": [(0.05, "a", 1)],
}
T = TypeVar("T")
END_DELAY_S = 0.05  # before the token that ends an answer, which has no text

bodies: list[dict[str, Any]] = []  # of all requests, for tests to look at

app = FastAPI()
app.state.api_key = None
app.state.version = None


@app.middleware("http")
async def check_key(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    key = app.state.api_key
    if key and request.url.path.startswith("/v1/") and request.headers.get("authorization") != f"Bearer {key}":
        return JSONResponse({"error": "Unauthorized"}, status_code=401)
    return await call_next(request)


@app.get("/health")
async def health() -> dict[str, str]:
    return {}


@app.get("/version")
async def version() -> Response:
    known = app.state.version
    return JSONResponse({"version": known}) if known else JSONResponse({"detail": "Not Found"}, status_code=404)


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    return {"data": [{"id": "fake"}]}


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    answer = _answer(await request.json())
    if answer is None:
        return JSONResponse({"error": "no"}, status_code=429)
    return StreamingResponse(answer, media_type="text/event-stream")


def _answer(body: dict[str, Any]) -> AsyncIterator[str] | None:
    """None: refused."""
    assert body["stream"] and body["temperature"] >= 0.0
    bodies.append(body)
    words = body["messages"][0]["content"].split()
    continuous = body["stream_options"].get("continuous_usage_stats", False) and "old" not in words
    return None if words[0] == "refused" else _stream(words[0], continuous)


async def _stream(kind: str, continuous: bool) -> AsyncIterator[str]:
    tokens = 0

    def event(**chunk: Any) -> str:
        if continuous and "usage" not in chunk and "error" not in chunk:
            chunk["usage"] = {"completion_tokens": tokens}
        text = json.dumps(chunk, ensure_ascii=False)
        return f"data:{text}\r\n\r\n" if kind == "lines" else f"data: {text}\n\n"

    yield event(choices=[{"delta": {"role": "assistant", "content": ""}}])
    for delay, text, number in SHAPES.get(kind, SHAPES["steady"]):
        await asyncio.sleep(delay)
        tokens += number
        yield event(choices=[{"delta": {"content": text}}])
        if kind == "broken":
            return
        if kind == "cut":
            raise httpx.RemoteProtocolError("peer closed connection")
        if kind == "error":
            yield event(error={"message": "boom"})
            return
    await asyncio.sleep(END_DELAY_S)
    tokens += 1
    yield event(choices=[{"delta": {}, "finish_reason": "stop"}])
    yield event(choices=[], usage={"completion_tokens": tokens})
    yield "data: [DONE]\n\n"


@contextmanager
def fake_server(api_key: str | None = None, version: str | None = None) -> Iterator[str]:
    """Base URL of a running fake server, which may want a key, and may say that it is vLLM's."""
    app.state.api_key, app.state.version = api_key, version
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
        app.state.api_key = app.state.version = None


class FakeTransport(httpx.AsyncBaseTransport):
    """The same answers without a network, or those of another server."""

    def __init__(self, answer_to: Callable[[dict[str, Any]], AsyncIterator[str] | None] | None = None) -> None:
        self.answer_to = answer_to or _answer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.answer_to(json.loads(request.content))
        if answer is None:
            return httpx.Response(429, json={"error": "no"})
        return httpx.Response(200, stream=_Bytes(answer))


class _Bytes(httpx.AsyncByteStream):
    def __init__(self, text: AsyncIterator[str]) -> None:
        self.text = text

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self.text:
            yield part.encode()


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing takes any time but sleeping, which is over at once."""

    now_s = 0.0
    _ready: Sized  # asyncio's own: callbacks to call now, and those of later by their time
    _scheduled: list[asyncio.TimerHandle]

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now_s = max(self.now_s, self._scheduled[0].when())
        super()._run_once()  # type: ignore[misc]  # no public place between two turns of the loop


def in_virtual_time(work: Coroutine[object, object, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
