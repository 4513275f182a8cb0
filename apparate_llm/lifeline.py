"""How the processes of a server end: together, and at once where a signal comes before it serves.

vLLM leaves its engines and workers behind where the process above them is killed; a fork of the server holds its
port as well. It makes SIGTERM during its start an exception, which it then catches itself and forgets.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PR_SET_PDEATHSIG = 1
TOGETHER = "APPARATE_ENDS_TOGETHER"  # set for all processes of `apparate-llm serve`
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
STDERR = 2
INTERNET = (socket.AF_INET, socket.AF_INET6)


class _Fork:
    """What a child knows of the moment it was forked in."""

    parent = 0
    by_main_thread = False


def tie_forks() -> None:
    """Every fork of this process, and every fork of a fork, ends with its parent and holds no socket of it."""
    os.environ[TOGETHER] = "1"
    # What a killed process shared is removed by Python's tracker, which need not say so.
    ignored = [given for given in [os.environ.get("PYTHONWARNINGS")] if given]
    os.environ["PYTHONWARNINGS"] = ",".join([*ignored, "ignore:resource_tracker"])
    os.register_at_fork(before=_about_to_fork, after_in_child=_forked)


def _about_to_fork() -> None:
    _Fork.parent = os.getpid()
    _Fork.by_main_thread = threading.get_native_id() == _Fork.parent


def _forked() -> None:
    signal.set_wakeup_fd(-1)  # no signal of its own is reported to the parent's event loop
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # the parent's handlers end a server, not this process
    drop_sockets()
    if _Fork.by_main_thread:  # the kernel means the thread: any other may end before the process does
        die_with(_Fork.parent)


def tie_to_parent() -> None:
    """The same for a process of vLLM's that was started anew. Called where it loads its plugins."""
    parent = multiprocessing.parent_process()
    if parent is None or TOGETHER not in os.environ or os.environ.get(START_METHOD) == "forkserver":
        return  # a child of the fork server has that for a parent
    assert parent.pid is not None
    die_with(parent.pid)


def die_with(parent: int) -> None:
    """Killed as soon as the thread that started this process ends; now, if the parent has ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def drop_sockets() -> None:
    """Let go of the sockets that others reach the parent at, or they wait for it when it is gone. The numbers stay
    taken: objects that were forked as well would close what comes to stand there."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the folder's own is closed by now
            if int(name) > STDERR and _leads_outside(int(name)):
                os.dup2(nothing, int(name), inheritable=False)
    os.close(nothing)


def _leads_outside(number: int) -> bool:
    """Whether it is a socket of the network or one with a name. Pipes and socket pairs are between parent and child."""
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        return False
    sock = socket.socket(fileno=number)
    try:
        return sock.family in INTERNET or (sock.family == socket.AF_UNIX and bool(sock.getsockname()))
    finally:
        sock.detach()


def end_at_once_on_signals() -> None:
    """Until the server has handlers of its own. Nothing needs to be undone by then."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_once)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """The end of this process and its children by the signal that came: no exception that somebody might catch."""
    os.write(STDERR, f"apparate-llm: stopped by {signal.Signals(number).name} while starting\n".encode())
    for child in multiprocessing.active_children():
        child.kill()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def ignore_signals() -> None:
    """When the server has ended in order: what comes now must not change its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Terminated(SystemExit):
    """SIGTERM has come to a command that undoes or keeps something before it ends."""

    # A SystemExit, as event loops let no other exception through that a signal's handler raises.


def exit_on_sigterm() -> None:
    """From here on SIGTERM unwinds this process like an error, so that what it started is stopped."""
    signal.signal(signal.SIGTERM, _unwind)


def _unwind(number: int, frame: FrameType | None) -> None:
    raise Terminated(128 + number)


@contextmanager
def undone_by_sigterm() -> Iterator[None]:
    """Around work that a SIGTERM must not leave half done: what its `finally` blocks undo is undone, then the process
    ends by the signal. In other threads than the main one there are no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    except Terminated:
        if before is _unwind:  # somebody above undoes and says more
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
