"""`apparate-llm eval tpt`, `quick` and `drift`: one evaluation each, from its flags to its report."""

import argparse
import hashlib
import json
import math
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from apparate_llm.config import EarlyExitConfig
from apparate_llm.eval.compare import compare, load_results
from apparate_llm.eval.evaluate import Evaluation, evaluate
from apparate_llm.eval.oracle import oracle_ratios
from apparate_llm.eval.prompts import Prompt, load_prompts
from apparate_llm.eval.schema import Results
from apparate_llm.eval.store import Block, Store
from apparate_llm.eval.summary import Summary, cells_of, notes_of, ratios_of, runs_of, saturation_notes
from apparate_llm.eval.systems import BASELINE, Choice, System, early_exits, plain_vllm, systems_of
from apparate_llm.eval.tables import tables
from apparate_llm.eval.workloads import Length, Load, closed, poisson, traced
from apparate_llm.files import write_atomically
from apparate_llm.flags import given_value, one_spelling, split_flag
from apparate_llm.knobs import knobs_from
from apparate_llm.launch import check_build
from apparate_llm.machine import machine
from apparate_llm.models.architectures import architecture_of, layers_of
from apparate_llm.progress import Progress
from apparate_llm.redact import redacted
from apparate_llm.serve import memory_flags, model_folder, preflight_ramps

if TYPE_CHECKING:
    from apparate_llm.eval.figures import Points

TABLE_WIDTH = 120
SET_HERE = ("model", "host", "port", "uds")
DEFAULT_CONCURRENCY = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Job:
    """What one command asks for."""

    choice: Choice
    systems: list[System]
    prompts: list[Prompt]
    loads: list[Load]
    settings: dict[str, Any]  # shown, and equal in a run that goes on
    slo_ms: dict[str, float]
    phases: tuple[tuple[str, int], ...] = ()


def run_quick(args: argparse.Namespace) -> int:
    config = knobs_from(args)
    if config.policy != "off":
        check_build()
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"folder of --json not found: {args.json.parent}")
    prompts = load_prompts(args.prompts)[: args.num_prompts]
    model = model_folder(args.model)
    preflight_ramps(config, model, architecture_of(model))
    flags = tuple(_vllm_flags(args, num_servers=2))
    choice = Choice(model, flags, tuple(knob_flags(args)), api_key=args.api_key)
    systems = [plain_vllm(choice), early_exits(name_of(config), choice)]
    loads = [closed(len(prompts), n, max_tokens=args.max_tokens, length="free") for n in args.concurrency]
    folder = args.logs or Path(tempfile.mkdtemp(prefix="apparate-eval-"))
    results = _run(
        Job(choice, systems, prompts, loads, _settings(args, choice.model, systems, prompts, loads), {}),
        folder / "run",
        args,
    )
    if args.json:
        write_atomically(args.json, (results.model_dump_json(indent=1) + "\n").encode())
        Console(stderr=True).print(f"written: {args.json}", soft_wrap=True)
    return _exit_code(results, folder / "run")


def run_tpt(args: argparse.Namespace) -> int:
    prompts = load_prompts(args.prompts)[: args.num_prompts]
    return _run_and_report(args, prompts, _loads(args, prompts), ())


def run_drift(args: argparse.Namespace) -> int:
    """One workload, another, and the first again, asked in order in the life of one server."""
    parts = [load_prompts(source)[: args.num_prompts] for source in args.workloads]
    if len(parts) != 2:
        raise ValueError(f"--workloads: two prompt sets wanted, A,B, got {len(parts)}")
    first, second = parts
    prompts = [*first, *second, *first]
    names = [source.stem for source in args.workloads]
    starts = (0, len(first), len(first) + len(second))
    phases = tuple(zip((names[0], names[1], f"{names[0]} again"), starts, strict=True))
    loads = [closed(len(prompts), args.clients, max_tokens=args.max_tokens, length="free")]
    return _run_and_report(args, prompts, loads, phases)


