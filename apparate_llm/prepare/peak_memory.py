"""How much memory a preparation has had, as it goes."""

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

EVERY_S = 1.0
COUNTED = ("RssAnon:", "RssShmem:")  # not pages of files: rows and weights, which the system takes back as it likes


class PeakMemory:
    """Of this process and its children while it is entered, in bytes."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while True:
            self.peak_bytes = max(self.peak_bytes, sum(map(memory_bytes, _family(own))))
            if self._ended.wait(EVERY_S):
                return


def _family(own: psutil.Process) -> list[int]:
    with suppress(psutil.Error):
        return [own.pid, *(child.pid for child in own.children(recursive=True))]
    return [own.pid]


def memory_bytes(pid: int) -> int:
    """Of one process; 0 where it has ended."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(line[1]) << 10 for line in lines if line and line[0] in COUNTED)
