"""Candidates as servers, each interleaved with one that uses the machine as it was used so far."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from apparate_llm.config import EarlyExitConfig
from apparate_llm.coverage import VLLM_KERNELS, kept
from apparate_llm.eval.plan import SteadyPlan
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.schema import SteadyRun
from apparate_llm.eval.servers import Server
from apparate_llm.eval.steady import measure_level
from apparate_llm.eval.systems import ModelChoice, System, early_exits
from apparate_llm.host.choice import ZENTORCH, Choice, has_zentorch, num_threads
from apparate_llm.host.dtype import asked_dtype
from apparate_llm.host.limits import CpuLimits
from apparate_llm.host.store import huge_pages_given
from apparate_llm.naming import model_name
from apparate_llm.progress import SECONDS, Progress
from apparate_llm.tune.candidates import flags_of, name_of, of_kernels, of_pages, of_processes
from apparate_llm.tune.decide import Times, Trial
from apparate_llm.vllm_flags import normalised

TURN_S = 3.0
SETTLE_S = 3.0  # of each server with each number of clients, not counted


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePlan:
    served: ModelChoice  # model, vLLM's flags and exits' options of every server here
    old: Choice
    limits: CpuLimits
    prompts: list[Prompt]
    clients: list[int]
    seconds: float  # of each server with each number of clients
    max_tokens: int
    config: EarlyExitConfig  # of every server here
    logs: Path
    cache: Path
    start_timeout_s: float

    @property
    def turns(self) -> int:
        return max(2, round(self.seconds / TURN_S))

    def system(self, choice: Choice, name: str) -> System:
        tuning, pages = flags_of(choice, self.limits)
        return early_exits(name, replace(self.served, tuning=tuning), *pages)

    def steady(self, systems: list[System]) -> SteadyPlan:
        return SteadyPlan(
            choice=self.served,
            systems=systems,
            baselines=(systems[0].name,),
            prompts=self.prompts,
            levels=self.clients,
            turns=self.turns,
            turn_s=TURN_S,
            settle_s=SETTLE_S,
            learn_s=0.0,
            max_tokens=self.max_tokens,
            switch=False,
            limit=None,
            settings={},
            folder=self.logs,
            start_timeout_s=self.start_timeout_s,
        )


def measure(plan: TunePlan, progress: Progress, on_trial: Callable[[Trial], None]) -> list[Trial]:
    """All candidates; on_trial: called with each as soon as it is measured. Raises RuntimeError where no server starts
    as it did so far."""
    trials: list[Trial] = []
    with ExitStack() as stack:
        old = _started(plan, plan.old, "old", stack, progress)
        for stage in (_of_processes, _of_kernels, _of_pages):
            for choice in stage(plan, _fastest(plan, trials)):
                trial = _tried(plan, old, choice, len(trials), progress)
                trials.append(trial)
                on_trial(trial)
    return trials


def _of_processes(plan: TunePlan, best: Choice) -> list[Choice]:
    return of_processes(plan.old, plan.limits)


def _of_kernels(plan: TunePlan, best: Choice) -> list[Choice]:
    return of_kernels(best, plan.old, plan.limits, zentorch=has_zentorch())


def _of_pages(plan: TunePlan, best: Choice) -> list[Choice]:
    by_exits = plan.config.policy != "off"
    return of_pages(best, plan.old, plan.limits, given=huge_pages_given(), by_exits=by_exits)


def _fastest(plan: TunePlan, trials: Sequence[Trial]) -> Choice:
    """On average so far, certain or not: what the next stage varies."""
    ratios = [(trial.ratio()[0], trial.choice) for trial in trials if trial.times and trial.problem is None]
    ratio, choice = min(ratios, key=lambda pair: pair[0], default=(1.0, plan.old))
    return choice if ratio < 1.0 else plan.old


def _tried(plan: TunePlan, old: Server, choice: Choice, number: int, progress: Progress) -> Trial:
    trial = Trial(choice)
    try:
        with ExitStack() as stack:
            new = _started(plan, choice, f"candidate-{number + 1}", stack, progress)
            if plan.config.batch_invariant:
                trial.problem = variance(plan, choice)
            steady = plan.steady([old.system, new.system])
            total = steady.level_s * len(plan.clients)
            with progress.stage(name_of(choice, plan.limits), total=total, unit=SECONDS) as stage:
                for clients in plan.clients:
                    level = measure_level(steady, [old, new], clients, stage)
                    theirs, ours = map(times_of, level.runs)
                    trial.times[clients] = (ours, theirs)
    except ValueError as error:  # of turns in which nothing was answered
        raise ValueError(str(error).replace("--turns", "--seconds")) from None
    except (RuntimeError, httpx.HTTPError) as error:
        if old.process is not None and old.process.poll() is not None:
            raise
        trial.times.clear()
        trial.problem = " ".join(str(error).partition("; end of its log")[0].split()) or type(error).__name__
        progress.say(f"{name_of(choice, plan.limits)}: {error}")
    return trial


def _started(plan: TunePlan, choice: Choice, name: str, stack: ExitStack, progress: Progress) -> Server:
    log = plan.logs / f"{name}.log"
    system = plan.system(choice, name)
    if system.problem is not None:
        raise ValueError(system.problem)
    server = stack.enter_context(Server(system, log=log, start_timeout_s=plan.start_timeout_s))
    with progress.stage(f"start {name_of(choice, plan.limits)}", total=math.inf, facts=f"log {log}"):
        server.wait_ready()
    server.pause()
    return server


def times_of(run: SteadyRun) -> Times:
    return Times(
        run.tpt_by_turn_ms,
        tpt_ms=run.tpt_ms.mean if run.tpt_ms else None,
        gap_p99_ms=run.gap_ms.p99 if run.gap_ms else None,
    )


def variance(plan: TunePlan, choice: Choice) -> str | None:
    """Why this choice's texts would depend on the load, by what the server has found at its start; None: they do
    not."""
    kernels = choice.kernels or (ZENTORCH if has_zentorch() else VLLM_KERNELS)
    number, dtype = num_threads(choice, plan.limits), asked_dtype(normalised([*plan.served.vllm_flags]))
    records = [
        one
        for one in kept(plan.cache)
        if one["model"] == model_name(plan.served.model)
        and one["kernels"] == kernels
        and dtype in ("auto", one["dtype"])
        and (number is None or one["threads"] == number)
    ]
    if not records:
        return "not known to be batch-invariant"
    return None if all(one["holds"] for one in records) else "not batch-invariant"
