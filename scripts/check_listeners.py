#!/usr/bin/env python3
"""Time per output token while hundreds of event streams are open over that without.

    python -m scripts.check_listeners [--listeners 200] [--pairs 20] [--clients 1] [--json OUT] [vLLM flags]

From the repository's root. One server, whose clients ask the same in a closed loop: what exits bring differs more from
prompt to prompt than what is to be seen here. Windows with listeners on `/early_exit/events` and without are
interleaved. Exit code 1 if the mean ratio is above --limit, or a request failed.
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from apparate_llm.eval.closed_loop import Clients, in_window, ratio_of
from apparate_llm.eval.prompts import load_prompts
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import ModelChoice, early_exits
from apparate_llm.machine import machine
from apparate_llm.serve import memory_flags, model_folder

SETTLING_S = 1.5  # after listeners have come or gone, not counted


async def window(url: str, num_listeners: int, seconds: float) -> tuple[float, float, int]:
    """(begin, end, events heard) of a window with so many listeners."""
    heard = 0

    async def listen() -> None:
        nonlocal heard
        address = urlsplit(url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b"GET /early_exit/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        try:
            while line := await reader.readline():
                heard += line.startswith(b"data:")
        finally:
            writer.close()

    listeners = [asyncio.create_task(listen()) for _ in range(num_listeners)]
    await asyncio.sleep(SETTLING_S)
    began, heard = time.monotonic(), 0
    await asyncio.sleep(seconds)
    ended = time.monotonic()
    assert not any(listener.done() for listener in listeners), "the server turned listeners away"
    for listener in listeners:
        listener.cancel()
    await asyncio.gather(*listeners, return_exceptions=True)
    return began, ended, heard


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--listeners", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--window-s", type=float, default=6.0)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--limit", type=float, default=1.03)
    parser.add_argument("--json", type=Path)
    args, flags = parser.parse_known_args()
    system = early_exits("exits", ModelChoice(model_folder(args.model), (*memory_flags(flags), *flags)))
    windows: dict[int, list[tuple[float, float, int]]] = {args.listeners: [], 0: []}
    with Server(system, log=Path(tempfile.mkdtemp()) / "server.log", start_timeout_s=900) as server:
        server.wait_ready()
        clients = Clients(server, load_prompts(None)[:1], args.clients, args.max_tokens)
        clients.start()
        asyncio.run(window(server.base_url, 0, 10.0))  # costs are learned
        for pair in range(args.pairs):
            for number in sorted(windows, reverse=bool(pair % 2)):
                windows[number].append(asyncio.run(window(server.base_url, number, args.window_s)))
        clients.end()
        clients.join()
    result = result_of(clients, windows, args.listeners)
    print(json.dumps(result))
    if args.json:
        command = "python -m scripts.check_listeners " + shlex.join(sys.argv[1:])
        args.json.write_text(json.dumps({"command": command, "machine": machine(), **result}, indent=1) + "\n")
    return int(result["ratio"] > args.limit or result["failed"] > 0)


def result_of(clients: Clients, windows: dict[int, list[tuple[float, float, int]]], listeners: int) -> dict[str, Any]:
    arrivals = clients.arrivals()
    tpt = {number: [in_window(arrivals, began, ended)[0] for began, ended, _ in own] for number, own in windows.items()}
    return {
        "listeners": listeners,
        "events_per_s": sum(heard for *_, heard in windows[listeners])
        / sum(ended - began for began, ended, _ in windows[listeners]),
        "tpt_ms": {"with": float(np.mean(tpt[listeners])), "without": float(np.mean(tpt[0]))},
        **ratio_of(tpt[listeners], tpt[0]),
        "failed": sum(bool(done.error) for done in clients.done),
    }


if __name__ == "__main__":
    sys.exit(main())
