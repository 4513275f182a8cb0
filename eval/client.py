"""Streams chat completions from an OpenAI-compatible server and keeps the raw timestamps."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
from apparate_llm.eval.prompts import Messages


@dataclass(slots=True)
class Completion:
    """One request as its client saw it. Times are seconds on the monotonic clock."""

    prompt_index: int
    started_s: float
    chunk_times_s: list[float] = field(default_factory=list)  # of chunks that carried text or ended the answer
    text: str = ""
    output_tokens: int | None = None  # from the server's usage
    error: str | None = None

    @property
    def ttft_ms(self) -> float | None:
        return (self.chunk_times_s[0] - self.started_s) * 1e3 if self.chunk_times_s and not self.error else None

    @property
    def tpt_ms(self) -> float | None:
        """(last token - first token) / (tokens - 1); None for answers of fewer than two tokens."""
        if self.error or not self.output_tokens or self.output_tokens < 2 or len(self.chunk_times_s) < 2:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) * 1e3 / (self.output_tokens - 1)


async def complete(
    client: httpx.AsyncClient, model: str, messages: Messages, *, prompt_index: int, max_tokens: int
) -> Completion:
    """Ask for one greedy answer; a failure is recorded, not raised."""
    body = {
        "model": model,
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    result = Completion(prompt_index=prompt_index, started_s=time.monotonic())
    finished = False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                detail = (await response.aread()).decode(errors="replace")
                result.error = f"HTTP {response.status_code}: {detail[:200]}"
                return result
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    finished = True
                    break
                now = time.monotonic()
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    result.error = f"error in stream: {chunk['error']}"
                    return result
                if chunk.get("usage"):
                    result.output_tokens = chunk["usage"]["completion_tokens"]
                for choice in chunk.get("choices", ()):
                    text = choice["delta"].get("content")
                    # The role chunk comes before any token is computed; an empty text with a finish reason is a token.
                    if text or choice.get("finish_reason"):
                        result.text += text or ""
                        result.chunk_times_s.append(now)
    except (httpx.HTTPError, json.JSONDecodeError, KeyError) as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    if not finished or result.output_tokens is None:
        result.error = "the stream ended early"
    return result


async def closed_loop(
    base_url: str,
    model: str,
    prompts: list[Messages],
    *,
    concurrency: int,
    max_tokens: int,
    on_done: Callable[[Completion], None],
    first_index: int = 0,
) -> tuple[list[Completion], float]:
    """All prompts, `concurrency` at a time; returns the completions and the wall time in seconds.

    `first_index` is the number of the first prompt in the whole set, when `prompts` is a part of it."""
    queue = list(enumerate(prompts, first_index))[::-1]
    done: list[Completion] = []
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=base_url, timeout=httpx.Timeout(600.0), limits=limits) as client:

        async def worker() -> None:
            while queue:
                index, messages = queue.pop()
                completion = await complete(client, model, messages, prompt_index=index, max_tokens=max_tokens)
                done.append(completion)
                on_done(completion)

        began = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return done, time.monotonic() - began
