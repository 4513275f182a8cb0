"""`eval steady`: clients in a closed loop, while their number steps up and down, to within a few percent.

Every server has its own clients. The servers are interleaved in turns of a few seconds, all but one frozen, in the
middle of their answers: so a machine that is slower for ten seconds is slower for all, and ratios are of turns side by
side. All times are those for which a server was running.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from apparate_llm.eval.closed_loop import SAME_STEP_S, Clients, in_window, ratio_of, throughput_ratio
from apparate_llm.eval.intervals import p99_interval, ratio_interval, sums_of
from apparate_llm.eval.plan import SteadyPlan
from apparate_llm.eval.schema import SteadyLevel, SteadyRatio, SteadyRun
from apparate_llm.eval.servers import Server
from apparate_llm.eval.statistics import distribution
from apparate_llm.progress import Stage

THAWING_S = 0.3  # of each turn, not counted
EXITS = ("emitted", "held", "accepted", "released")


class Answer(NamedTuple):
    """One that began and ended within its server's turns."""

    tpt_ms: float  # NaN of a single token
    ttft_ms: float
    turn: int  # in which it began


Answers = dict[tuple[int, int], Answer]  # by (prompt, times asked before)


def measure_level(plan: SteadyPlan, servers: Sequence[Server], number: int, stage: Stage) -> SteadyLevel:
    """`number` clients of each server. Raises ValueError where too few answers fell into the turns."""
    everyone, before = [], []
    for server in servers:
        server.resume()
        everyone.append(Clients(server, plan.prompts, number, plan.max_tokens, plan.sampling))
        before.append(server.counts())
        server.pause()
    order = list(everyone)
    try:
        for clients in everyone:
            clients.start()
        for turn in range(-1, plan.turns):
            for clients in order:
                seconds = plan.turn_s if turn >= 0 else plan.settle_s
                stage.update(stage.done, f"{clients.server.system.name}, {clients_text(number)}")
                clients.run(seconds, counted=turn >= 0)
                stage.update(stage.done + seconds, stage.facts)
            order.reverse()
    finally:
        for clients in everyone:
            clients.end()
    for clients in everyone:
        clients.join()
    runs, measured = [], []
    for clients, server, old in zip(everyone, servers, before, strict=True):
        system = Measured(clients)
        run = system.run()
        if old is not None and (new := server.counts()) is not None:
            run.exits = {name: new[name] - old[name] for name in EXITS}
        runs.append(run)
        measured.append(system)
    baselines = [system for name in plan.baselines for system in measured if system.name == name]
    ratios = [ratio_to(system, baseline) for baseline in baselines for system in measured if system is not baseline]
    return SteadyLevel(clients=number, runs=runs, ratios=ratios)


