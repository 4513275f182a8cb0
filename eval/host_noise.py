"""What else happens on the machine while it measures: its speed of the moment, stolen time, energy."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

PROBE_BYTES = 64 << 20
RAPL = Path("/sys/class/powercap")
_probed = np.ones(PROBE_BYTES // 8)


class ProcessorTimes(NamedTuple):
    stolen_s: float
    all_s: float


def probe_ms() -> float:
    """Time to read 64 MiB, the fastest of three: what decoding is bound by, too."""
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        _probed.sum()
        spent.append((time.perf_counter() - began) * 1e3)
    return min(spent)


def processor_times() -> ProcessorTimes:
    times = psutil.cpu_times()
    return ProcessorTimes(getattr(times, "steal", 0.0), sum(times))


def stolen_frac(before: ProcessorTimes, after: ProcessorTimes) -> float:
    spent_s = after.all_s - before.all_s
    return (after.stolen_s - before.stolen_s) / spent_s if spent_s > 0 else 0.0


def energy_j() -> float | None:
    """Of the processor packages since some moment, None where the machine does not tell (Intel RAPL)."""
    try:
        counters = [int((zone / "energy_uj").read_text()) for zone in RAPL.glob("intel-rapl:?")]
    except (OSError, ValueError):
        return None
    return sum(counters) / 1e6 if counters else None
