"""How vLLM is made to use this machine: its queues, its worker, huge pages and kernels."""

import os
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apparate_llm.engine.vllm_args import PROPOSER_CLASS
from apparate_llm.patches import guard
from apparate_llm.patches.ledger import LEDGER

ROOT = Path(__file__).parents[2]


class Poller:
    """In place of a reader's sockets: what it waited, in ms."""

    def __init__(self) -> None:
        self.waited: list[int | None] = []

    def poll(self, timeout: int | None = None) -> list[Any]:
        self.waited.append(timeout)
        return []


def reader() -> Any:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    made: Any = SpinCondition.__new__(SpinCondition)
    made.is_reader, made.busy_loop_s, made.last_read = True, 1.0, time.monotonic()
    made.poller, made.read_cancel_socket, made.local_notify_socket = Poller(), None, None
    return made


def test_a_reader_that_blocks_never_spins_and_looks_often_until_notices_reach_it(monkeypatch):
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    from apparate_llm.patches import block_queues

    blocks, spins = reader(), reader()
    SpinCondition.wait(spins, 5000)
    assert spins.poller.waited == [], "vLLM's own spins after a read"
    wait = block_queues.wrapped(SpinCondition.wait)
    for timeout_ms in (5000, None, 7):
        wait(blocks, timeout_ms)
    assert blocks.poller.waited == [20, 20, 7]
    now_s = time.monotonic()
    monkeypatch.setattr(block_queues.time, "monotonic", lambda: now_s + block_queues.FIRST_S + 1)
    for timeout_ms in (5000, None):
        wait(blocks, timeout_ms)
    assert blocks.poller.waited[3:] == [5000, None]


MACHINE = ("block_queues", "worker_in_engine")


def test_nothing_of_the_use_of_this_machine_is_applied_unasked(monkeypatch):
    for name in ("APPARATE_QUEUES", "APPARATE_WORKER"):
        monkeypatch.delenv(name, raising=False)
    ours = [patch for patch in LEDGER if patch.file in MACHINE]
    assert len(ours) == 4 and not any(patch.apply(patch) for patch in ours)


def test_it_is_applied_where_it_is_asked_for(monkeypatch):
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.utils import CoreEngineProcManager

    monkeypatch.setenv("APPARATE_QUEUES", "block")
    monkeypatch.setenv("APPARATE_WORKER", "engine")
    for owner, name in (
        (SpinCondition, "wait"),
        (CoreEngineProcManager, "__init__"),
        (EngineCoreProc, "process_input_sockets"),
        (EngineCoreProc, "process_output_sockets"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])  # as they are now again in the end
    ours = [patch for patch in LEDGER if patch.file in MACHINE]
    assert all(patch.apply(patch) for patch in ours)
    assert not any(patch.apply(patch) for patch in ours), "once in a process"


@pytest.fixture
def started(monkeypatch):
    """started(executor, engines): the variables of threads while such engines start."""
    from apparate_llm.patches.worker_in_engine import started as wrapped

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0,1")
    monkeypatch.setenv("LD_PRELOAD", "/lib/libiomp5.so")
    for name in ("OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    seen: list[dict[str, str]] = []

    def original(self: object, local_engine_count: int, vllm_config: object, executor_class: type) -> None:
        seen.append({name: value for name, value in os.environ.items() if name.startswith(("OMP_", "KMP_"))})

    parallel = SimpleNamespace(local_world_size=1, data_parallel_rank_local=None, _api_process_count=1)
    config = SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)

    def run(executor: type, engines: int = 1) -> dict[str, str]:
        wrapped(original)(object(), engines, vllm_config=config, executor_class=executor)
        return seen.pop()

    return run


def test_an_engine_that_computes_has_a_workers_variables_and_the_server_has_not(started, monkeypatch):
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    env = started(UniProcExecutor)
    assert env["OMP_NUM_THREADS"] == "2" and "proclist=[0,1]" in env["KMP_AFFINITY"]
    assert env["KMP_BLOCKTIME"] == "5"
    assert "OMP_NUM_THREADS" not in os.environ and "KMP_AFFINITY" not in os.environ
    assert "OMP_NUM_THREADS" not in started(MultiprocExecutor), "its worker gets them"
    assert "OMP_NUM_THREADS" not in started(UniProcExecutor, 2), "several engines share this machine"
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    assert started(UniProcExecutor)["KMP_BLOCKTIME"] == "0" == os.environ["KMP_BLOCKTIME"]


def test_who_reads_and_writes_may_use_the_cores_of_the_servers_process():
    from apparate_llm.patches.worker_in_engine import on_any_core

    before = os.sched_getaffinity(0)
    affinities = []

    def bound() -> None:
        os.sched_setaffinity(0, {min(before)})
        affinities.append(on_any_core(lambda: os.sched_getaffinity(0))())

    thread = threading.Thread(target=bound)  # only that thread is bound
    thread.start()
    thread.join()
    assert affinities == [os.sched_getaffinity(os.getppid())]


def test_weights_go_to_huge_pages_where_no_runner_of_ours_moves_them(monkeypatch):
    from vllm.v1.worker.gpu_worker import Worker

    from apparate_llm.engine import huge_pages, plain_pages

    moved = []
    monkeypatch.setattr(huge_pages, "use_huge_pages", lambda: moved.append("moved"))
    load = plain_pages.wrapped(lambda self, *, load_dummy_weights=False: moved.append(load_dummy_weights))
    load(SimpleNamespace(vllm_config=SimpleNamespace(speculative_config=None)), load_dummy_weights=True)
    assert moved == [True, "moved"]
    ours = SimpleNamespace(method="custom_class", model=PROPOSER_CLASS)
    load(SimpleNamespace(vllm_config=SimpleNamespace(speculative_config=ours)))
    assert moved == [True, "moved", False], "with exits it is the option's"

    monkeypatch.setattr(Worker, "load_model", Worker.load_model)
    original = Worker.load_model
    for value in ("", "0"):
        monkeypatch.setenv("APPARATE_HUGE_PAGES", value)
        plain_pages.move_after_loading()
        assert Worker.load_model is original
    monkeypatch.setenv("APPARATE_HUGE_PAGES", "1")
    plain_pages.move_after_loading()
    once = Worker.load_model
    plain_pages.move_after_loading()
    assert Worker.load_model is once is not original


def test_vllms_own_platform_is_taken_where_its_kernels_are_wanted(monkeypatch):
    from vllm.platforms.cpu import CpuPlatform

    from apparate_llm.plugin import platform

    monkeypatch.setenv("APPARATE_KERNELS", "stock")
    named = platform()
    assert named is not None and guard.named(named) is CpuPlatform
    for value in ("", "zentorch"):
        monkeypatch.setenv("APPARATE_KERNELS", value)
        assert platform() is None
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["vllm.platform_plugins"] == {"apparate": "apparate_llm.plugin:platform"}


def test_a_server_does_not_start_with_other_kernels_than_were_chosen(monkeypatch):
    from vllm.platforms import current_platform

    from apparate_llm.config import ConfigError
    from apparate_llm.engine.vllm_start import check_platform

    for wanted, is_zen, fits in (
        ("stock", False, True), ("zentorch", True, True), ("stock", True, False), ("zentorch", False, False)
    ):  # fmt: skip
        monkeypatch.setenv("APPARATE_KERNELS", wanted)
        monkeypatch.setattr(type(current_platform), "is_zen_cpu", lambda self, is_zen=is_zen: is_zen)
        if fits:
            check_platform()
        else:
            with pytest.raises(ConfigError, match=f"{wanted} kernels are wanted, and vLLM has chosen others"):
                check_platform()
