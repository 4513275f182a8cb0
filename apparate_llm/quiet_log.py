"""Engines in this process log into a file, and the user reads what we say.

vLLM logs to the descriptors 1 and 2 from Python, from its libraries and its children; one library still does at the
very end of the interpreter. So the descriptors lead to the file for good, and our own lines go to duplicates.
"""

import fcntl
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from apparate_llm.lifeline import Terminated, tell_user_at
from apparate_llm.log_watch import LogWatch, Message

PRIVATE = 0o600  # it may hold prompts
LAST_LINES = 15
OUT, ERR = 1, 2


@contextmanager
def log_of_engines(
    path: Path | None = None, *, note: str = "", beat: Callable[[Console], None] | None = None
) -> Iterator[Console]:
    """From here on what is written to stdout and stderr ends in `path`, behind what that holds, for the rest of the
    process. Yields the console for the user, on stderr as it was; afterwards Python's streams are the user's again.
    If the block fails by more than bad input, the user sees the end of the log. Without a path there is one among the
    temporary files, which stays only then. note: stands behind the log's name. beat: for a block that does not end by
    itself, called five times a second; the user then sees errors and our warnings as they come. Raises OSError if the
    log cannot be written.
    """
    log, failed = path or _temporary(), False
    began = _begin(log)
    users = {name: _redirected(name, number, log) for name, number in (("stdout", OUT), ("stderr", ERR))}
    tell_user_at(users["stderr"].fileno())
    console = Console(file=users["stderr"])
    _say(console, f"vLLM's log: {log}{note}" + ("" if path else " (removed at the end if nothing fails)"))
    watch = None if beat is None else LogWatch(log, began, partial(_tell, console), partial(beat, console))
    try:
        if watch is not None:
            watch.start()
        yield console
    except BaseException as error:
        failed = _is_failure(error)
        raise
    finally:
        if watch is not None:
            watch.stop()
        if failed:
            has_errors = watch is not None and watch.num_errors > 0
            _say(console, *([f"all of it: {log}"] if has_errors else end_of(log, began)))
        for name, stream in users.items():
            with suppress(OSError, ValueError):
                getattr(sys, name).flush()
            setattr(sys, name, stream)
        if path is None and not failed:
            log.unlink(missing_ok=True)


@contextmanager
def temporary_log() -> Iterator[Path]:
    """An empty log, which stays only where the block fails by more than bad input."""
    log, failed = _temporary(), False
    try:
        yield log
    except BaseException as error:
        failed = _is_failure(error)
        raise
    finally:
        if not failed:
            log.unlink(missing_ok=True)


def _is_failure(error: BaseException) -> bool:
    """Whether it is more than bad input, which one line tells, or an end that was asked for."""
    if isinstance(error, SystemExit):
        return not isinstance(error, Terminated) and error.code not in (None, 0)
    return isinstance(error, Exception) and not isinstance(error, ValueError | OSError)


def _tell(console: Console, message: Message) -> None:
    style = "red" if message.level == "error" else "yellow"
    for number, line in enumerate(message.text.splitlines()):
        begin = ("  ", "") if number else (f"{message.level}: ", style)
        console.print(Text.assemble(begin, line), soft_wrap=True)


def _say(console: Console, *lines: str) -> None:
    with suppress(OSError):  # a terminal that is gone
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
