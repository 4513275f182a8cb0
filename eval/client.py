"""Streams chat completions from an OpenAI-compatible server and keeps the raw timestamps."""

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx

from apparate_llm.eval.prompts import Messages
from apparate_llm.sse import event_data_async

TIMEOUT_S = 600.0
FAILED_WAIT_S = 0.5  # before a client whose request failed asks again
# Of a request: the network's, and those of reading what is no chunk, or sending what no JSON holds.
FAILURES = (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError)

Fields = Mapping[str, bool | int | float | str]  # of a request, besides those that all servers get


class PlannedRequest(NamedTuple):
    """One request of a workload."""

    prompt_index: int
    max_tokens: int
    at_s: float | None = None  # arrival after the block's start; None: as soon as a client is free

    @property
    def arrival_s(self) -> float:
        assert self.at_s is not None, f"no arrival time: {self}"
        return self.at_s


class Sampling(NamedTuple):
    """How answers are drawn."""

    temperature: float = 0.0  # 0: greedy
    seed: int | None = None  # of the first prompt; each prompt has its own. None: the server's

    def fields(self, ask: PlannedRequest) -> Fields:
        seed = {} if self.seed is None else {"seed": self.seed + ask.prompt_index}
        return {"temperature": self.temperature, **seed}


GREEDY = Sampling()


class Uncounted(NamedTuple):
    """What is asked around a block's requests and does not count, so that they meet a server at work."""

    lead_in: tuple[PlannedRequest, ...] = ()  # of each client but the first, or arrivals: before those that count
    run_out: tuple[PlannedRequest, ...] = ()  # again and again, until the last of those that count has ended
    period_s: float | None = None  # after which arrivals come again; None: clients ask as soon as they are free


NOTHING_ELSE = Uncounted()


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
    prompt_tokens: int | None = None  # from the server's usage, chat template included

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

    def tokens_until(self, at_s: float) -> int:
        """Received by a moment after the block's start; where the server does not say how many, a chunk is a token."""
        received = [chunk for chunk in self.chunks if self.started_s + chunk.at_s <= at_s]
        if not received:
            return 0
        return received[-1].tokens if received[-1].tokens is not None else len(received)

    def tokens_before(self, character: int) -> int | None:
        """Tokens received before the chunk that brought this character."""
        before: int | None = 0
        for chunk in self.chunks:
            if chunk.characters > character:
                return before
            before = chunk.tokens
        return before

    def as_record(self) -> dict[str, object]:
        return {**asdict(self), "chunks": [[round(at_s, 6), *rest] for at_s, *rest in self.chunks]}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Completion":
        return cls(**{**record, "chunks": [Chunk(*chunk) for chunk in record["chunks"]]})


async def complete(
    client: httpx.AsyncClient,
    model: str,
    messages: Messages,
    ask: PlannedRequest,
    *,
    fixed_length: bool,
    began: float,
    fields: Fields = MappingProxyType({}),
    on_begun: Callable[[Completion], None] = lambda begun: None,
) -> Completion:
    """Ask for one answer, greedy if the fields do not say otherwise; a failure is recorded, not raised. began: the
    block's, on the event loop's clock. on_begun: gets the completion before it is complete, which it may never be."""
    clock = asyncio.get_running_loop().time
    body = {"model": model, "messages": messages, **_common_fields(ask, fixed_length), **fields}
    sent = clock()
    result = Completion(prompt_index=ask.prompt_index, started_s=sent - began)
    on_begun(result)
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
    except FAILURES as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    if not finished or result.output_tokens is None:
        result.error = "the stream ended early"
    return result


