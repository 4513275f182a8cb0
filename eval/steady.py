#!/usr/bin/env python3
"""Time per output token over plain vLLM's while the number of clients steps up and down, to within a few percent.

    python -m apparate_llm.eval.steady [--systems vllm,lossless] [--concurrency 1,16,1] [--json OUT] [vLLM flags]

From the repository's root. Every server has its own clients, who never stop asking; the servers take turns of a few
seconds, all but one frozen, in the middle of their answers. So a machine that is slower for ten seconds is slower for
all, and ratios are of windows side by side. All times are those for which a server was running. A level begins with
--settle-s seconds of every server that are not counted. Exit code 1 if a level's mean ratio is above --limit, or a
request failed.
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from apparate_llm.eval.client import TIMEOUT_S, Ask, Completion, complete
from apparate_llm.eval.prompts import Prompt, load_prompts
from apparate_llm.eval.servers import Server
from apparate_llm.eval.statistics import Samples, Statistic, bootstrap, mean_of, p99_of
from apparate_llm.eval.systems import Choice, systems_of
from apparate_llm.eval.tables import with_interval
from apparate_llm.eval.workloads import lengths_of
from apparate_llm.machine import machine
from apparate_llm.serve import memory_flags, model_folder

THAWING_S = 0.3  # of each turn, not counted
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


def engine_steps(server: Server) -> Steps:
    found = dict.fromkeys(STEP_METRICS, 0.0)
    text = httpx.get(f"{server.base_url}/metrics", timeout=30.0).raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in found:
                found[sample.name] += sample.value
    return Steps(*map(int, found.values()))


@dataclass
class Turns:
    """When a server was running."""

    turns: list[Turn] = field(default_factory=list)

    def active_s(self, at_s: float) -> float:
        """For how long it had been running at a moment."""
        return sum(max(0.0, min(at_s, turn.ended_s) - turn.began_s) for turn in self.turns)


@dataclass
class Clients:
    """Those of one server: each asks again as soon as it has its answer. Answers' lengths vary, lest clients go in
    step."""

    server: Server
    prompts: list[Prompt]
    number: int
    max_tokens: int
    done: list[Completion] = field(default_factory=list)
    turns: Turns = field(default_factory=Turns)
    steps: list[Steps] = field(default_factory=list)  # of the engine, in each turn that counts
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._model = self.server.model_name()
        self._lengths = lengths_of(len(self.prompts), self.max_tokens, "varied", seed=0)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask()))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After what is under way."""
        self._ended.set()
        self.server.resume()
        self._thread.join()

    async def _ask(self) -> None:
        limits, url = httpx.Limits(max_connections=self.number), self.server.base_url
        async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(TIMEOUT_S), limits=limits) as http:
            await asyncio.gather(*(self._client(http, first) for first in range(self.number)))

    async def _client(self, http: httpx.AsyncClient, index: int) -> None:
        while not self._ended.is_set():
            index %= len(self.prompts)
            ask = Ask(index, self._lengths[index])
            messages = self.prompts[index].messages
            self.done.append(await complete(http, self._model, messages, ask, fixed_length=False, began=0.0))
            index += self.number

    def run(self, seconds: float, *, counted: bool) -> None:
        """One turn of the server."""
        self.server.resume()
        began = time.monotonic()
        before = engine_steps(self.server)
        time.sleep(seconds)
        after = engine_steps(self.server)
        self.server.pause()
        self.turns.turns.append(Turn(began, time.monotonic(), counted))
        if counted:
            self.steps.append(Steps(*(new - old for new, old in zip(after, before, strict=True))))

    def arrivals(self) -> list[list[tuple[float, int]]]:
        """Of each answer: when it had how many tokens."""
        return [[(done.started_s + chunk.at_s, chunk.tokens or 0) for chunk in done.chunks] for done in self.done]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--systems", default="vllm,lossless", help="the first is what the others are compared with")
    parser.add_argument("--accuracy-bounds", default="0.05", help="of the system `bounded`")
    parser.add_argument("--concurrency", default="1,16,1")
    parser.add_argument("--windows", type=int, default=20, help="turns of each server, at each level")
    parser.add_argument("--window-s", type=float, default=5.0)
    parser.add_argument("--settle-s", type=float, default=5.0)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--limit", type=float, default=1.03)
    parser.add_argument("--json", type=Path)
    args, flags = parser.parse_known_args()
    bounds = tuple(map(float, args.accuracy_bounds.split(",")))
    choice = Choice(model_folder(args.model), (*memory_flags(flags), *flags), bounds=bounds)
    systems = systems_of(args.systems.split(","), [], choice)
    with ExitStack() as stack:
        servers, logs = [], Path(tempfile.mkdtemp())
        for system in systems:
            log = logs / f"{system.name.replace(' ', '-')}.log"
            server = stack.enter_context(Server(system, log=log, start_timeout_s=900))
            server.wait_ready()
            servers.append(server)
        levels = [measure(servers, int(number), args) for number in args.concurrency.split(",")]
    if args.json:
        command = "python -m apparate_llm.eval.steady " + shlex.join(sys.argv[1:])
        args.json.write_text(json.dumps({"command": command, "machine": machine(), "levels": levels}, indent=1) + "\n")
    rows = [row for level in levels for row in level["systems"]]
    return int(any(row.get("ratio", 0.0) > args.limit or row["failed"] for row in rows))


