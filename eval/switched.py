#!/usr/bin/env python3
"""What exits bring within one server: time per output token and throughput with them over those without.

    python -m apparate_llm.eval.switched [--clients 1,16,32] [--accuracy-bound 0] [--json OUT] [vLLM flags]

From the repository's root. Clients never stop asking, and the policy is switched between `adaptive` and `off` by turns
as they go. Between two servers a few percent are hidden by which answers fall into a turn; here both policies have the
same, if prompts of a kind do not follow each other in the file. What `off` costs over plain vLLM is steady.py's
subject. Exit code 1 if throughput is below --limit of that without exits, or a request failed.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from apparate_llm.eval.prompts import load_prompts
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import Choice, early_exits
from apparate_llm.machine import machine
from apparate_llm.serve import memory_flags, model_folder
from apparate_llm.eval.steady import Clients, in_window, ratio_of

POLICIES = ("adaptive", "off")
COUNTS = ("emitted", "held", "accepted", "released", "diverged", "divergences_at_worst")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--clients", default="1,16,32")
    parser.add_argument("--accuracy-bound", default="0")
    parser.add_argument("--pairs", type=int, default=12, help="turns of each policy, for each number of clients")
    parser.add_argument("--window-s", type=float, default=10.0)
    parser.add_argument("--settle-s", type=float, default=2.0, help="after every switch, not counted")
    parser.add_argument("--learn-s", type=float, default=30.0, help="with exits, before the first turn")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--limit", type=float, default=0.98)
    parser.add_argument("--json", type=Path)
    args, flags = parser.parse_known_args()
    choice = Choice(model_folder(args.model), (*memory_flags(flags), *flags))
    system = early_exits("exits", choice, "--accuracy-bound", args.accuracy_bound)
    with Server(system, log=Path(tempfile.mkdtemp()) / "server.log", start_timeout_s=900) as server:
        server.wait_ready()
        levels = [measure(server, int(number), args) for number in args.clients.split(",")]
    if args.json:
        command = "python -m apparate_llm.eval.switched " + shlex.join(sys.argv[1:])
        args.json.write_text(json.dumps({"command": command, "machine": machine(), "levels": levels}, indent=1) + "\n")
    return int(any(level["throughput"]["ratio"] < args.limit or level["failed"] for level in levels))


def measure(server: Server, number: int, args: argparse.Namespace) -> dict[str, Any]:
    clients = Clients(server, load_prompts(args.prompts), number, args.max_tokens)
    turns: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    exits = dict.fromkeys(COUNTS, 0)  # in the counted parts of turns with exits
    clients.start()
    try:
        switch(server, "adaptive")
        time.sleep(args.learn_s)
        for pair in range(args.pairs):
            for policy in POLICIES if pair % 2 else reversed(POLICIES):
                switch(server, policy)
                time.sleep(args.settle_s)
                before, began = server.status()["counts"], time.monotonic()
                time.sleep(args.window_s)
                turns[policy].append((began, time.monotonic()))
                if policy == "adaptive":
                    after = server.status()["counts"]
                    exits = {name: exits[name] + after[name] - before[name] for name in COUNTS}
    finally:
        clients.stop()
    arrivals = clients.arrivals()
    found = {policy: [in_window(arrivals, *turn) for turn in turns[policy]] for policy in POLICIES}
    tpt = {policy: [tpt_ms for tpt_ms, _ in found[policy]] for policy in POLICIES}
    rate = {
        policy: [
            tokens / (ended - began) for (_, tokens), (began, ended) in zip(found[policy], turns[policy], strict=True)
        ]
        for policy in POLICIES
    }
    level = {
        "clients": number,
        "failed": sum(bool(done.error) for done in clients.done),
        "exits": exits,
        "tpt": {"ms": mean_of(tpt), **ratio_of(tpt["adaptive"], tpt["off"])},
        "throughput": {"tokens_per_s": mean_of(rate), **ratio_of(rate["adaptive"], rate["off"])},
    }
    print(json.dumps(level), flush=True)
    return level


def switch(server: Server, policy: str) -> None:
    response = httpx.patch(f"{server.base_url}/early_exit/config", json={"policy": policy}, timeout=30.0)
    response.raise_for_status()


def mean_of(values: dict[str, list[float]]) -> dict[str, float]:
    return {policy: float(np.mean(found)) for policy, found in values.items()}


if __name__ == "__main__":
    sys.exit(main())
