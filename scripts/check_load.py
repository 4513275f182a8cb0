#!/usr/bin/env python3
"""Time per output token with exits over that without, on one server, while the number of clients steps up and down.

    python -m scripts.check_load [--concurrency 1,16,1] [--pairs 12] [--accuracy-bound 0] [--json OUT]

From the repository's root. At each level exits are switched on and off in turns (`PATCH /early_exit/config`), a few
seconds each, so that a machine that is slower for a minute is slower for both; two servers that take turns by the block
do not get as near to each other. Off is this server without rounds; what it costs over plain vLLM is not in the ratio.
A level begins with --settle-s seconds that are not counted. Exit code 1 if a level's mean ratio is above --limit.
"""

import argparse
import json
import shlex
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from apparate_llm.eval.prompts import load_prompts
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import Choice, early_exits

from apparate_llm.machine import machine
from apparate_llm.serve import memory_flags, model_folder

AFTER_SWITCH_S = 1.0  # not counted
RESAMPLES = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--concurrency", default="1,16,1")
    parser.add_argument("--accuracy-bound", default="0")
    parser.add_argument("--pairs", type=int, default=12, help="windows with exits and without, at each level")
    parser.add_argument("--window-s", type=float, default=7.0)
    parser.add_argument("--settle-s", type=float, default=5.0)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--limit", type=float, default=1.03)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    choice = Choice(model_folder(args.model), tuple(memory_flags([])))
    system = early_exits("exits", choice, "--accuracy-bound", args.accuracy_bound, "--state", "none")
    with Server(system, log=Path(tempfile.mkdtemp()) / "server.log", start_timeout_s=900) as server:
        server.wait_ready()
        levels = [measure(server, int(number), args) for number in args.concurrency.split(",")]
    if args.json:
        command = "python -m scripts.check_load " + shlex.join(sys.argv[1:])
        args.json.write_text(json.dumps({"command": command, "machine": machine(), "levels": levels}, indent=1) + "\n")
    return 0 if all(level["ratio"] <= args.limit for level in levels) else 1


def measure(server: Server, clients: int, args: argparse.Namespace) -> dict[str, Any]:
    tpt: dict[str, list[float]] = {"adaptive": [], "off": []}
    rate: dict[str, list[float]] = {"adaptive": [], "off": []}
    per_pass: list[float] = []
    with load(server, clients, args):
        time.sleep(args.settle_s)
        for pair in range(args.pairs):
            for policy in ("off", "adaptive") if pair % 2 else ("adaptive", "off"):
                switch(server, policy)
                time.sleep(AFTER_SWITCH_S)
                before = server.status()
                time.sleep(args.window_s)
                after = server.status()
                found = {name: after["counts"][name] - before["counts"][name] for name in COUNTED}
                tpt[policy].append(found["decode_s"] / found["decode_tokens"] * 1e3)
                rate[policy].append(found["emitted"] / (after["clock_s"] - before["clock_s"]))
                if policy == "adaptive":
                    per_pass.append(tokens_per_pass(before, after))
        switch(server, "adaptive")
    ratios = np.log(tpt["adaptive"]) - np.log(tpt["off"])
    picks = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.exp(np.percentile(ratios[picks].mean(1), [2.5, 97.5]))
    level = {
        "clients": clients,
        "tpt_ms": {"on": float(np.mean(tpt["adaptive"])), "off": float(np.mean(tpt["off"]))},
        "ratio": float(np.exp(ratios.mean())),
        "ci95": [float(low), float(high)],
        "throughput_ratio": float(np.sum(rate["adaptive"]) / np.sum(rate["off"])),
        "tokens_per_pass": float(np.mean(per_pass)),
        "ratios": [round(float(ratio), 4) for ratio in np.exp(ratios)],
    }
    print(
        f"{clients} clients: {level['tpt_ms']['on']:.1f} ms with exits, {level['tpt_ms']['off']:.1f} without, ratio "
        f"{level['ratio']:.3f} ({low:.3f}-{high:.3f}), throughput {level['throughput_ratio']:.3f}, "
        f"{level['tokens_per_pass']:.2f} tokens per pass",
        flush=True,
    )
    return level


COUNTED = ("decode_s", "decode_tokens", "emitted")


def tokens_per_pass(before: dict[str, Any], after: dict[str, Any]) -> float:
    old, new = (status["distributions"]["tokens_per_pass"] for status in (before, after))
    return (new["total"] - old["total"]) / (sum(new["counts"]) - sum(old["counts"]))


def switch(server: Server, policy: str) -> None:
    httpx.patch(f"{server.base_url}/early_exit/config", json={"policy": policy}, timeout=30).raise_for_status()


@contextmanager
def load(server: Server, clients: int, args: argparse.Namespace) -> Any:
    """So many clients, each asking again as soon as it has its answer."""
    prompts = [prompt.messages for prompt in load_prompts(args.prompts)]
    model, ended = server.model_name(), threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=server.base_url, timeout=600) as http:
            while not ended.is_set():
                body = {"model": model, "messages": prompts[number % len(prompts)], "temperature": 0}
                http.post("/v1/chat/completions", json=body | {"max_tokens": args.max_tokens}).raise_for_status()
                number += clients

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    sys.exit(main())