def measure(servers: list[Server], number: int, args: argparse.Namespace) -> dict[str, Any]:
    everyone = [Clients(server, load_prompts(args.prompts), number, args.max_tokens) for server in servers]
    before = [server.counts() for server in servers]
    for server in servers:
        server.pause()
    for clients in everyone:
        clients.start()
    order = list(everyone)
    try:
        for window in range(-1, args.windows):
            for clients in order:
                clients.run(args.window_s if window >= 0 else args.settle_s, counted=window >= 0)
            order.reverse()
    finally:
        for clients in everyone:
            clients.stop()
    rows = [row_of(clients) for clients in everyone]
    for row, server, old in zip(rows, servers, before, strict=True):
        row |= compared(row, rows[0]) if row is not rows[0] else {}
        if old is not None and (new := server.counts()) is not None:
            row["exits"] = {name: new[name] - old[name] for name in ("emitted", "held", "accepted", "released")}
        print(f"{number} clients, {said(row)}", flush=True)
    kept = [{name: value for name, value in row.items() if name not in ("windows", "rates", "answers")} for row in rows]
    return {"clients": number, "systems": kept}


def row_of(clients: Clients) -> dict[str, Any]:
    """What one server did at one level; `windows`: TPT in ms of each turn that counts, `answers`: (TPT, TTFT) in ms of
    whole answers by prompt and how often it had been asked before, the TPT nan where there is a single token; `rates`:
    tokens per second in each of those turns."""
    turns, arrivals = clients.turns, clients.arrivals()
    windows, rates = [], []
    for turn in turns.turns:
        if turn.counted:
            tpt_ms, tokens = in_window(arrivals, turn.began_s + THAWING_S, turn.ended_s)
            windows.append(tpt_ms)
            rates.append(tokens / (turn.ended_s - turn.began_s - THAWING_S))
    first = next(turn.began_s for turn in turns.turns if turn.counted)
    last = turns.turns[-1].ended_s
    answers: dict[tuple[int, int], tuple[float, float]] = {}
    waits: list[tuple[float, float]] = []
    times_asked: Counter[int] = Counter()
    for done in clients.done:
        key = (done.prompt_index, times_asked[done.prompt_index])
        times_asked[done.prompt_index] += 1
        if done.error or done.started_s < first or not done.chunks or done.started_s + done.chunks[-1].at_s > last:
            continue
        began, *ends = (
            turns.active_s(done.started_s + at_s) for at_s in (0, done.chunks[0].at_s, done.chunks[-1].at_s)
        )
        later_tokens = (done.output_tokens or 1) - 1
        tpt_ms = (ends[1] - ends[0]) * 1e3 / later_tokens if later_tokens else float("nan")
        answers[key] = (tpt_ms, (ends[0] - began) * 1e3)
        waits.append((began, ends[0]))
    if len(answers) < 2:
        sys.exit(
            f"no two answers of {clients.server.system.name} began and ended within its turns: give more --windows"
        )
    steps, computed, generated = map(sum, zip(*clients.steps, strict=True))
    tpt, ttft = np.array(list(answers.values())).T
    tpt = tpt[~np.isnan(tpt)]
    return {
        "system": clients.server.system.name,
        "windows": windows,
        "requests": len(answers),
        "failed": sum(bool(done.error) for done in clients.done),
        "tokens_per_s": float(np.mean(rates)),
        "step_ms": sum(turn.ended_s - turn.began_s for turn in turns.turns if turn.counted) * 1e3 / steps,
        "tokens_per_step": generated / steps,
        "prompt_tokens_per_step": (computed - generated) / steps,
        "tpt_ms": {
            "windows": float(np.nanmean(windows)),
            "mean": float(np.mean(tpt)),
            "p99": float(np.percentile(tpt, 99)),
        },
        "ttft_ms": {"mean": float(np.mean(ttft)), "p99": float(np.percentile(ttft, 99))},
        "ttft_parts": ttft_parts(
            waits, [[turns.active_s(at_s) for at_s, _ in answer] for answer in arrivals if answer]
        ),
        "answers": answers,
        "rates": rates,
    }


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


