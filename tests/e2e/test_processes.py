"""The processes of a server: how they come to be, and the cores they may use."""

import os
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from tests.e2e.conftest import TINY_FLAGS


def mapped_at(process: psutil.Process) -> str:
    """Of what the kernel maps into every process at random: a fork has it where its parent has it."""
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return next(line.split("-")[0] for line in maps.splitlines() if line.endswith("[vdso]"))


def test_engine_and_worker_are_forks_and_only_the_worker_is_bound_to_its_cores(serve, tiny_llama, lens_ramps):
    flags = ("--ramps", str(lens_ramps(depth=3)), *TINY_FLAGS)
    with serve(str(tiny_llama), *flags) as base_url:
        check_processes(httpx.URL(base_url).port)


def check_processes(port: int | None) -> None:
    (api,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (command := process.info["cmdline"] or [])[-2:] == ["--port", str(port)] and "serve" in command
    ]
    engine, worker = (
        next(child for child in api.children(recursive=True) if child.cmdline()[0].strip() == title)
        for title in ("VLLM::EngineCore", "VLLM::Worker")
    )
    assert engine.ppid() == api.pid and worker.ppid() == engine.pid
    assert mapped_at(api) == mapped_at(engine) == mapped_at(worker)
    everything = frozenset(os.sched_getaffinity(0))
    assert allowed(engine) == {everything}
    deadline = time.monotonic() + 60
    while len(allowed(worker)) > 1 and time.monotonic() < deadline:
        time.sleep(0.2)  # what runs beside the start (engine/beside.py) may use any core, until it is done
    (bound,) = allowed(worker)
    assert bound < everything or len(everything) == 1


def allowed(process: psutil.Process) -> set[frozenset[int]]:
    """Sets of cores that threads of the process may use."""
    found = set()
    for thread in process.threads():
        with suppress(ProcessLookupError):  # it has ended
            found.add(frozenset(os.sched_getaffinity(thread.id)))
    return found
