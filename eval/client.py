"""Streams chat completions from an OpenAI-compatible server and keeps the raw timestamps."""

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import httpx

from apparate_llm.eval.prompts import Messages
from apparate_llm.sse import event_data_async

TIMEOUT_S = 600.0


class PlannedRequest(NamedTuple):
    """One request of a workload."""

    prompt_index: int
    max_tokens: int
    at_s: float | None = None  # arrival after the block's start; None: as soon as a client is free


class Chunk(NamedTuple):
    """One piece of a stream that carried a token."""

    at_s: float  # after the request was sent
    tokens: int | None  # received so far, this chunk's included; None where the server does not say
    characters: int  # of text so far


@dataclass(slots=True)
class Completion:
    """One request as its client saw it."""

    prompt_index: int
    started_s: float  # after the block's start
    chunks: list[Chunk] = field(default_factory=list)
    text: str = ""
    output_tokens: int | None = None  # from the server's usage
    error: str | None = None

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token."""
        return self.chunks[0].at_s * 1e3 if self.chunks and not self.error else None

    @property
    def tpt_ms(self) -> float | None:
        """(last token - first token) / (tokens - 1); None for answers of fewer than two tokens."""
        if self.error or not self.output_tokens or self.output_tokens < 2 or len(self.chunks) < 2:
            return None
        return (self.chunks[-1].at_s - self.chunks[0].at_s) * 1e3 / (self.output_tokens - 1)

    @property
    def e2e_ms(self) -> float | None:
        """From the request to its last token."""
        return self.chunks[-1].at_s * 1e3 if self.chunks and not self.error else None

    @property
    def gaps_ms(self) -> list[float]:
        """Between the chunks that carried tokens."""
        if self.error:
            return []
        return [(b.at_s - a.at_s) * 1e3 for a, b in zip(self.chunks, self.chunks[1:], strict=False)]

    def tokens_before(self, character: int) -> int | None:
        """Tokens received before the chunk that brought this character."""
        before: int | None = 0
        for chunk in self.chunks:
            if chunk.characters > character:
                return before
            before = chunk.tokens
        return before

    def as_record(self) -> dict[str, Any]:
        return {**asdict(self), "chunks": [[round(at_s, 6), *rest] for at_s, *rest in self.chunks]}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Completion":
        return cls(**{**record, "chunks": [Chunk(*chunk) for chunk in record["chunks"]]})


async def complete(
    client: httpx.AsyncClient, model: str, messages: Messages, ask: PlannedRequest, *, fixed_length: bool, began: float
) -> Completion:
    """Ask for one greedy answer; a failure is recorded, not raised. began: the block's, on the event loop's clock."""
    clock = asyncio.get_running_loop().time
    body = {
        "model": model,
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": ask.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if fixed_length:
        body["ignore_eos"] = True
    sent = clock()
    result = Completion(prompt_index=ask.prompt_index, started_s=sent - began)
    finished = False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                detail = (await response.aread()).decode(errors="replace")
                result.error = f"HTTP {response.status_code}: {detail[:200]}"
                return result
            async with aclosing(event_data_async(response.aiter_bytes())) as chunks:
                async for chunk in chunks:
                    if chunk == "[DONE]":
                        finished = True
                        break
                    _take(result, json.loads(chunk), clock() - sent)
                    if result.error:
                        return result
    except (httpx.HTTPError, json.JSONDecodeError, KeyError) as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    if not finished or result.output_tokens is None:
        result.error = "the stream ended early"
    return result


def _take(result: Completion, chunk: dict[str, Any], at_s: float) -> None:
    if "error" in chunk:
        result.error = f"error in stream: {chunk['error']}"
        return
    before = result.output_tokens or 0
    usage = chunk.get("usage")
    if usage:
        result.output_tokens = usage["completion_tokens"]
    for choice in chunk.get("choices", ()):
        text = choice["delta"].get("content") or ""
        result.text += text
        # The role chunk comes before any token. A token may have no text yet, and the last one none at all.
        has_token = usage["completion_tokens"] > before if usage else bool(text or choice.get("finish_reason"))
        if has_token:
            tokens = usage["completion_tokens"] if usage else None
            result.chunks.append(Chunk(at_s, tokens, len(result.text)))


async def run_block(
    base_url: str,
    model: str,
    prompts: list[Messages],
    asks: list[PlannedRequest],
    *,
    concurrency: int | None,
    fixed_length: bool = False,
    on_done: Callable[[Completion], None] = lambda done: None,
    headers: dict[str, str] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> tuple[list[Completion], float]:
    """All of `asks`: as many at a time as `concurrency`, or each at its own time if that is None. Returns the
    completions and the wall time in seconds. headers: of every request. transport: instead of a network's."""
    done: list[Completion] = []
    clock, timeout = asyncio.get_running_loop().time, httpx.Timeout(TIMEOUT_S)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=base_url, headers=headers, timeout=timeout, limits=limits, transport=transport
    ) as client:
        began = clock()

        async def serve(ask: PlannedRequest) -> None:
            messages = prompts[ask.prompt_index]
            completion = await complete(client, model, messages, ask, fixed_length=fixed_length, began=began)
            done.append(completion)
            on_done(completion)

        async def client_of(queue: list[PlannedRequest]) -> None:
            while queue:
                await serve(queue.pop(0))

        async def arrive(ask: PlannedRequest) -> None:
            assert ask.at_s is not None, f"no arrival time: {ask}"
            await asyncio.sleep(began + ask.at_s - clock())
            await serve(ask)

        if concurrency is None:
            await asyncio.gather(*(arrive(ask) for ask in asks))
        else:
            queue = list(asks)
            await asyncio.gather(*(client_of(queue) for _ in range(concurrency)))
        return done, clock() - began
