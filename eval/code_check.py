"""Does the code in an answer pass its tests?

A model's code runs in a process of its own, in a temporary folder, without environment, input or site-packages. CPU
time, memory, the size of a file and the number of processes are limited, and what it prints is dropped. Where the
kernel lets anybody make namespaces, it has no network either, and whatever it started ends with it. **This limits
accidents, it is no sandbox**: the code may read and write what the user who runs the evaluation may, and where there
are no namespaces (in most containers) it reaches the network.
"""

import ast
import contextlib
import functools
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

_FENCE = re.compile(r"^[ \t]*```+[ \t]*(?P<language>[^\s`]*)[^\n`]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_PYTHON = {"python", "python3", "py"}

_RUNNER = Path(__file__).with_name("code_runner.py")
# linux/sched.h: CLONE_NEWUSER, without which only root may have the others, CLONE_NEWPID, CLONE_NEWNET
_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000


def code_passes(answer: str, tests: str, *, timeout_s: float = 5.0) -> bool:
    """Whether an answer's code (`code_in`) runs to its end, and `tests`, statements in the same module, do after it.

    The module is not `__main__`. Tests that cannot know a name may call `any_defined(check)`, which calls `check` with
    each function and class of the answer: does one of these calls return without an exception?

    Raises ValueError where `tests` are empty or not Python, and RuntimeError if Python cannot be started this way.
    """
    check_tests(tests)
    _check_python()
    code = code_in(answer)
    return code is not None and _run(code, tests, timeout_s)


def check_tests(tests: str) -> None:
    """Raises ValueError where `tests` are empty or not Python."""
    try:
        statements = ast.parse(tests).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"tests are not Python: {error}: {tests!r}") from None
    if not statements:
        raise ValueError(f"tests hold no statement: {tests!r}")


def code_in(answer: str) -> str | None:
    """The first fenced block marked as Python, else the first one without a mark; an unfinished one counts.

    The whole answer if it has no block, None if all blocks are in other languages.
    """
    blocks = [(block["language"].lower(), textwrap.dedent(block["code"])) for block in _FENCE.finditer(answer)]
    if not blocks:
        return answer
    marked = [code for language, code in blocks if language in _PYTHON]
    unmarked = [code for language, code in blocks if not language]
    return next(iter(marked + unmarked), None)


@functools.cache
def _check_python() -> None:
    """An environment in which nothing runs would look like a model that cannot write code."""
    if not _run("", "pass", 60.0):
        raise RuntimeError(
            f"cannot check code: `{sys.executable} -I -S {_RUNNER}` does not run with an empty environment"
        )


def _run(code: str, tests: str, timeout_s: float) -> bool:
    nonce = secrets.token_bytes(16).hex()
    job = {"code": code, "tests": tests, "nonce": nonce, "cpu_s": math.ceil(timeout_s), "namespaces": _NAMESPACES}
    with (
        tempfile.TemporaryDirectory(prefix="apparate-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as stdout,  # no pipe, which a process that outlives the child would keep open
    ):
        json.dump(job, stdin)
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_RUNNER)],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            exit_code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stdout.seek(0)
        return exit_code == 0 and stdout.read() == nonce
