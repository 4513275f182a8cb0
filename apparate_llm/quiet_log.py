"""Engines in this process log into a file, and the user reads what we say.

vLLM logs to the descriptors 1 and 2 from Python, from its libraries and its children; one library still does at the
very end of the interpreter. So the descriptors lead to the file for good, and our own lines go to duplicates.
"""

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console

PRIVATE = 0o600  # it may hold prompts
LAST_LINES = 15
OUT, ERR = 1, 2


@contextmanager
def log_of_engines(path: Path | None = None) -> Iterator[Console]:
    """From here on what is written to stdout and stderr ends in `path`, behind what that holds, for the rest of the
    process. Yields the console for the user, on stderr as it was; afterwards Python's streams are the user's again.
    If the block fails by more than bad input, the user sees the end of the log. Without a path there is one among the
    temporary files, which stays only then. Raises OSError if it cannot be written.
    """
    log, failed = path or _temporary(), False
    began = _begin(log)
    users = {name: _redirected(name, number, log) for name, number in (("stdout", OUT), ("stderr", ERR))}
    console = Console(file=users["stderr"])
    _say(console, f"vLLM's log: {log}" + ("" if path else " (removed at the end if nothing fails)"))
    try:
        yield console
    except (ValueError, OSError):  # one line says it
        raise
    except Exception:
        failed = True
        _say(console, *end_of(log, began))
        raise
    finally:
        for name, stream in users.items():
            with suppress(OSError, ValueError):
                getattr(sys, name).flush()
            setattr(sys, name, stream)
        if path is None and not failed:
            log.unlink(missing_ok=True)


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _temporary() -> Path:
    handle, name = tempfile.mkstemp(prefix="apparate-llm-", suffix=".log")
    os.close(handle)
    return Path(name)


def _begin(path: Path) -> int:
    """Make the log, if it is not there, the owner's only; returns its size."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT, PRIVATE)
    os.fchmod(log, PRIVATE)
    size = os.fstat(log).st_size
    os.close(log)
    return size


def _redirected(name: str, number: int, path: Path) -> TextIO:
    """Let the descriptor lead to the log; returns a stream to where it led."""
    stream = getattr(sys, name)
    if stream is not None:
        stream.flush()
    try:
        kept = os.dup(number)
    except OSError:  # closed by who started us
        nothing = os.open(os.devnull, os.O_WRONLY)  # which takes the number itself, or another one that is free
        kept = fcntl.fcntl(nothing, fcntl.F_DUPFD_CLOEXEC, ERR + 1)
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, number)
    os.close(log)
    if stream is None:
        setattr(sys, name, os.fdopen(number, "w", closefd=False))
        return os.fdopen(kept, "w")
    return os.fdopen(kept, "w", encoding=stream.encoding, errors=stream.errors, buffering=1)


def end_of(log: Path, began: int) -> list[str]:
    """The last lines of this run in a log, under a heading."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(began)
        if lines := file.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]:
            return [f"the last lines of {log}:", *(f"  {line}" for line in lines)]
    return []
