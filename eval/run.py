"""`apparate-llm eval tpt`, `quick`, `drift` and `steady`: one evaluation each, from its flags to its report."""

import argparse
import math
import shlex
import subprocess
import sys
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from rich.console import Console

from apparate_llm.eval.compare import compare, is_old, load_results
from apparate_llm.eval.evaluate import Evaluation, evaluate
from apparate_llm.eval.notes import cache_notes, dtype_notes, notes_of, sampling_notes, saturation_notes
from apparate_llm.eval.oracle import oracle_ratios
from apparate_llm.eval.plan import (
    STEADY_RESULTS,
    EvalPlan,
    SteadyPlan,
    drift_plan,
    quick_plan,
    steady_plan,
    tpt_plan,
)
from apparate_llm.eval.schema import Results, SteadyResults
from apparate_llm.eval.servers import Server
from apparate_llm.eval.steady import measure_level
from apparate_llm.eval.steady_tables import steady_tables
from apparate_llm.eval.store import Block, Store
from apparate_llm.eval.summary import Summary, cells_of, prompt_notes, ratios_of, runs_of, steps_of
from apparate_llm.eval.switched import switch_level
from apparate_llm.eval.systems import System
from apparate_llm.eval.tables import tables
from apparate_llm.files import private_folder, write_atomically
from apparate_llm.flags import check_new_file
from apparate_llm.machine import machine
from apparate_llm.models.architectures import layers_of
from apparate_llm.progress import SECONDS, Progress
from apparate_llm.redact import redacted
from apparate_llm.renamed import system_of_old

if TYPE_CHECKING:
    from apparate_llm.eval.figures import Points

TABLE_WIDTH = 120


def run_quick(args: argparse.Namespace) -> int:
    check_new_file("--json", args.json)
    plan = quick_plan(args)
    results = _run(plan)
    if args.json:
        write_atomically(args.json, (results.model_dump_json(indent=1) + "\n").encode())
        Console(stderr=True).print(f"written: {args.json}", soft_wrap=True)
    return _exit_code(results, plan.folder)


def run_tpt(args: argparse.Namespace) -> int:
    return _run_and_report(tpt_plan(args))


def run_drift(args: argparse.Namespace) -> int:
    return _run_and_report(drift_plan(args))


def run_steady(args: argparse.Namespace) -> int:
    """1 where a request failed, or a ratio is above the limit."""
    plan = steady_plan(args)
    results = SteadyResults(
        command=_command(),
        commit=commit(),
        started=_now(),
        machine=machine(),
        settings=plan.settings,
        systems={system.name: system.started_by for system in plan.systems},
        levels=[],
        notes=dtype_notes(plan.settings) + sampling_notes(plan.sampling) + cache_notes(plan.systems),
    )
    path, console = plan.folder / STEADY_RESULTS, Console(stderr=True)
    private_folder(plan.folder / "logs")
    path.unlink(missing_ok=True)
    try:
        _measure_levels(plan, results, path, console)
    finally:
        if results.levels:  # also those before one that failed
            Console(width=max(Console().width, TABLE_WIDTH)).print(*steady_tables(results))
            for note in results.notes:
                console.print(f"Note: {note}", soft_wrap=True, markup=False)
            console.print(f"figures: {path}", soft_wrap=True)
    failed = sum(run.failed for level in results.levels for run in level.runs)
    if failed:
        errors = dict.fromkeys(error for level in results.levels for run in level.runs for error in run.errors)
        console.print(f"{failed} requests failed: {'; '.join(errors)}", soft_wrap=True, markup=False)
    ratios = [ratio for level in results.levels for ratio in level.ratios]
    first = [ratio for ratio in ratios if plan.switch or ratio.baseline == plan.baselines[0]]
    above = [ratio for ratio in first if plan.limit and ratio.tpt > plan.limit]
    return 1 if failed or above else 0


def _measure_levels(plan: SteadyPlan, results: SteadyResults, path: Path, console: Console) -> None:
    """Raises RuntimeError where a server does not start, or stops answering."""
    logs = plan.folder / "logs"
    with ExitStack() as stack, Progress(console) as progress:
        servers = [_started(system, plan, logs, stack, progress) for system in plan.systems]
        with progress.stage("measure", total=plan.level_s * len(plan.levels), unit=SECONDS) as stage:
            for number in plan.levels:
                try:
                    if plan.switch:
                        results.levels.append(switch_level(plan, servers[0], number, stage))
                    else:
                        results.levels.append(measure_level(plan, servers, number, stage))
                except httpx.HTTPError as error:
                    text = str(error) or type(error).__name__
                    raise RuntimeError(f"a server stopped answering: {text}; the servers' logs: {logs}") from None
                write_atomically(path, (results.model_dump_json(indent=1) + "\n").encode())


def _started(system: System, plan: SteadyPlan, logs: Path, stack: ExitStack, progress: Progress) -> Server:
    """One after another: starting two at once would take vLLM's memory check by surprise."""
    log = logs / f"{system.name.replace(' ', '-')}.log"
    server = stack.enter_context(Server(system, log=log, start_timeout_s=plan.start_timeout_s))
    with progress.stage(f"start {system.name}", total=math.inf, facts=f"log {log}"):
        server.wait_ready()
    server.pause()
    return server


