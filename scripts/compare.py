#!/usr/bin/env python3
"""Several settings of our server against plain vLLM in one sitting, the systems taking turns block by block.

    python -m scripts.compare --system "lossless=--accuracy-bound 0" --system "bounded=--accuracy-bound 0.05" \\
        --levels 1,16,1 [--model DIR] [--prompts FILE] [--repeat 2] --json OUT

From the repository's root, on a machine that does nothing else. Levels are concurrencies, in this order and all in
the life of one server per system, so that settling after a change of load is part of it; each level begins with one
block that is not counted (more than 100 engine steps). Time per output token is the mean over requests.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from apparate_llm.eval.measures import distribution, identical_frac, ratio_of, tokens_per_s
from apparate_llm.eval.prompts import load_prompts
from apparate_llm.eval.quick import Cell, blocks, machine, measure_block, warm_up
from apparate_llm.eval.servers import Server, early_exits, plain_vllm
from rich.console import Console
from rich.progress import Progress

from apparate_llm.serve import model_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int)
    parser.add_argument("--system", action="append", default=[], metavar="NAME=FLAGS", required=True)
    parser.add_argument("--levels", default="1")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, prompts = model_folder(args.model), load_prompts(args.prompts)[: args.num_prompts]
    flags = ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 30)]
    systems = [plain_vllm(model, flags)]
    for text in args.system:
        name, _, knobs = text.partition("=")
        systems.append(early_exits(name, model, [*shlex.split(knobs), "--state", "none"], flags))
    logs = Path(tempfile.mkdtemp(prefix="compare-"))
    servers = [Server(system, log=logs / f"{system.name}.log", start_timeout_s=900) for system in systems]
    rows = []
    started: list[Server] = []
    try:
        for server in servers:
            server.__enter__()
            started.append(server)
            server.wait_ready()
            warm_up(server, prompts, args.max_tokens)
            server.pause()
        with Progress(console=Console(stderr=True)) as progress:
            for level in map(int, args.levels.split(",")):
                rows += run_level(servers, prompts, level, args, progress)
                for row in rows[-len(servers) :]:
                    print(json.dumps(row), flush=True)
    finally:
        for server in started:
            server.__exit__()
    if args.json:
        command = shlex.join(["python", "-m", "scripts.compare", *sys.argv[1:]])
        args.json.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")


def run_level(
    servers: list[Server], prompts: list[Any], level: int, args: argparse.Namespace, progress: Progress
) -> list[dict[str, Any]]:
    cells = [Cell() for _ in servers]
    parts = blocks(prompts, level)
    task = progress.add_task(f"concurrency {level}", total=len(servers) * len(prompts) * args.repeat)
    for server in servers:
        measure_block(server, parts[0], Cell(), level, args.max_tokens, lambda: None)  # settles
    order = list(range(len(servers)))
    for _ in range(args.repeat):
        for part in parts:
            for i in order:
                measure_block(servers[i], part, cells[i], level, args.max_tokens, lambda: progress.advance(task))
            order.reverse()
        for cell in cells:
            done = cell.completions[-len(prompts) :]
            cell.tpt_by_repeat.append(distribution([completion.tpt_ms for completion in done]).mean)
    return [row_of(server, cell, cells[0], level) for server, cell in zip(servers, cells, strict=True)]


def row_of(server: Server, cell: Cell, plain: Cell, level: int) -> dict[str, Any]:
    tpt, base = (distribution([done.tpt_ms for done in item.completions]) for item in (cell, plain))
    pairs = zip(cell.tpt_by_repeat, plain.tpt_by_repeat, strict=True)
    speed, plain_speed = (tokens_per_s(item.completions, item.wall_s) for item in (cell, plain))
    return {
        "system": server.system.name,
        "concurrency": level,
        "tpt_ms": tpt.model_dump(),
        "tpt_ratio": ratio_of(tpt.mean, base.mean),
        "tpt_p99_ratio": ratio_of(tpt.p99, base.p99),
        "tpt_ratio_by_repeat": [ratio_of(ours, theirs) for ours, theirs in pairs],
        "throughput_ratio": ratio_of(speed, plain_speed),
        "output_tokens": sum(done.output_tokens or 0 for done in cell.completions),
        "failed": sum(done.error is not None for done in cell.completions),
        "identical_frac": identical_frac(cell.completions, plain.completions),
        "counts": cell.counts,
    }


if __name__ == "__main__":
    main()
