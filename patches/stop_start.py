"""wrap: the step of vLLM's start before which it makes SIGTERM an exception.

A part of the start catches that exception and goes on, so the signal is lost; elsewhere it ends in a trace. Here both
signals end the start at once. vLLM's own handlers take their place when it serves.
"""

from argparse import Namespace
from functools import wraps
from typing import Any

from apparate_llm.lifeline import end_at_once_on_signals
from apparate_llm.patches.guard import Patch, Target, check_target


def wrapped(stock: Target) -> Target:
    """`setup_server(args, *, reuse_port)` after which the start ends at once by a signal."""

    @wraps(stock)
    def setup_server(args: Namespace, *, reuse_port: bool) -> Any:
        end_at_once_on_signals()
        return stock(args, reuse_port=reuse_port)

    return setup_server


def apply(patch: Patch) -> bool:
    from vllm.entrypoints.launchers.api_server import entry

    stock = vars(entry)["setup_server"]  # that module's own name for it
    if getattr(stock, "ends_at_once", False):
        return False
    check_target(patch, entry.run_server)
    ours = wrapped(stock)
    vars(ours)["ends_at_once"] = True
    vars(entry)["setup_server"] = ours
    return True