def _command() -> str:
    return shlex.join(["apparate-llm", *redacted(sys.argv[1:])])


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _run_and_report(plan: EvalPlan) -> int:
    results, folder = _run(plan), plan.folder
    text = f"report: {folder / 'report.html'}  figures: {folder / 'results.json'}"
    Console(stderr=True).print(text, soft_wrap=True)
    return _exit_code(results, folder)


def _run(plan: EvalPlan) -> Results:
    store = Store(plan.folder)
    console = Console(stderr=True)
    started = _now()
    if kept := store.open(plan.settings, fresh=plan.fresh):
        console.print(f"going on: {kept} blocks are measured already", soft_wrap=True)
    evaluation = Evaluation(
        model=plan.choice.model,
        systems=plan.systems,
        prompts=plan.prompts,
        loads=plan.loads,
        repeat=plan.repeat,
        store=store,
        start_timeout_s=plan.start_timeout_s,
        sampling=plan.sampling,
        baseline=plan.baselines[0],
    )
    with Progress(console, before_s=store.measured_s) as progress:
        evaluate(evaluation, progress)
        with progress.stage("report", total=math.inf, facts="texts compared, figures drawn"):
            results = summarise(plan, list(store.blocks()), evaluation.dead, started)
            write_atomically(plan.folder / "results.json", (results.model_dump_json(indent=1) + "\n").encode())
            write_page(plan.folder, results)
    Console(width=max(Console().width, TABLE_WIDTH)).print(*tables(results))
    return results


def summarise(plan: EvalPlan, blocks: list[Block], dead: dict[str, str], started: str) -> Results:
    cells = cells_of(blocks, plan.systems, plan.loads)
    model, baseline = plan.choice.model, plan.baselines[0]
    summary = Summary(model, layers_of(model), plan.prompts, plan.phases, plan.slo_ms, plan.sampling, baseline)
    runs = runs_of(cells, summary)
    concurrencies = sorted({load.concurrency for load in plan.loads if load.concurrency is not None})
    return Results(
        command=_command(),
        commit=commit(),
        started=started,
        machine=machine(),
        settings=plan.settings | {"bounds": {s.name: s.bound for s in plan.systems if s.bound is not None}},
        systems={system.name: system.started_by for system in plan.systems},
        skipped=dead,
        runs=runs,
        ratios=ratios_of(cells, runs, plan.baselines),
        steps=steps_of(cells, runs),
        oracle_ratio=oracle_ratios(model, concurrencies),
        notes=[
            *dtype_notes(plan.settings),
            *sampling_notes(plan.sampling),
            *notes_of(blocks, plan.systems, plan.loads),
            *prompt_notes(cells, baseline),
            *saturation_notes(runs),
        ],
    )


def write_page(folder: Path, results: Results) -> None:
    from apparate_llm.eval.report import write_report

    write_report(folder, results, points_of(Store(folder)))


def points_of(store: Store) -> "Points":
    """What the figures show, out of the blocks on disk."""
    from apparate_llm.eval.figures import Points

    points, plan = Points(), store.plan()
    loads = plan["loads"]
    for block in store.blocks():
        name = system_of_old(block.key.system) if is_old(plan) else block.key.system
        if not 0 <= block.key.load < len(loads):
            raise ValueError(f"{store.folder}: a block is of load {block.key.load}, and plan.json has {len(loads)}")
        key = (name, *loads[block.key.load])
        for done in block.completions:
            if (tpt_ms := done.tpt_ms) is not None:
                points.tpt_ms.setdefault(key, []).append(tpt_ms)
            points.gap_ms.setdefault(key, []).extend(done.gaps_ms)
    return points


def run_report(args: argparse.Namespace) -> int:
    """Draw the page again, and print the tables."""
    if not args.folder.is_dir():
        raise ValueError(f"no folder of an evaluation: {args.folder}")
    results = load_results(args.folder)
    write_page(args.folder, results)
    Console(width=max(Console().width, TABLE_WIDTH)).print(*tables(results))
    Console(stderr=True).print(f"report: {args.folder / 'report.html'}", soft_wrap=True)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    names = (str(args.a), str(args.b))
    tables = compare(load_results(args.a), load_results(args.b), names)
    Console(width=max(Console().width, TABLE_WIDTH)).print(*tables)
    return 0


def commit() -> str | None:
    """Of the source checkout this runs from, with a + if it was changed; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _exit_code(results: Results, folder: Path) -> int:
    """1 if any request failed or a system stopped answering; one that cannot run here at all is no failure."""
    failed = sum(run.failed for run in results.runs)
    stopped = {run.system for run in results.runs} & results.skipped.keys()
    if failed:
        Console(stderr=True).print(
            f"{failed} requests failed; what each said is in {folder / 'blocks'}", soft_wrap=True
        )
    return 1 if failed or stopped else 0
