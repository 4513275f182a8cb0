"""How a server uses this machine, as variables for its processes and as a line for its user."""

import importlib.util
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from apparate_llm.host.dtype import CPU_INFO
from apparate_llm.host.limits import CpuLimits
from apparate_llm.launch import is_cpu_build

Kernels = Literal["stock", "zentorch"]
Queues = Literal["spin", "block"]
Worker = Literal["process", "engine"]
ZENTORCH = "zentorch"  # AMD's library, as a package

# vLLM's variables.
BIND = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
OWN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"  # 0: the worker is where the engine is
NOT_BOUND = "nobind"  # a value of BIND
CACHE_ROOT = "VLLM_CACHE_ROOT"
THREADS = "OMP_NUM_THREADS"  # OpenMP's; vLLM sets it itself where it binds threads
# Ours, read by patches/, plugin.py and engine/plain_pages.py in each of vLLM's processes.
KERNELS, HUGE_PAGES = "APPARATE_KERNELS", "APPARATE_HUGE_PAGES"
QUEUES, WORKER = "APPARATE_QUEUES", "APPARATE_WORKER"

BLOCKTIME_MS = 5  # for which a thread without work spins: what vLLM sets where it binds threads


class Choice(BaseModel):
    """None: as vLLM has it, without us."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: Literal["all"] | Annotated[int, Field(ge=1)] | None = None  # that compute; all: one on each core
    kernels: Kernels | None = None
    huge_pages: bool | None = None  # None: of servers with exits only
    queues: Queues = "spin"  # what who waits at a queue between engine and worker does
    worker: Worker = "process"  # where it computes: a process of its own, or the engine's


AS_VLLM = Choice()  # with --tuning off
DEFAULT = Choice(threads="all", huge_pages=True, worker="engine")  # where nothing was measured


def has_zentorch() -> bool:
    """Whether vLLM uses it here, unless it is told otherwise."""
    return importlib.util.find_spec(ZENTORCH) is not None and takes_zentorch()


def takes_zentorch(cpu_info: Path = CPU_INFO) -> bool:
    """Whether vLLM would use it on this CPU, were it installed: as its `_is_amd_zen_cpu` has it."""
    try:
        text = cpu_info.read_text()
    except OSError:
        return False
    return "AuthenticAMD" in text and "avx512" in text and is_cpu_build()


def num_threads(choice: Choice, limits: CpuLimits) -> int | None:
    if choice.threads is None:
        return None
    return limits.threads if choice.threads == "all" else min(choice.threads, limits.threads)


def variables(choice: Choice, limits: CpuLimits) -> dict[str, str]:
    """By which vLLM's processes, ours or plain ones, follow the choice."""
    env = _thread_variables(num_threads(choice, limits), limits)
    if choice.kernels is not None and has_zentorch():
        env[KERNELS] = choice.kernels
    if choice.kernels == "zentorch":  # a compiled pass calls its kernels, and vLLM's key for it does not tell them
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        env[CACHE_ROOT] = str(Path(cache) / "vllm" / ZENTORCH)
    if choice.huge_pages is not None:
        env[HUGE_PAGES] = str(int(choice.huge_pages))
    if choice.queues == "block":
        env[QUEUES] = "block"
    if choice.worker == "engine":
        env |= {WORKER: "engine", OWN_PROCESS: "0"}
    return env


def _thread_variables(number: int | None, limits: CpuLimits) -> dict[str, str]:
    if number is None:
        return {}
    if not limits.is_shared:
        return {BIND: ",".join(map(str, limits.cores[:number]))}
    # Bound to the first CPUs, all containers with a share of the time would compute on the same ones.
    spin = {"KMP_BLOCKTIME": str(BLOCKTIME_MS), "KMP_TPAUSE": "0"}
    return {BIND: NOT_BOUND, THREADS: str(number)} | spin


def environment(choice: Choice, limits: CpuLimits, given: Mapping[str, str]) -> dict[str, str]:
    """Variables to set beside those `given`: what a user has set stays, and what belongs to it. OpenMP's number of
    threads does not: vLLM goes over it where it binds them, and so do we where they are not bound."""
    env = variables(choice, limits)
    for names in ((BIND, RESERVED), (WORKER, OWN_PROCESS)):
        if any(name in given for name in names):
            env = {name: value for name, value in env.items() if name not in names}
    ours = {THREADS} if env.get(BIND) == NOT_BOUND else set()
    return {name: value for name, value in env.items() if name not in given or name in ours}


def line(choice: Choice, limits: CpuLimits, given: Mapping[str, str], origin: str) -> str:
    """One for the start: what is in force, and why."""
    parts = [
        _part(given, (BIND, RESERVED), _threads_text(choice, limits)),
        _part(given, (KERNELS,), kernels_text(choice)),
        _part(given, (HUGE_PAGES,), _pages_text(choice)),
        _part(given, (QUEUES,), _queues_text(choice)),
        _part(
            given,
            (WORKER, OWN_PROCESS),
            "worker in the engine's process" if choice.worker == "engine" else "worker in a process of its own",
        ),
    ]
    return f"Tuned: {', '.join(filter(None, parts))} ({origin})"


def _part(given: Mapping[str, str], names: tuple[str, ...], text: str) -> str:
    by_hand = [f"{name}={given[name]}" for name in names if name in given]
    return " and ".join(by_hand) or text


def _threads_text(choice: Choice, limits: CpuLimits) -> str:
    number = num_threads(choice, limits)
    return "threads as vLLM gives them" if number is None else f"{number} of {limits.threads} threads"


def kernels_text(choice: Choice) -> str:
    if choice.kernels == "stock" or not has_zentorch():
        return "stock kernels"
    try:
        return f"{ZENTORCH} {version(ZENTORCH)}"
    except PackageNotFoundError:  # importable, without a record of its installation
        return ZENTORCH


def _queues_text(choice: Choice) -> str:
    if choice.worker == "engine":
        return ""  # there are none
    return "blocking queues" if choice.queues == "block" else "spinning queues"


def _pages_text(choice: Choice) -> str:
    if choice.huge_pages is None:
        return "huge pages with exits only"
    return "huge pages" if choice.huge_pages else "small pages"
