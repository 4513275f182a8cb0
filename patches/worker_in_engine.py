"""wrap: the start of an engine whose worker is in its own process, and the threads in which that engine reads and
writes.

vLLM binds threads that compute to cores by variables that it sets for a worker's process. Where there is none they have
to stand before the engine's begins. The server's process, which goes on beside it, must not have them. In the engine
the thread that computes is bound as well, and so were all that it starts later: who reads and writes may use any core.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING

from apparate_llm.host.choice import WORKER
from apparate_llm.patches.guard import Patch, Target, check_target

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BLOCKTIME = "KMP_BLOCKTIME"


def started(original: Target) -> Target:
    """`CoreEngineProcManager.__init__` that gives the engine a worker's variables."""

    @wraps(original)
    def start(self: object, *args: object, **kwargs: object) -> None:
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        given = signature(original).bind(self, *args, **kwargs).arguments
        if given["local_engine_count"] != 1 or not issubclass(given["executor_class"], UniProcExecutor):
            original(self, *args, **kwargs)
            return
        with _variables_of_a_worker(given["vllm_config"]):
            original(self, *args, **kwargs)

    return start


@contextmanager
def _variables_of_a_worker(vllm_config: "VllmConfig") -> Iterator[None]:
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    chosen = os.environ.get(BLOCKTIME)
    with OMPProcessManager(vllm_config).configure_omp_envs(0, 0):
        if chosen is not None:  # by the user, over whose word vLLM goes
            os.environ[BLOCKTIME] = chosen
        yield


def on_any_core(original: Target) -> Target:
    """`process_input_sockets` or `process_output_sockets`, in a thread that may use the cores of the server's
    process."""

    @wraps(original)
    def run(*args: object, **kwargs: object) -> object:
        with suppress(OSError):
            os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
        return original(*args, **kwargs)

    return run


def apply_to_start(patch: Patch) -> bool:
    if not is_wanted():
        return False
    from vllm.v1.engine.utils import CoreEngineProcManager

    return _apply(patch, CoreEngineProcManager, "__init__", started)


def apply_to_input(patch: Patch) -> bool:
    return _apply_to_sockets(patch, "process_input_sockets")


def apply_to_output(patch: Patch) -> bool:
    return _apply_to_sockets(patch, "process_output_sockets")


def is_wanted() -> bool:
    return os.environ.get(WORKER) == "engine"


def _apply_to_sockets(patch: Patch, name: str) -> bool:
    if not is_wanted():
        return False
    from vllm.v1.engine.core import EngineCoreProc

    return _apply(patch, EngineCoreProc, name, on_any_core)


def _apply(patch: Patch, owner: type, name: str, wrap: Callable[[Target], Target]) -> bool:
    original = vars(owner)[name]
    if hasattr(original, "__wrapped__"):
        return False
    check_target(patch, original)
    setattr(owner, name, wrap(original))
    return True
