"""One evaluation: servers started and warmed, loads measured with the systems interleaved, everything kept on disk."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from apparate_llm.eval.client import (
    GREEDY,
    NOTHING_ELSE,
    Asked,
    Completion,
    PlannedRequest,
    Sampling,
    Uncounted,
    run_block,
)
from apparate_llm.eval.host_noise import energy_j, probe_ms, processor_times, stolen_frac
from apparate_llm.eval.prompts import NUM_HELD_OUT, Messages, Prompt, held_out
from apparate_llm.eval.servers import Server
from apparate_llm.eval.store import Block, BlockKey, Store
from apparate_llm.eval.systems import BASELINE, System
from apparate_llm.eval.workloads import Load
from apparate_llm.progress import Progress, Stage

WARM_UP = (2, 32)  # prompts at once, tokens
WAKING_TOKENS = 8
LEAVING_S = 0.2  # after which a server has heard that what was under way is cancelled


@dataclass(slots=True)
class Evaluation:
    model: Path
    systems: list[System]
    prompts: list[Prompt]
    loads: list[Load]
    repeat: int
    store: Store
    start_timeout_s: float
    sampling: Sampling = GREEDY
    baseline: str = BASELINE  # without which there is nothing to measure
    dead: dict[str, str] = field(default_factory=dict)  # system -> why it is not measured (any more)
    enough: Callable[[int], bool] = lambda load: False  # whether the load of this number needs no further repeat
    repeats: dict[int, int] = field(default_factory=dict)  # load -> repeats, where they were enough
    messages: list[Messages] = field(init=False)  # of the prompts, and of the held-out ones behind them

    def __post_init__(self) -> None:
        self.messages = [prompt.messages for prompt in (*self.prompts, *held_out(self.prompts))]

    def warming(self, number: int, max_tokens: int) -> list[PlannedRequest]:
        """Requests for held-out prompts."""
        return [PlannedRequest(len(self.prompts) + i % NUM_HELD_OUT, max_tokens) for i in range(number)]

    def keys(self, system: System) -> Iterator[tuple[BlockKey, Load, tuple[PlannedRequest, ...]]]:
        for number, load in enumerate(self.loads):
            if is_served(system, load):
                for repeat in range(self.repeats.get(number, self.repeat)):
                    for block, asks in enumerate(load.blocks):
                        yield BlockKey(number, repeat, block, system.name), load, asks

    def is_done(self, system: System) -> bool:
        return all(self.store.has(key) for key, *_ in self.keys(system))

    def settle(self) -> None:
        """Know which loads an earlier start has measured often enough; one that began another repeat had not."""
        for load in range(len(self.loads)):
            unfinished = (repeat for repeat in range(self.repeat) if not all(self._has(load, repeat)))
            repeats = next(unfinished, self.repeat)
            if 0 < repeats < self.repeat and not any(self._has(load, repeats)) and self.enough(load):
                self.repeats[load] = repeats

    def _has(self, load: int, repeat: int) -> list[bool]:
        """Whether each block of a repeat is there, of all systems that can be measured."""
        systems = [one for one in self.systems if one.problem is None and is_served(one, self.loads[load])]
        blocks = range(len(self.loads[load].blocks))
        return [self.store.has(BlockKey(load, repeat, block, one.name)) for one in systems for block in blocks]


def is_served(system: System, load: Load) -> bool:
    """Whether the system is measured under a load: one that takes a request at a time says nothing about more."""
    return system.max_concurrency is None or load.concurrency == system.max_concurrency


def evaluate(evaluation: Evaluation, progress: Progress) -> None:
    """Fills `evaluation.store`; raises RuntimeError if the baseline cannot run."""
    evaluation.settle()
    with ExitStack() as stack:
        servers = _start(evaluation, stack, progress)
        total, done = _requests(evaluation, servers)
        with progress.stage("measure", total=total, unit="requests") as stage:
            stage.update(done)
            for number, load in enumerate(evaluation.loads):
                taking_part = [server for server in servers if is_served(server.system, load)]
                if number not in evaluation.repeats:
                    _measure(evaluation, number, load, taking_part, progress, stage)


def _requests(evaluation: Evaluation, servers: list[Server]) -> tuple[int, int]:
    """How many there are in all, those that nobody will answer any more left out, and how many are measured."""
    total = done = 0
    for server in servers:
        for key, _, asks in evaluation.keys(server.system):
            measured = evaluation.store.has(key)
            total += len(asks) * (measured or server.system.name not in evaluation.dead)
            done += len(asks) * measured
    return total, done


def _start(evaluation: Evaluation, stack: ExitStack, progress: Progress) -> list[Server]:
    """Start what still has something to measure, one after another: starting two at once would take vLLM's memory
    check by surprise."""
    servers = []
    for system in evaluation.systems:
        if system.problem is not None:
            progress.say(f"skipped {system.name}: {system.problem}")
            evaluation.dead[system.name] = system.problem
            continue
        if evaluation.is_done(system):
            continue
        log = evaluation.store.logs / f"{system.name.replace(' ', '-')}.log"
        server = stack.enter_context(Server(system, log=log, start_timeout_s=evaluation.start_timeout_s))
        try:
            with progress.stage(f"start {system.name}", total=math.inf, facts=f"log {log}"):
                server.wait_ready()
                _ask(server, evaluation, evaluation.warming(*WARM_UP), WARM_UP[0])
        except (RuntimeError, httpx.HTTPError) as error:
            if system.name == evaluation.baseline:
                raise RuntimeError(f"the baseline does not run: {error}") from None
            progress.say(f"skipped {system.name}: {error}")
            evaluation.dead[system.name] = str(error)
            server.__exit__()
            continue
        server.pause()
        servers.append(server)
    return servers


def _measure(
    evaluation: Evaluation, number: int, load: Load, servers: list[Server], progress: Progress, stage: Stage
) -> None:
    """The systems are interleaved block by block (A B, B A, A B, ...), so a machine that is slower for some minutes is
    slower for all. The waiting ones are off the processors; the first request after that is not counted, as nobody
    freezes a server in use. A closed loop begins with further ones that are not counted, for prompts held out."""
    settled: set[str] = set()
    order = list(servers)
    for repeat in range(evaluation.repeat):
        is_new = False
        for block, asks in enumerate(load.blocks):
            for server in order:
                name = server.system.name
                key = BlockKey(number, repeat, block, name)
                if evaluation.store.has(key) or name in evaluation.dead:
                    continue
                before = stage.done
                stage.update(before, f"{name}, {load.name}, pass {repeat + 1} of {evaluation.repeat}")
                try:
                    with _running(server):
                        if name not in settled and load.concurrency is not None:
                            longest = max(ask.max_tokens for ask in asks)
                            settling = evaluation.warming(max(2, load.concurrency), longest)
                            _ask(server, evaluation, settling, load.concurrency)
                        settled.add(name)
                        measured = _measure_block(server, evaluation, key, load, asks, stage)
                except (httpx.HTTPError, RuntimeError) as error:
                    evaluation.dead[name] = f"stopped answering under {load.name}: {error}"
                    progress.say(f"{name} {evaluation.dead[name]}")
                    stage.total, _ = _requests(evaluation, servers)
                    stage.update(before)
                    continue
                evaluation.store.add(measured)
                is_new = True
                stage.update(before + len(asks), stage.facts)
            order.reverse()
        if is_new and evaluation.enough(number):
            evaluation.repeats[number] = repeat + 1
            stage.total, _ = _requests(evaluation, servers)
            break


def _measure_block(
    server: Server,
    evaluation: Evaluation,
    key: BlockKey,
    load: Load,
    asks: tuple[PlannedRequest, ...],
    stage: Stage,
) -> Block:
    probe = probe_ms()
    counts, usage = server.counts(), server.usage()
    energy, processors = energy_j(), processor_times()
    began_s = time.time()

    def on_done(completion: Completion) -> None:
        stage.update(stage.done + 1, stage.facts)

    around = load.uncounted[key.block] if load.uncounted else NOTHING_ELSE
    asked = _ask(server, evaluation, asks, load.concurrency, load.fixed_length, around, on_done)
    if asked.uncounted:
        time.sleep(LEAVING_S)
    energy_after, stolen = energy_j(), stolen_frac(processors, processor_times())
    if server.process is not None and server.process.poll() is not None:
        raise RuntimeError(f"ended with exit code {server.process.returncode}; its log: {server.log}")
    after, usage_after = server.counts(), server.usage()
    return Block(
        key=key,
        completions=asked.completions,
        uncounted=asked.uncounted,
        wall_s=asked.wall_s,
        counts=None if counts is None or after is None else difference(counts, after),
        cpu_s=None if usage is None or usage_after is None else usage_after.cpu_s - usage.cpu_s,
        # A counter that ran over between the two says nothing.
        energy_j=None if energy is None or energy_after is None or energy_after < energy else energy_after - energy,
        peak_memory_gib=None if usage_after is None else usage_after.peak_memory_gib,
        probe_ms=probe,
        stolen_frac=stolen,
        began_s=began_s,
    )


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was counted in between; shares, which have no difference, are left out."""
    changes: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, dict):
            changes[name] = difference(before.get(name, {}), value)
        elif not name.endswith("_frac"):
            changes[name] = value - (before.get(name) or 0)
    return changes


def _ask(
    server: Server,
    evaluation: Evaluation,
    asks: Sequence[PlannedRequest],
    concurrency: int | None,
    fixed_length: bool = False,
    uncounted: Uncounted = NOTHING_ELSE,
    on_done: Callable[[Completion], None] = lambda completion: None,
) -> Asked:
    call = run_block(
        server.base_url,
        server.model_name(),
        evaluation.messages,
        asks,
        concurrency=concurrency,
        uncounted=uncounted,
        fixed_length=fixed_length,
        on_done=on_done,
        headers=server.headers,
        fields_of=lambda ask: server.fields(ask, evaluation.sampling),
    )
    return asyncio.run(call)


@contextmanager
def _running(server: Server) -> Iterator[None]:
    server.resume()
    try:
        if server.process is not None:
            messages = [{"role": "user", "content": "Hello"}]
            ask = PlannedRequest(0, WAKING_TOKENS)
            call = run_block(
                server.base_url,
                server.model_name(),
                [messages],
                [ask],
                concurrency=1,
                headers=server.headers,
                fields_of=server.fields,
            )
            asyncio.run(call)
        yield
    finally:
        server.pause()
