"""A faster start: importing vLLM takes longer than loading a small model, and each of the engine's processes imports
it anew. Here one process imports it, beside the API server's own import, and the others are forked from it.

It runs nothing but imports, so no thread and no OpenMP runtime exists that a fork would break: vLLM's thread binding,
which is read from the environment when that runtime starts, works in a forked process as in a fresh one.
"""

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, ClassVar

PRELOAD = "apparate_llm.preload"
_SERVER: Any = forkserver._forkserver


def start() -> None:
    """Begin the import, in a process of its own; returns at once."""
    multiprocessing.set_forkserver_preload([PRELOAD])
    forkserver.ensure_running()


class Process(ForkServerProcess):
    """A forked process with the environment its parent has when it starts it, as a spawned one would have."""

    def start(self) -> None:
        self.environment = dict(os.environ)
        forkserver.ensure_running()
        self.address = _SERVER._forkserver_address
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        # Its own children come from the same server; Python would start another one for them.
        _SERVER._forkserver_address = self.address
        _SERVER.ensure_running = forkserver.ensure_running = lambda: None
        super().run()


class Context(ForkServerContext):
    Process: ClassVar[Any] = Process  # type: ignore[misc]
