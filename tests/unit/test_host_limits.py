"""How many threads may compute: within the affinity mask, the cores and the control groups' share of time."""

import os
from pathlib import Path

import pytest

from apparate_llm import doctor
from apparate_llm.host.limits import CpuLimits, cpu_limits

SHARED = CpuLimits(num_cpus=4, cores=(0, 1, 2, 3), quota=2.5)


def fake_root(root: Path, cgroup: str = "", files: dict[str, str] | None = None, *, mems: str = "0") -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/status").write_text(f"Name:\tpython\nMems_allowed_list:\t{mems}\n")
    for name, text in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def topology(siblings: list[str], nodes: dict[int, str]) -> dict[str, str]:
    """siblings: of each logical CPU in turn."""
    cpus = {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": text for i, text in enumerate(siblings)}
    return cpus | {f"sys/devices/system/node/node{node}/cpulist": text for node, text in nodes.items()}


QUOTAS = {
    "no control group": ("", {}, None, 4),
    "version 2, no limit": ("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "max 100000"}, None, 4),
    "version 2, the root of a container": ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0, 2),
    "version 2, a group above ours": (
        "0::/pod/x\n",
        {"sys/fs/cgroup/pod/cpu.max": "150000 100000", "sys/fs/cgroup/pod/x/cpu.max": "max 100000"},
        1.5,
        1,
    ),
    "version 2, the tighter of two": (
        "0::/pod/x\n",
        {"sys/fs/cgroup/pod/cpu.max": "300000 100000", "sys/fs/cgroup/pod/x/cpu.max": "50000 50000"},
        1.0,
        1,
    ),
    "version 2, the host's path seen from a container": (
        "0::/docker/x\n",
        {"sys/fs/cgroup/cpu.max": "300000 100000"},
        3.0,
        3,
    ),
    "version 2, less than a CPU": ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5, 1),
    "version 2, more than there are": ("0::/\n", {"sys/fs/cgroup/cpu.max": "1600000 100000"}, 16.0, 4),
    "version 2, unreadable": ("0::/\n", {"sys/fs/cgroup/cpu.max": "much"}, None, 4),
    "version 1, no limit": (
        "4:cpu,cpuacct:/a\n",
        {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"},
        None,
        4,
    ),
    "version 1, a group above ours": (
        "9:name=systemd:/a\n4:cpu,cpuacct:/a/b\n3:cpuset:/a\n0::/\n",
        {
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
        },
        2.5,
        2,
    ),
    "both, the tighter": (
        "1:cpu:/a\n0::/b\n",
        {
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "300000",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/unified/b/cpu.max": "200000 100000",
        },
        2.0,
        2,
    ),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_threads_are_no_more_than_control_groups_give_time_for(name, tmp_path):
    cgroup, files, quota, threads = QUOTAS[name]
    limits = cpu_limits(fake_root(tmp_path, cgroup, files), mask={0, 1, 2, 3})
    assert (limits.quota, limits.threads, limits.num_cpus) == (quota, threads, 4)
    assert limits.is_shared == (quota is not None and quota < 4) and limits.logical_threads == threads


CORES = {
    "each CPU a core": (["0", "1", "2", "3"], {0: "0-3"}, "0", {0, 1, 2, 3}, (0, 1, 2, 3)),
    "two CPUs share a core": (["0,2", "1,3", "0,2", "1,3"], {0: "0-3"}, "0", {0, 1, 2, 3}, (2, 3)),
    "neighbours share a core": (["0-1", "0-1", "2-3", "2-3"], {0: "0-3"}, "0", {0, 1, 2, 3}, (1, 3)),
    "one of the two is ours": (["0,2", "1,3", "0,2", "1,3"], {0: "0-3"}, "0", {0, 1, 3}, (0, 3)),
    "a mask": (["0", "1", "2", "3"], {0: "0-3"}, "0", {1, 3}, (1, 3)),
    "two memory nodes": (["0", "1", "2", "3"], {0: "0-1", 1: "2-3"}, "0-1", {0, 1, 2, 3}, (0, 1)),
    "the second of them": (["0", "1", "2", "3"], {0: "0-1", 1: "2-3"}, "1", {0, 1, 2, 3}, (2, 3)),
    "a node without CPUs of ours": (["0", "1", "2", "3"], {0: "0-1", 1: "2-3"}, "0", {2, 3}, (2, 3)),
    "nothing known": ([], {}, "0", {0, 1}, (0, 1)),
}


@pytest.mark.parametrize("name", CORES)
def test_one_thread_computes_on_each_core_of_the_node_that_vllm_uses(name, tmp_path):
    siblings, nodes, mems, mask, cores = CORES[name]
    limits = cpu_limits(fake_root(tmp_path, files=topology(siblings, nodes), mems=mems), mask)
    assert (limits.cores, limits.num_cpus, limits.threads) == (cores, len(mask), len(cores))
    assert limits.logical_threads == len(mask)


def test_the_memory_node_may_be_chosen_by_vllms_variable(tmp_path, monkeypatch):
    root = fake_root(tmp_path, files=topology(["0", "1", "2", "3"], {0: "0-1", 1: "2-3"}), mems="0-1")
    monkeypatch.setenv("CPU_VISIBLE_MEMORY_NODES", "1")
    assert cpu_limits(root, {0, 1, 2, 3}).cores == (2, 3)
    monkeypatch.setenv("CPU_VISIBLE_MEMORY_NODES", "7")  # not ours
    assert cpu_limits(root, {0, 1, 2, 3}).cores == (0, 1, 2, 3)


def test_limits_here_are_within_the_affinity_mask():
    limits = cpu_limits()
    assert set(limits.cores) <= os.sched_getaffinity(0) and 1 <= limits.threads <= len(limits.cores)


def test_a_preparation_has_no_more_threads_than_there_is_time_for(monkeypatch):
    from apparate_llm.prepare import engine

    for limits, number in ((SHARED, "2"), (CpuLimits(num_cpus=8, cores=(4, 5, 6, 7), quota=None), "8")):
        monkeypatch.setattr(engine, "cpu_limits", lambda limits=limits: limits)
        assert engine.environment()["OMP_NUM_THREADS"] == number


def test_doctor_says_how_many_threads_may_compute(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_limits", lambda: SHARED)
    (finding,) = doctor.check_threads()
    assert finding.what == "2 threads may compute: 4 cores, time of 2.5 CPUs by the control group"
    monkeypatch.setattr(doctor, "cpu_limits", lambda: CpuLimits(num_cpus=2, cores=(1,), quota=None))
    (finding,) = doctor.check_threads()
    assert finding.what == "1 thread may compute: 1 core of 2 allowed CPUs"