class Measured:
    """What one server did at one level."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.name = clients.server.system.name
        self.arrivals = clients.arrivals()
        self.tpt_ms: list[float] = []  # of each turn that counts
        self.tokens_per_s: list[float] = []
        for turn in clients.turns.turns:
            if turn.counted:
                tpt_ms, tokens = in_window(self.arrivals, turn.began_s + THAWING_S, turn.ended_s)
                self.tpt_ms.append(tpt_ms)
                self.tokens_per_s.append(tokens / (turn.ended_s - turn.began_s - THAWING_S))
        self.answers: Answers = {}
        self.waits: list[tuple[float, float]] = []  # (asked, first token), in s for which the server was running
        self._take_answers()
        if len(self.answers) < 2:
            failed = "; ".join(clients.errors)
            hint = f"{clients.num_failed} requests failed: {failed}" if failed else "give more --turns"
            raise ValueError(f"no two answers of {self.name} began and ended within its turns: {hint}")

    def _take_answers(self) -> None:
        turns = self.clients.turns
        began_s = [turn.began_s for turn in turns.turns if turn.counted]
        last = turns.turns[-1].ended_s
        times_asked: Counter[int] = Counter()
        for done in self.clients.done:
            key = (done.prompt_index, times_asked[done.prompt_index])
            times_asked[done.prompt_index] += 1
            turn = bisect_right(began_s, done.started_s) - 1
            if done.error or turn < 0 or not done.chunks or done.started_s + done.chunks[-1].at_s > last:
                continue
            began, *ends = (
                turns.active_s(done.started_s + at_s) for at_s in (0, done.chunks[0].at_s, done.chunks[-1].at_s)
            )
            later_tokens = (done.output_tokens or 1) - 1
            tpt_ms = (ends[1] - ends[0]) * 1e3 / later_tokens if later_tokens else math.nan
            self.answers[key] = Answer(tpt_ms, (ends[0] - began) * 1e3, turn)
            self.waits.append((began, ends[0]))

    def run(self) -> SteadyRun:
        turns, steps = self.clients.turns, self.clients.steps
        tpt, ttft, _ = np.array(list(self.answers.values())).T
        running = [[turns.active_s(at_s) for at_s, _ in answer] for answer in self.arrivals if answer]
        run = SteadyRun(
            system=self.name,
            requests=len(self.answers),
            failed=self.clients.num_failed,
            errors=self.clients.errors,
            output_tokens_per_s=float(np.mean(self.tokens_per_s)),
            tpt_by_turn_ms=[None if math.isnan(value) else value for value in self.tpt_ms],
            tpt_ms=distribution(tpt[~np.isnan(tpt)].tolist()),
            ttft_ms=distribution(ttft.tolist()),
            ttft_parts=ttft_parts(self.waits, running),
            gap_ms=distribution(self.gaps_ms()),
        )
        if steps:
            number, computed, generated = map(sum, zip(*steps, strict=True))
            seconds = sum(turn.ended_s - turn.began_s for turn in turns.turns if turn.counted)
            run.step_ms = seconds * 1e3 / number
            run.tokens_per_step = generated / number
            run.prompt_tokens_per_step = (computed - generated) / number
        return run

    def gaps_ms(self) -> list[float]:
        """Between chunks of an answer that came in one turn."""
        gaps: list[float] = []
        for turn in self.clients.turns.turns:
            if turn.counted:
                for answer in self.arrivals:
                    inside = [at_s for at_s, _ in answer if turn.began_s + THAWING_S <= at_s < turn.ended_s]
                    gaps += [(later - earlier) * 1e3 for earlier, later in pairwise(inside)]
        return gaps


def ratio_to(ours: Measured, baseline: Measured) -> SteadyRatio:
    of_turns = ratio_of(ours.tpt_ms, baseline.tpt_ms)
    throughput, throughput_ci95 = throughput_ratio(ours.tokens_per_s, baseline.tokens_per_s)
    return SteadyRatio(
        system=ours.name,
        baseline=baseline.name,
        tpt=of_turns["ratio"],
        tpt_ci95=of_turns["ci95"],
        throughput=throughput,
        throughput_ci95=throughput_ci95,
        **ratios_of_answers(ours.answers, baseline.answers),
    )


def ratios_of_answers(answers: Answers, others: Answers) -> dict[str, Any]:
    """Of mean and p99 of TPT and TTFT over the answers that both servers gave, as clients ask both for the same in the
    same order; each with its 95 % interval, over the turns in which they began."""
    both = sorted(answers.keys() & others.keys())
    if len(both) < 2:
        raise ValueError(f"{len(both)} answers that both servers gave within their turns: give more --turns")
    ratios: dict[str, Any] = {"answers_of_both": len(both)}
    for measure in ("tpt", "ttft"):
        pairs = [[getattr(one[key], f"{measure}_ms") for key in both] for one in (answers, others)]
        known = [not any(map(math.isnan, pair)) for pair in zip(*pairs, strict=True)]
        values = np.array(pairs)[:, known]
        (mean, base_mean), (p99, base_p99) = values.mean(1), np.percentile(values, 99, axis=1)
        by_turn = [
            _by_turn([one[key].turn for key in both], side, known)
            for one, side in zip((answers, others), pairs, strict=True)
        ]
        ratios[f"{measure}_mean"], ratios[f"{measure}_p99"] = float(mean / base_mean), float(p99 / base_p99)
        ratios[f"{measure}_mean_ci95"] = ratio_interval(*map(sums_of, by_turn))
        ratios[f"{measure}_p99_ci95"] = p99_interval(*by_turn)
    return ratios


def _by_turn(turns: list[int], values: list[float], known: list[bool]) -> dict[tuple[int, int], list[float]]:
    """As units of an interval."""
    by_turn: dict[tuple[int, int], list[float]] = {}
    for turn, value, is_known in zip(turns, values, known, strict=True):
        if is_known:
            by_turn.setdefault((0, turn), []).append(value)
    return by_turn


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


def clients_text(number: int) -> str:
    return "1 client" if number == 1 else f"{number} clients"
