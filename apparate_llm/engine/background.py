"""Work in a thread beside the computing one."""

import os
from collections.abc import Callable
from contextlib import suppress
from threading import Thread


def run_in_background(work: Callable[[], object], name: str) -> Thread:
    """Begin `work` in a thread that may use any core. By itself it would have that of the thread that starts it, which
    in a worker is the one that computes."""

    def run() -> None:
        with suppress(OSError):  # where the process may not choose, it stays where it is
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        work()

    thread = Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