def _run_and_report(
    args: argparse.Namespace, prompts: list[Prompt], loads: list[Load], phases: tuple[tuple[str, int], ...]
) -> int:
    model = model_folder(args.model)
    names = [name.strip() for name in args.systems.split(",")]
    knobs = knob_flags(args)
    knobs_from(args)  # raises for a value that is not allowed
    num_servers = len(names) + len(args.system) + len(args.accuracy_bounds)
    flags = tuple(_vllm_flags(args, num_servers))
    choice = Choice(model, flags, tuple(knobs), tuple(args.accuracy_bounds), args.hf_layer, args.api_key)
    systems = systems_of(names, args.base_url, choice)
    systems += [_own_system(text, choice) for text in args.system]
    if BASELINE not in (system.name for system in systems):
        raise ValueError(f"--systems must name {BASELINE}, which all others are compared with")
    job = Job(
        choice, systems, prompts, loads, _settings(args, choice.model, systems, prompts, loads), args.slo or {}, phases
    )
    results = _run(job, args.out, args)
    console = Console(stderr=True)
    console.print(f"report: {args.out / 'report.html'}  figures: {args.out / 'results.json'}", soft_wrap=True)
    return _exit_code(results, args.out)


def _own_system(text: str, choice: Choice) -> System:
    name, _, flags = text.partition("=")
    knobs = [part for text in shlex.split(flags) for part in (text.split("=", 1) if text[:2] == "--" else [text])]
    if not name or not knobs or len(knobs) % 2:
        raise ValueError(f'--system: "NAME=--knob value ..." wanted, got {text!r}')
    return early_exits(name, choice, *knobs)


def _run(job: Job, folder: Path, args: argparse.Namespace) -> Results:
    store = Store(folder)
    console = Console(stderr=True)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    if kept := store.open(job.settings, fresh=getattr(args, "fresh", True)):
        console.print(f"going on: {kept} blocks are measured already", soft_wrap=True)
    evaluation = Evaluation(
        model=job.choice.model,
        systems=job.systems,
        prompts=job.prompts,
        loads=job.loads,
        repeat=args.repeat,
        store=store,
        start_timeout_s=args.start_timeout_s,
    )
    with Progress(console) as progress:
        evaluate(evaluation, progress)
        with progress.stage("report", total=math.inf, facts="texts compared, figures drawn"):
            results = summarise(job, list(store.blocks()), evaluation.dead, started)
            write_atomically(folder / "results.json", (results.model_dump_json(indent=1) + "\n").encode())
            write_page(folder, results)
    Console(width=max(Console().width, TABLE_WIDTH)).print(*tables(results))
    return results


def summarise(job: Job, blocks: list[Block], dead: dict[str, str], started: str) -> Results:
    cells = cells_of(blocks, job.systems, job.loads)
    runs = runs_of(cells, Summary(job.choice.model, layers_of(job.choice.model), job.prompts, job.phases, job.slo_ms))
    concurrencies = sorted({load.concurrency for load in job.loads if load.concurrency is not None})
    return Results(
        command=shlex.join(["apparate-llm", *redacted(sys.argv[1:])]),
        commit=commit(),
        started=started,
        machine=machine(),
        settings=job.settings | {"bounds": {s.name: s.bound for s in job.systems if s.bound is not None}},
        systems={system.name: system.started_by for system in job.systems},
        skipped=dead,
        runs=runs,
        ratios=ratios_of(cells, runs),
        oracle_ratio=oracle_ratios(job.choice.model, concurrencies),
        notes=notes_of(blocks, job.systems, job.loads) + saturation_notes(runs),
    )


def write_page(folder: Path, results: Results) -> None:
    from apparate_llm.eval.report import write_report

    write_report(folder, results, points_of(Store(folder)))


def points_of(store: Store) -> "Points":
    """What the figures show, out of the blocks on disk."""
    from apparate_llm.eval.figures import Points

    points, loads = Points(), store.plan()["loads"]
    for block in store.blocks():
        key = (block.key.system, *loads[block.key.load])
        for done in block.completions:
            if (tpt_ms := done.tpt_ms) is not None:
                points.tpt_ms.setdefault(key, []).append(tpt_ms)
            points.gap_ms.setdefault(key, []).extend(done.gaps_ms)
    return points


def run_report(args: argparse.Namespace) -> int:
    """Draw the page again, and print the tables."""
    results = load_results(args.folder)
    write_page(args.folder, results)
    Console(width=max(Console().width, TABLE_WIDTH)).print(*tables(results))
    Console(stderr=True).print(f"report: {args.folder / 'report.html'}", soft_wrap=True)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    names = (str(args.a), str(args.b))
    found = compare(load_results(args.a), load_results(args.b), names)
    Console(width=max(Console().width, TABLE_WIDTH)).print(*found)
    return 0