def _common_fields(ask: PlannedRequest, fixed_length: bool) -> dict[str, object]:
    """That all servers get."""
    common = {
        "temperature": GREEDY.temperature,
        "max_tokens": ask.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    return common | {"ignore_eos": True} if fixed_length else common


def _take(result: Completion, chunk: dict[str, Any], at_s: float) -> None:
    if "error" in chunk:
        result.error = f"error in stream: {chunk['error']}"
        return
    if usage := chunk.get("usage"):
        result.output_tokens, result.prompt_tokens = usage["completion_tokens"], usage.get("prompt_tokens")
    choices = chunk.get("choices") or ()
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    result.text += text
    tokens, counted = _tokens_so_far(chunk), result.chunks[-1].tokens if result.chunks else None
    if tokens is not None:
        # The role chunk comes before any token. A last count may come without a choice, of a token without text: but
        # not where it is the only one there is.
        has_token = tokens > (counted or 0) and (bool(choices) or counted is not None)
    else:
        # A token may have no text yet, and the last one none at all. Of a server that counts, the next count tells.
        has_token = counted is None and any(text or choice.get("finish_reason") for choice in choices)
    if has_token:
        result.chunks.append(Chunk(at_s, tokens, len(result.text)))
    elif text and result.chunks:  # of tokens that were counted just before
        result.chunks[-1] = result.chunks[-1]._replace(characters=len(result.text))


def _tokens_so_far(chunk: dict[str, Any]) -> int | None:
    """What vLLM has in every chunk's usage, and llama.cpp in its timings; None where the chunk does not say."""
    usage, timings = chunk.get("usage") or {}, chunk.get("timings") or {}
    tokens: int | None = usage.get("completion_tokens", timings.get("predicted_n"))
    return tokens


class Asked(NamedTuple):
    """What came of a block."""

    completions: list[Completion]  # that count, as they ended
    wall_s: float  # from the first of these to the end of the last
    uncounted: list[Completion]  # as far as they came


async def run_block(
    base_url: str,
    model: str,
    prompts: list[Messages],
    asks: Sequence[PlannedRequest],
    *,
    concurrency: int | None,
    uncounted: Uncounted = NOTHING_ELSE,
    fixed_length: bool = False,
    on_done: Callable[[Completion], None] = lambda done: None,
    headers: dict[str, str] | None = None,
    fields_of: Callable[[PlannedRequest], Fields] = lambda ask: MappingProxyType({}),
    transport: httpx.AsyncBaseTransport | None = None,
) -> Asked:
    """All of `asks`: as many at a time as `concurrency`, or each at its own time if that is None. on_done: of each that
    counts. headers: of every request. fields_of: a request's own. transport: instead of a network's."""
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=base_url, headers=headers, timeout=httpx.Timeout(TIMEOUT_S), limits=limits, transport=transport
    ) as http:
        block = _Block(http, model, prompts, asks, fixed_length, on_done, fields_of)
        if concurrency is None:
            return await block.run([block.arrivals(uncounted)])
        run_out = itertools.cycle(uncounted.run_out)
        leads = itertools.chain([None], uncounted.lead_in, itertools.repeat(None))
        return await block.run([block.client(lead, run_out) for lead in itertools.islice(leads, concurrency)])


@dataclass
class _Block:
    """One block under way."""

    http: httpx.AsyncClient
    model: str
    prompts: list[Messages]
    asks: Sequence[PlannedRequest]
    fixed_length: bool
    on_done: Callable[[Completion], None]
    fields_of: Callable[[PlannedRequest], Fields]
    completions: list[Completion] = field(default_factory=list)
    uncounted: list[Completion] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)  # nothing that counts is left

    def __post_init__(self) -> None:
        self.queue = list(self.asks)
        self.clock = asyncio.get_running_loop().time
        self.began = self.ended = self.clock()

    async def run(self, work: list[Coroutine[Any, Any, None]]) -> Asked:
        """Until all that counts has ended; what else is under way is cancelled then."""
        if not self.asks:
            self.over.set()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in work]
            await self.over.wait()
            for task in tasks:
                task.cancel()
        first_s = min((done.started_s for done in self.completions), default=0.0)
        return Asked(self.completions, self.ended - self.began - first_s, self.uncounted)

    async def client(self, lead_in: PlannedRequest | None, run_out: Iterator[PlannedRequest]) -> None:
        if lead_in is not None:
            await self._uncounted(lead_in)
        while self.queue:
            await self._counted(self.queue.pop(0))
        for ask in run_out:
            if self.over.is_set():
                return
            await self._uncounted(ask)

    async def arrivals(self, around: Uncounted) -> None:
        async with asyncio.TaskGroup() as group:
            for at_s, ask, counts in self._in_time(around):
                await asyncio.sleep(self.began + at_s - self.clock())
                group.create_task(self._counted(ask) if counts else self._uncounted(ask))

    def _in_time(self, around: Uncounted) -> Iterator[tuple[float, PlannedRequest, bool]]:
        """(when after the block's start, request, whether it counts), in order."""
        for ask in around.lead_in:
            yield ask.arrival_s, ask, False
        for ask in self.asks:
            yield ask.arrival_s, ask, True
        if around.run_out and around.period_s is not None:
            for number in itertools.count(1):
                for ask in around.run_out:
                    yield ask.arrival_s + number * around.period_s, ask, False

    async def _counted(self, ask: PlannedRequest) -> None:
        done = await self._complete(ask)
        self.completions.append(done)
        self.ended = self.clock()
        self.on_done(done)
        if len(self.completions) == len(self.asks):
            self.over.set()

    async def _uncounted(self, ask: PlannedRequest) -> None:
        if (await self._complete(ask, self.uncounted.append)).error:
            await asyncio.sleep(FAILED_WAIT_S)

    async def _complete(
        self, ask: PlannedRequest, on_begun: Callable[[Completion], None] = lambda begun: None
    ) -> Completion:
        return await complete(
            self.http,
            self.model,
            self.prompts[ask.prompt_index],
            ask,
            fixed_length=self.fixed_length,
            began=self.began,
            fields=self.fields_of(ask),
            on_begun=on_begun,
        )
