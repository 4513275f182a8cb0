"""wrap: the step of vLLM's start before which it makes SIGTERM an exception.

A part of the start catches that exception and goes on, so the signal is lost; elsewhere it ends in a trace. Here both
signals end the start at once. vLLM's own handlers take their place when it serves.
"""

from argparse import Namespace
from functools import wraps

from apparate_llm.lifeline import end_at_once_on_signals
from apparate_llm.patches.guard import Patch, Target, check_target


def wrapped(original: Target) -> Target:
    """`setup_server(args, *, reuse_port)` after which the start ends at once by a signal."""

    @wraps(original)
    def setup_server(args: Namespace, *, reuse_port: bool) -> object:
        end_at_once_on_signals()
        return original(args, reuse_port=reuse_port)

    return setup_server


def apply(patch: Patch) -> bool:
    from vllm.entrypoints.launchers.api_server import entry

    original = vars(entry)["setup_server"]  # that module's own name for it
    if getattr(original, "ends_at_once", False):
        return False
    check_target(patch, entry.run_server)
    ours = wrapped(original)
    vars(ours)["ends_at_once"] = True
    vars(entry)["setup_server"] = ours
    return True