def _loads(args: argparse.Namespace, prompts: list[Prompt]) -> list[Load]:
    arrivals = next((f"--{name}" for name in ("rate", "trace") if getattr(args, name) is not None), None)
    if arrivals is not None and args.concurrency is not None:
        raise ValueError(f"give one of --concurrency and {arrivals}: clients ask when they have their answer")
    if args.trace is not None:
        if args.rate is not None:
            raise ValueError("give one of --rate and --trace: both say when requests arrive")
        if args.length is not None:
            raise ValueError("--length does not go with --trace, which sets the answers' lengths")
        scale, most = args.trace_scale or 1.0, args.num_requests or len(prompts)
        return [traced(args.trace, prompts, scale=scale, num_requests=most, max_tokens=args.max_tokens)]
    for flag, given in (("--trace-scale", args.trace_scale), ("--num-requests", args.num_requests)):
        if given is not None:
            raise ValueError(f"{flag} is about a --trace, and none is given")
    lengths: tuple[Length, ...] = ("free", "fixed") if args.length == "both" else (args.length or "free",)
    loads = []
    for length in lengths:
        if args.rate is not None:
            loads += [
                poisson(len(prompts), rate, max_tokens=args.max_tokens, length=length, seed=args.seed)
                for rate in args.rate
            ]
        else:
            loads += [
                closed(len(prompts), number, max_tokens=args.max_tokens, length=length, seed=args.seed)
                for number in args.concurrency or DEFAULT_CONCURRENCY
            ]
    return _named_apart(loads)


def _named_apart(loads: list[Load]) -> list[Load]:
    """A load that is asked for again, as in --concurrency 1,16,1, is another one."""
    named: list[Load] = []
    for load in loads:
        key = (load.name, load.fixed_length)
        times = sum((other.name.partition(", time ")[0], other.fixed_length) == key for other in named)
        named.append(replace(load, name=f"{load.name}, time {times + 1}") if times else load)
    return named


def _settings(
    args: argparse.Namespace, model: Path, systems: list[System], prompts: list[Prompt], loads: list[Load]
) -> dict[str, Any]:
    """What a run that goes on must share with the one that began."""
    asked = json.dumps([prompt.messages for prompt in prompts]).encode()
    return {
        "loads": [[load.name, load.fixed_length] for load in loads],
        "num_prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(asked).hexdigest()[:16],
        "arrivals_sha256": hashlib.sha256(repr(loads).encode()).hexdigest()[:16],
        "max_tokens": args.max_tokens,
        "repeat": args.repeat,
        "model": model.name,
        "systems": [system.name for system in systems],
        "knobs": knob_flags(args) + getattr(args, "system", []),
        "vllm_flags": redacted(args.vllm_flag),
        "hf_layer": getattr(args, "hf_layer", None),
    }


def _vllm_flags(args: argparse.Namespace, num_servers: int) -> list[str]:
    flags = [part for text in args.vllm_flag for part in split_flag(text)]
    for name in SET_HERE:
        if given_value(one_spelling(flags), name) is not None:
            raise ValueError(f"--vllm-flag: --{name} is set by the evaluation itself")
    return flags + memory_flags(flags, num_servers=num_servers)


def name_of(config: EarlyExitConfig) -> str:
    if config.policy == "off":
        return "off"
    bound = "lossless" if config.accuracy_bound == 0 else f"epsilon={config.accuracy_bound:g}"
    return bound if config.policy == "adaptive" else f"{config.policy} {bound}"


def knob_flags(args: argparse.Namespace) -> list[str]:
    """The knobs given on the command line, as flags."""
    flags = []
    for name in EarlyExitConfig.model_fields:
        if (value := getattr(args, name, None)) is not None:
            flags += ["--" + name.replace("_", "-"), value]
    return flags


def commit() -> str | None:
    """Of the source checkout this runs from, with a + if it was changed; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def _exit_code(results: Results, folder: Path) -> int:
    """1 if any request failed or a system stopped answering; one that cannot run here at all is no failure."""
    failed = sum(run.failed for run in results.runs)
    stopped = {run.system for run in results.runs} & results.skipped.keys()
    if failed:
        Console(stderr=True).print(
            f"{failed} requests failed; what each said is in {folder / 'blocks'}", soft_wrap=True
        )
    return 1 if failed or stopped else 0