def ttft_parts(waits: list[tuple[float, float]], arrivals: list[list[float]]) -> dict[str, float]:
    """What first tokens waited for, in ms, on average over `waits`, each (asked, first token): the step that was under
    way, further ones without the prompt, the one that read it; and how many prompts that one read. A step ends when
    its tokens arrive. All times in s for which the server was running, `arrivals` of all answers."""
    times = np.sort(np.concatenate([np.array(answer) for answer in arrivals]))
    step_ends = times[np.append(np.diff(times) > SAME_STEP_S, True)]
    read = np.bincount(np.searchsorted(step_ends, [answer[0] for answer in arrivals]), minlength=len(step_ends))
    parts = []
    for asked, first in waits:
        own = int(np.searchsorted(step_ends, first))
        began = max(asked, step_ends[own - 1]) if own else asked
        waited = step_ends[(step_ends > asked) & (step_ends <= began)]
        under_way = (waited[0] if len(waited) else asked) - asked
        parts.append((under_way * 1e3, (began - asked - under_way) * 1e3, (first - began) * 1e3, read[own]))
    names = ("step_under_way_ms", "further_steps_ms", "own_step_ms", "prompts_in_own_step")
    return dict(zip(names, np.mean(parts, axis=0).tolist(), strict=True))


def ratio_of(values: list[float], others: list[float]) -> dict[str, Any]:
    """Geometric mean of the ratios of pairs, with its 95 % interval; a turn without tokens has none."""
    logs = np.log([values, others])
    logs = logs[:, np.isfinite(logs).all(0)]
    return {
        "ratio": float(np.exp((logs[0] - logs[1]).mean())),
        "ci95": bootstrap(logs, lambda sample: np.exp((sample[0] - sample[1]).mean(-1))),
    }


def compared(row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    return {
        **ratio_of(row["windows"], baseline["windows"]),
        "throughput_ratio": row["tokens_per_s"] / baseline["tokens_per_s"],
        "throughput_ratio_ci95": bootstrap(
            np.array([row["rates"], baseline["rates"]]), lambda sample: sample[0].mean(-1) / sample[1].mean(-1)
        ),
        **ratios_of_answers(row["answers"], baseline["answers"]),
        "window_ratios": [round(a / b, 4) for a, b in zip(row["windows"], baseline["windows"], strict=True)],
    }


def ratios_of_answers(
    answers: dict[tuple[int, int], tuple[float, float]], others: dict[tuple[int, int], tuple[float, float]]
) -> dict[str, Any]:
    """Of mean and p99 of TPT and TTFT over the answers that both servers gave, as clients ask both for the same in the
    same order; each with its 95 % interval."""
    both = sorted(answers.keys() & others.keys())
    if len(both) < 2:
        sys.exit(f"{len(both)} answers that both servers gave within their turns: give more --windows")
    found: dict[str, Any] = {"answers_of_both": len(both)}
    for i, measure in enumerate(("tpt", "ttft")):
        pairs = np.array([[one[key][i] for key in both] for one in (answers, others)])
        pairs = pairs[:, ~np.isnan(pairs).any(0)]
        for name, statistic in {"mean": mean_of, "p99": p99_of}.items():
            ratio = partial(ratio_of_pairs, statistic)
            found[f"{measure}_{name}_ratio"] = float(ratio(pairs))
            found[f"{measure}_{name}_ratio_ci95"] = bootstrap(pairs, ratio)
    return found


def ratio_of_pairs(statistic: Statistic, pairs: Samples) -> Samples:
    return statistic(pairs[0]) / statistic(pairs[1])


def said(row: dict[str, Any]) -> str:
    tpt, ttft, parts = row["tpt_ms"], row["ttft_ms"], row["ttft_parts"]
    text = (
        f"{row['system']}: TPT {tpt['windows']:.1f} ms (requests: mean {tpt['mean']:.1f}, p99 {tpt['p99']:.1f}), TTFT "
        f"{ttft['mean']:.0f} ms (step under way {parts['step_under_way_ms']:.0f}, further "
        f"{parts['further_steps_ms']:.0f}, own {parts['own_step_ms']:.0f} with {parts['prompts_in_own_step']:.2f} "
        f"prompts), {row['tokens_per_s']:.1f} tokens/s, steps of {row['step_ms']:.1f} ms with "
        f"{row['tokens_per_step']:.1f} tokens and {row['prompt_tokens_per_step']:.0f} of prompts, {row['requests']} "
        f"requests, {row['failed']} failed"
    )
    if "ratio" in row:
        throughput = with_interval(row["throughput_ratio"], row["throughput_ratio_ci95"], 3)
        text += f"; ratios: throughput {throughput}, TPT {with_interval(row['ratio'], row['ci95'], 3)}"
        text += f", of {row['answers_of_both']} answers that both gave"
        for name in ("tpt_mean_ratio", "tpt_p99_ratio", "ttft_mean_ratio", "ttft_p99_ratio"):
            text += f", {name} {with_interval(row[name], row[f'{name}_ci95'], 3)}"
    return text


if __name__ == "__main__":
    sys.exit(main())
