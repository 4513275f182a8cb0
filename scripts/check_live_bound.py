#!/usr/bin/env python3
"""The accuracy bound on a live server while the workload changes: chat, code, chat, translation, over HTTP.

    python -m scripts.check_live_bound --bound 0.05 --phase FILE [FILE[:CATEGORY] ...] [--tokens 30000] [--json OUT]
        [vLLM flags]

From the repository's root. Each phase asks its file's prompts over and over for its share of the tokens. Exit code 1 if
the share of divergent tokens of any prefix beyond 500 tokens was above the bound, or a request's above its bound plus
the allowance. No timing is taken, so the machine may be busy.
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from apparate_llm.controller.budget import REQUEST_ALLOWANCE
from apparate_llm.engine.vllm_settings import memory_flags
from apparate_llm.eval.client import PlannedRequest, run_block
from apparate_llm.eval.prompts import Messages, load_prompts
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import ModelChoice, early_exits
from apparate_llm.machine import machine
from apparate_llm.named_model import model_folder


def prompts_of(phase: str) -> list[Messages]:
    path, _, category = phase.partition(":")
    prompts = [p.messages for p in load_prompts(Path(path)) if not category or p.category == category]
    if not prompts:
        raise ValueError(f"no prompts in {phase}")
    return prompts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--bound", type=float, required=True)
    parser.add_argument("--phase", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--json", type=Path)
    args, flags = parser.parse_known_args()
    phases = [(phase, prompts_of(phase)) for phase in args.phase]
    model = model_folder(args.model)
    choice = ModelChoice(model, vllm_flags=(*memory_flags(flags), "--max-model-len", "4096", *flags))
    system = early_exits("early-exit", choice, "--accuracy-bound", str(args.bound))
    with Server(system, log=Path(tempfile.mkdtemp()) / "server.log", start_timeout_s=900) as server:
        server.wait_ready()
        rows = [ask(server, phase, prompts, args) for phase, prompts in phases]
        status = server.status()
    audit = status["audit"]
    kept = audit["largest_divergence_frac"] <= args.bound and audit["largest_request_excess"] <= REQUEST_ALLOWANCE
    print(f"bound {args.bound:g}: {audit}; {'kept' if kept else 'BROKEN'}")
    if args.json:
        command = shlex.join(["python", "-m", "scripts.check_live_bound", *sys.argv[1:]])
        document = {
            "command": command,
            "machine": machine(),
            "phases": rows,
            "audit": audit,
            "counts": status["counts"],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if kept else 1


def ask(server: Server, phase: str, prompts: list[Messages], args: argparse.Namespace) -> dict[str, Any]:
    """One phase; its own counts."""
    before = server.status()["counts"]
    name, goal = server.model_name(), before["emitted"] + args.tokens / len(args.phase)
    while (counts := server.status()["counts"])["emitted"] < goal:
        asks = [PlannedRequest(index, args.max_tokens) for index in range(len(prompts))]
        call = run_block(server.base_url, name, prompts, asks, concurrency=args.concurrency)
        done = asyncio.run(call).completions
        if failed := [item.error for item in done if item.error]:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    row = {
        key: counts[key] - before[key]
        for key in ("emitted", "held", "accepted", "released", "divergences", "divergences_at_worst")
    }
    row |= {"phase": Path(phase).name, "regret_nats": round(counts["regret_nats"] - before["regret_nats"], 2)}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
