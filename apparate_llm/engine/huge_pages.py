"""Weights in pages of 2 MB instead of 4 kB: a pass reads all of them, and a CPU looks up far fewer addresses then.

Linux gives such pages to whoever asks, where its administrator left that to programs (`madvise`, the usual setting),
and since version 6.1 (MADV_COLLAPSE) for memory that is in use already. Where it does not, nothing changes.
"""

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from vllm.logger import init_logger

from apparate_llm.engine.background import run_in_background

logger = init_logger("vllm.apparate")
PAGE = 2 << 20
LEAST = 2 * PAGE  # of a mapping
AT_ONCE = 16 * PAGE  # other threads that want memory wait for as much
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # <asm-generic/mman-common.h>
ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0\s*(\[heap\])?$")


def use_huge_pages() -> Thread | None:
    """Begin to move what this process has allocated so far, in a thread beside it; None where that is not possible."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        ranges = allocated(Path("/proc/self/maps").read_text())
    except OSError as error:
        logger.warning("Weights stay in small pages: %s", error)
        return None
    return run_in_background(lambda: _run(ranges), "huge-pages")


def allocated(maps: str) -> list[tuple[int, int]]:
    """(first, end) of the whole huge pages within each large allocation; maps: /proc/PID/maps."""
    ranges = []
    for match in filter(None, map(ANONYMOUS.match, maps.splitlines())):
        first, end = -(-int(match[1], 16) // PAGE) * PAGE, int(match[2], 16) // PAGE * PAGE
        if end - first >= LEAST:
            ranges.append((first, end))
    return ranges


def move(ranges: list[tuple[int, int]], advise: Callable[[int, int, int], bool]) -> int:
    """Bytes that are in huge pages now. advise(first, size, advice): whether the kernel did it."""
    moved = 0
    for first, end in ranges:
        if not advise(first, end - first, MADV_HUGEPAGE):
            continue
        for start in range(first, end, AT_ONCE):
            size = min(AT_ONCE, end - start)
            moved += size * advise(start, size, MADV_COLLAPSE)
    return moved


def advise(first: int, size: int, advice: int) -> bool:
    """Ask the kernel; whether it did it. It may be short of memory that hangs together."""
    failed: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)
    return failed == 0


def _run(ranges: list[tuple[int, int]]) -> None:
    moved = move(ranges, advise)
    logger.info("%d of %d MB of weights in huge pages", moved >> 20, sum(end - first for first, end in ranges) >> 20)
