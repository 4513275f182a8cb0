"""What an answer says of its own exits, and what a request's API key says of it.

vLLM's routes know nothing of either. A middleware around them notes whose key a request came with, and adds the report
to the answer; `engine.generate`, which every route calls in the end, is where both meet the engine.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind

from apparate_llm.config import EarlyExitConfig
from apparate_llm.engine.origins import REPORT_KEY, Origin

logger = init_logger("vllm.apparate")
CONTEXT_TOKENS = 8
FIELD = "early_exit"  # of an answer
DIVERGED = (Origin.HELD_DIVERGED, Origin.RELEASED_DIVERGED)
Message = Any


@dataclass(slots=True)
class Caller:
    """One HTTP request."""

    key_class: str | None = None  # of its API key
    reports: list[dict[str, Any]] = field(default_factory=list)  # one for each of its answers, once they ended


CALLER: ContextVar[Caller | None] = ContextVar("early_exit_caller", default=None)


def classes_by_key(config: EarlyExitConfig) -> dict[str, str]:
    """Digest of an API key -> class."""
    return {digest: name for name, own in config.classes.items() for digest in own.api_keys_sha256}


class AnswerMiddleware:
    """Around vLLM's routes. `app.state.early_exit` is None where the server runs without exits."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        server = getattr(scope["app"].state, "early_exit", None) if scope["type"] == "http" else None
        if server is None or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        caller = Caller()
        if server.classes_by_key:
            key = Headers(scope=scope).get("Authorization", "").partition(" ")[2]
            caller.key_class = server.classes_by_key.get(hashlib.sha256(key.encode()).hexdigest())
        token = CALLER.set(caller)
        try:
            await self.app(scope, receive, Answer(caller.reports, send))
        finally:
            CALLER.reset(token)


class Answer:
    """Sends a response on; puts the reports into it where there are any."""

    def __init__(self, reports: list[dict[str, Any]], send: Callable[[Message], Awaitable[None]]) -> None:
        self._reports = reports
        self._send = send
        self._start: Message | None = None  # kept back: its content-length may change
        self._body = b""
        self._last = b""  # event of a stream

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            if headers.get("content-type", "").startswith("application/json"):
                self._start = message
                return
        elif message["type"] == "http.response.body":
            if self._start is not None:
                await self._send_object(message)
                return
            if self._reports and message.get("body", b"").startswith(b"data: [DONE]"):
                message = {**message, "body": report_event(self._last, self._reports) + message["body"]}
            self._last = message.get("body", b"")
        await self._send(message)

    async def _send_object(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        start, self._start, body = self._start, None, self._body
        assert start is not None
        if self._reports and start["status"] == 200:
            body = json.dumps({**json.loads(body), FIELD: self._reports}, ensure_ascii=False).encode()
            kept = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            start = {**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def report_event(last: bytes, reports: list[dict[str, Any]]) -> bytes:
    """The event before the end of a stream, in the form of a chunk without choices, as vLLM's usage is."""
    chunk: dict[str, Any] = {}
    for line in last.decode(errors="replace").splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
    named = {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
    event = json.dumps({**named, "choices": [], FIELD: reports}, ensure_ascii=False)
    return f"data: {event}\n\n".encode()


Ask = Callable[..., Awaitable[list[dict[str, dict[str, Any]]]]]


def reporting(
    generate: Callable[[Any], AsyncIterator[Any]],
    params: Any,
    caller: Caller,
    *,
    ask: Ask,
    tokenizer: Callable[[], Any],
) -> AsyncIterator[Any]:
    """`generate(params)` as it is; when it has ended, what exits did in it is added to the caller's reports."""
    key = uuid4().hex
    params = params.clone()
    params.extra_args = {**params.extra_args, REPORT_KEY: key}

    async def outputs() -> AsyncIterator[Any]:
        token_ids: dict[int, list[int]] = {}
        before: list[int] = []
        async with aclosing(generate(params)) as found:  # type: ignore[type-var]
            async for output in found:
                before = before or (output.prompt_token_ids or [])[-CONTEXT_TOKENS:]
                for choice in output.outputs:
                    so_far = token_ids.setdefault(choice.index, [])
                    if params.output_kind is not RequestOutputKind.DELTA:
                        so_far.clear()
                    so_far.extend(choice.token_ids)
                yield output
        try:
            by_request = {
                name: report for answer in await ask("early_exit_report", key) for name, report in answer.items()
            }
            caller.reports += told(by_request, token_ids, lambda ids: texts_of(before, ids, tokenizer()))
        except Exception:  # the answer itself is whole
            logger.exception("No report of a request's exits")

    return outputs()


def told(
    by_request: dict[str, dict[str, Any]], token_ids: dict[int, list[int]], texts: Callable[[list[int]], list[str]]
) -> list[dict[str, Any]]:
    """What the client gets: one report for each of a request's answers.

    by_request: the engine's, by request id; with `n` above 1 these begin with the answer's index. token_ids: what was
    sent of each answer; a stop string can cut off tokens that the engine counted.
    """
    found = []
    for request_id, report in by_request.items():
        index = int(request_id.partition("_")[0]) if len(token_ids) > 1 else 0
        ids = token_ids.get(index, [])
        origins = report["origins"][: len(ids)]
        tokens = {origin.value: origins.count(origin.value) for origin in Origin}
        found.append(
            {
                "index": index,
                "tokens": tokens,
                "divergences": sum(tokens[origin] for origin in DIVERGED),
                "exits_by_depth": report["exits_by_depth"],
                "tpt_ms": report["tpt_ms"],
                "origins": origins,
                "texts": texts(ids),
            }
        )
    return sorted(found, key=lambda report: report["index"])


def texts_of(before: list[int], token_ids: list[int], tokenizer: Any) -> list[str]:
    """Of each token what it adds to the text; a character of several tokens comes with its last. before: tokens in
    front of them, which may decide on a space."""
    from vllm.tokenizers.detokenizer_utils import detokenize_incrementally

    texts: list[str] = []
    tokens: list[str] | None = None
    prefix, read = 0, 0
    all_ids = before + token_ids
    for end in range(len(before) + 1, len(all_ids) + 1):
        new, text, prefix, read = detokenize_incrementally(
            tokenizer, all_ids[:end], tokens, prefix, read, skip_special_tokens=True
        )
        tokens = new if tokens is None else tokens + new
        texts.append(text)
    return texts
