"""How many threads may compute here, one on each core: as many as this process may use, and as its control groups give
it time for."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from apparate_llm.machine import cpu_quota

VISIBLE_NODES = "CPU_VISIBLE_MEMORY_NODES"  # vLLM's variable


@dataclass(frozen=True, slots=True)
class CpuLimits:
    num_cpus: int  # logical ones that this process may use
    cores: tuple[int, ...]  # of each core among them, on the memory node that vLLM computes on, one logical CPU
    quota: float | None  # CPUs whose time the control groups give; None: as much as there is

    @property
    def threads(self) -> int:
        return min(len(self.cores), self.logical_threads)

    @property
    def logical_threads(self) -> int:
        """The same where a thread may take each logical CPU."""
        return self.num_cpus if self.quota is None else max(1, min(self.num_cpus, int(self.quota)))

    @property
    def is_shared(self) -> bool:
        """Whether time is given out rather than CPUs: others then compute on the same ones."""
        return self.quota is not None and self.quota < self.num_cpus

    def sentence(self) -> str:
        cores = f"{len(self.cores)} core{'s' * (len(self.cores) != 1)}"
        cpus = "" if self.num_cpus == len(self.cores) else f" of {self.num_cpus} allowed CPUs"
        time = "" if self.quota is None else f", time of {self.quota:g} CPUs by the control group"
        return f"{cores}{cpus}{time}"


def cpu_limits(root: Path = Path("/"), mask: Iterable[int] | None = None) -> CpuLimits:
    """root: where /proc and /sys are; mask: logical CPUs that this thread may use, by itself those of its affinity."""
    allowed = set(os.sched_getaffinity(0) if mask is None else mask)
    on_node = allowed & _cpus_of_node(root) or allowed
    cores: dict[frozenset[int], int] = {}
    for cpu in sorted(on_node):
        siblings = _ids(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores[frozenset(siblings or [cpu])] = cpu  # the last one, as vLLM does
    return CpuLimits(len(allowed), tuple(sorted(cores.values())), cpu_quota(root))


def _cpus_of_node(root: Path) -> set[int]:
    """Of the first memory node that we may use; empty where there is only one, or it is not known."""
    visible = os.environ.get(VISIBLE_NODES, "")
    nodes = _allowed_nodes(root)
    if visible:
        nodes = [node for node in _parsed(visible) if node in nodes]
    return set(_ids(root / f"sys/devices/system/node/node{nodes[0]}/cpulist")) if nodes else set()


def _allowed_nodes(root: Path) -> list[int]:
    try:
        for line in (root / "proc/self/status").read_text().splitlines():
            if line.startswith("Mems_allowed_list:"):
                return _parsed(line.partition(":")[2])
    except OSError:
        pass
    return []


def _ids(file: Path) -> list[int]:
    """Empty where there is no such file."""
    try:
        return _parsed(file.read_text())
    except OSError:
        return []


def _parsed(text: str) -> list[int]:
    """[0, 1, 2, 5] of `0-2,5`; empty where it is something else."""
    cpus: list[int] = []
    try:
        for part in filter(None, text.strip().split(",")):
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    except ValueError:
        return []
    return cpus
