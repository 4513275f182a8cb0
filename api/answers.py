"""What an answer says of its own exits, and what a request's API key says of it.

vLLM's routes know nothing of either. A middleware around them notes whose key a request came with, and adds the reports
(`reports.py`) to the answer; `engine.generate`, which every route calls in the end, is where both meet the engine.
"""

import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypedDict

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apparate_llm.admin import digest_of
from apparate_llm.api.access import bearer_key
from apparate_llm.config import EarlyExitConfig
from apparate_llm.sse import Event, EventReader

FIELD = "early_exit"  # of an answer
# Types of the events that end a stream where `[DONE]` does not, and where in them the answer is: the routes of OpenAI's
# responses, of Anthropic's messages and of Cohere's chat.
ENDINGS = {
    "response.completed": "response",
    "response.incomplete": "response",
    "response.failed": "response",
    "message_stop": None,
    "message-end": None,
}
NAMES = ("id", "object", "created", "model", "request_id")  # of an answer, in every chunk of its stream


class ExitReport(TypedDict):
    """Of one choice of an answer, by its tokens."""

    tokens: dict[str, int]  # by origin
    divergences: int
    divergences_at_worst: int  # released exits without a verdict are among them
    exits_by_depth: dict[int, int]
    tpt_ms: float | None
    origins: list[str]  # of each token
    texts: list[str]  # what each adds to the choice's text


class ChoiceReport(ExitReport):
    index: int  # of the choice in its answer


@dataclass(slots=True)
class Caller:
    """One HTTP request."""

    key_tenant: str | None = None  # of its API key
    options: dict[str, object] = field(default_factory=dict)  # ours, out of its body; not all routes pass them on
    wants_report: bool = False
    num_prompts: int = 0  # given to the engine with a wish for a report
    reports: list[ChoiceReport] = field(default_factory=list)  # one for each of its choices, once they ended

    def ordered_reports(self) -> list[ChoiceReport]:
        """The reports, in the order of the choices."""
        return sorted(self.reports, key=lambda report: report["index"])


CALLER: ContextVar[Caller | None] = ContextVar("early_exit_caller", default=None)


def tenants_by_key(config: EarlyExitConfig) -> dict[str, str]:
    """Digest of an API key -> tenant."""
    return {digest: name for name, own in config.tenants.items() for digest in own.api_keys_sha256}


class AnswerMiddleware:
    """Around vLLM's routes. `app.state.early_exit` is None where the server runs without exits."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = getattr(scope["app"].state, "early_exit", None) if scope["type"] == "http" else None
        if server is None or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        caller = Caller()
        if server.tenants_by_key:
            caller.key_tenant = server.tenants_by_key.get(digest_of(bearer_key(Headers(scope=scope))))
        token = CALLER.set(caller)
        try:
            await self.app(scope, receive, Answer(caller, send))
        finally:
            CALLER.reset(token)


class Answer:
    """Sends a response on; puts the reports into it where they are asked for."""

    def __init__(self, caller: Caller, send: Callable[[Message], Awaitable[None]]) -> None:
        self._caller = caller
        self._send = send
        self._start: Message | None = None  # of an object, kept back: its content-length changes
        self._body: list[bytes] = []
        self._stream: ReportedStream | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._caller.wants_report and message["status"] == 200:
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if kind.startswith("application/json"):
                self._start = message
                return
            if kind.startswith("text/event-stream"):
                self._stream = ReportedStream(self._caller)
        elif message["type"] == "http.response.body" and self._start is not None:
            await self._send_object(self._start, message)
            return
        elif message["type"] == "http.response.body" and self._stream is not None:
            is_last = not message.get("more_body", False)
            message = {**message, "body": self._stream.passed_on(message.get("body", b""), is_last=is_last)}
        await self._send(message)

    async def _send_object(self, start: Message, message: Message) -> None:
        self._body.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = b"".join(self._body)
        if reports := self._caller.ordered_reports():
            body = with_field(body, reports)
            kept = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            start = {**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
        self._start = None
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def with_field(body: bytes, reports: list[ChoiceReport]) -> bytes:
    """A JSON object with one field more; the rest of it stays as the route wrote it, byte for byte."""
    front, brace, _ = body.rpartition(b"}")
    assert brace, f"not a JSON object: {body[:100]!r}"
    comma = b"" if front.rstrip().endswith(b"{") else b","
    return b"%s%s%s:%s}" % (front, comma, json.dumps(FIELD).encode(), as_json(reports).encode())


def as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class ReportedStream:
    """The events of one answer as they come, the reports put in at their end."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._reader = EventReader()
        self._last = ""  # data of the last chunk
        self._is_reported = False

    def passed_on(self, body: bytes, *, is_last: bool) -> bytes:
        events = self._reader.feed(body)
        if is_last:
            events += self._reader.end()
        passed = [self._with_reports(event) for event in events]
        if is_last and not self._is_reported and (reports := self._caller.ordered_reports()):
            passed.append(f"event: {FIELD}\ndata: {as_json({FIELD: reports})}\n\n".encode())  # a stream of another kind
        return b"".join(passed)

    def _with_reports(self, event: Event) -> bytes:
        data = event.data
        if data is None or self._is_reported:
            return event.raw
        if data == "[DONE]":
            if reports := self._caller.ordered_reports():
                self._is_reported = True
                return report_event(self._last, reports) + event.raw
        elif data.startswith("{"):
            self._last = data
            if any(f'"{ending}"' in data for ending in ENDINGS):
                return self._ending(event, data)
        return event.raw

    def _ending(self, event: Event, data: str) -> bytes:
        ending = json.loads(data)
        if ending.get("type") not in ENDINGS or not (reports := self._caller.ordered_reports()):
            return event.raw
        self._is_reported = True
        part = ENDINGS[ending["type"]]
        (ending if part is None else ending[part])[FIELD] = reports
        name = f"event: {event.name}\n" if event.name else ""
        return f"{name}data: {as_json(ending)}\n\n".encode()


def report_event(last: str, reports: list[ChoiceReport]) -> bytes:
    """The event before the end of a stream, in the form of a chunk without choices, as vLLM's usage is. last: data of
    the chunk before it."""
    chunk = json.loads(last) if last else {}
    named = {name: chunk[name] for name in NAMES if name in chunk}
    return f"data: {as_json({**named, 'choices': [], FIELD: reports})}\n\n".encode()
