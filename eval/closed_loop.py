"""Clients in a closed loop, of servers that are frozen in turn: what both kinds of `eval steady` count by."""

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from apparate_llm.eval.client import FAILED_WAIT_S, GREEDY, TIMEOUT_S, Completion, PlannedRequest, Sampling, complete
from apparate_llm.eval.intervals import Interval, log_mean_interval, ratio_interval
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.servers import Server
from apparate_llm.eval.workloads import lengths_of

MOST_FAILURES = 5  # of a client, one after the other, after which all of them give up
MOST_ERRORS = 3
SAME_STEP_S = 0.002  # chunks of one step come within
STEP_METRICS = ("vllm:iteration_tokens_total_count", "vllm:iteration_tokens_total_sum", "vllm:generation_tokens_total")


class Turn(NamedTuple):
    """Of one server, on the monotonic clock."""

    began_s: float
    ended_s: float
    counted: bool


class Steps(NamedTuple):
    """Of a server's engine since its start."""

    number: int
    computed_tokens: int  # of prompts, and generated
    generated_tokens: int


def engine_steps(server: Server) -> Steps | None:
    """None where the server does not count them as vLLM does."""
    totals = dict.fromkeys(STEP_METRICS, 0.0)
    answer = httpx.get(f"{server.base_url}/metrics", headers=server.headers, timeout=30.0)
    if answer.status_code in (httpx.codes.NOT_FOUND, httpx.codes.NOT_IMPLEMENTED):
        return None
    for family in text_string_to_metric_families(answer.raise_for_status().text):
        for sample in family.samples:
            if sample.name in totals:
                totals[sample.name] += sample.value
    return Steps(*map(int, totals.values())) if totals[STEP_METRICS[0]] else None


@dataclass
class Turns:
    """When a server was running."""

    turns: list[Turn] = field(default_factory=list)

    def active_s(self, at_s: float) -> float:
        """For how long it had been running at a moment."""
        return sum(max(0.0, min(at_s, turn.ended_s) - turn.began_s) for turn in self.turns)


@dataclass
class Clients:
    """Those of one server: each asks again as soon as it has its answer. Output lengths vary, lest clients be
    synchronised."""

    server: Server
    prompts: list[Prompt]
    number: int
    max_tokens: int
    sampling: Sampling = GREEDY
    done: list[Completion] = field(default_factory=list)
    turns: Turns = field(default_factory=Turns)
    steps: list[Steps] = field(default_factory=list)  # of the engine, in each turn that counts
    problem: str | None = None  # why they gave up
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Asks the server, which must be running."""
        self._model = self.server.model_name()
        self._lengths = lengths_of(len(self.prompts), self.max_tokens, "varied", seed=0)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask()), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Ask no more. What is under way is answered, by a server that is running from here on."""
        self._ended.set()
        self.server.resume()

    def join(self) -> None:
        """Raises RuntimeError if the clients gave up."""
        if self._thread.ident is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        if self.problem is not None:
            raise RuntimeError(
                f"{self.server.system.name}: {MOST_FAILURES} requests of a client failed one after the other, at last: "
                f"{self.problem}; its log: {self.server.log}"
            )

    async def _ask(self) -> None:
        limits, url = httpx.Limits(max_connections=self.number), self.server.base_url
        async with httpx.AsyncClient(
            base_url=url, headers=self.server.headers, timeout=httpx.Timeout(TIMEOUT_S), limits=limits
        ) as http:
            await asyncio.gather(*(self._client(http, first) for first in range(self.number)))

    async def _client(self, http: httpx.AsyncClient, index: int) -> None:
        num_failed = 0
        while not self._ended.is_set() and self.problem is None:
            index %= len(self.prompts)
            ask = PlannedRequest(index, self._lengths[index])
            messages = self.prompts[index].messages
            fields = self.server.fields(ask, self.sampling)
            done = await complete(http, self._model, messages, ask, fixed_length=False, began=0.0, fields=fields)
            self.done.append(done)
            index += self.number
            num_failed = num_failed + 1 if done.error else 0
            if num_failed == MOST_FAILURES:
                self.problem = done.error
            elif num_failed:
                await asyncio.sleep(FAILED_WAIT_S)

    def run(self, seconds: float, *, counted: bool) -> None:
        """One turn of the server. Raises RuntimeError where it has stopped answering."""
        self.check()
        self.server.resume()
        began = time.monotonic()
        before = engine_steps(self.server)
        time.sleep(seconds)
        after = engine_steps(self.server)
        self.server.pause()
        self.turns.turns.append(Turn(began, time.monotonic(), counted))
        if counted and before is not None and after is not None:
            self.steps.append(Steps(*(new - old for new, old in zip(after, before, strict=True))))

    def arrivals(self) -> list[list[tuple[float, int]]]:
        """Of each answer: when it had how many tokens."""
        return [[(done.started_s + chunk.at_s, chunk.tokens or 0) for chunk in done.chunks] for done in self.done]

    @property
    def num_failed(self) -> int:
        return sum(bool(done.error) for done in self.done)

    @property
    def errors(self) -> list[str]:
        """What failed requests said, each once, a few."""
        return list(dict.fromkeys(done.error for done in self.done if done.error))[:MOST_ERRORS]


def in_window(arrivals: list[list[tuple[float, int]]], began_s: float, ended_s: float) -> tuple[float, int]:
    """(ms per token, tokens) between two moments, over all answers."""
    seconds, after_first, tokens = 0.0, 0, 0
    for answer in arrivals:
        before = max((number for at_s, number in answer if at_s < began_s), default=0)
        inside = [(at_s, number) for at_s, number in answer if began_s <= at_s < ended_s]
        if inside:
            seconds += inside[-1][0] - inside[0][0]
            after_first += inside[-1][1] - inside[0][1]
            tokens += inside[-1][1] - before
    return (seconds * 1e3 / after_first if after_first else float("nan")), tokens


class RatioOfTurns(TypedDict):
    ratio: float
    ci95: Interval | None


def ratio_of(values: list[float], others: list[float]) -> RatioOfTurns:
    """Geometric mean of the ratios of pairs, with its 95 % interval, None of too few; a turn without tokens has none.
    Raises ValueError where no pair is left."""
    logs = np.log([values, others])
    logs = logs[:, np.isfinite(logs).all(0)]
    if not logs.size:
        raise ValueError("no answer had two tokens in a turn: give longer turns")
    apart = logs[0] - logs[1]
    return {"ratio": float(np.exp(apart.mean())), "ci95": log_mean_interval(apart)}


def throughput_ratio(rates: list[float], others: list[float]) -> tuple[float, Interval | None]:
    """Of the means of tokens per second over turns, with its 95 % interval, None of too few."""
    ours, theirs = ({(0, turn): (rate, 1.0) for turn, rate in enumerate(own)} for own in (rates, others))
    ratio = sum(rates) / sum(others) if any(others) else float("inf")
    return ratio, ratio_interval(ours, theirs)
