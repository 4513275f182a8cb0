"""A full disk for one call, without a mount or a privilege: the kernel itself refuses what is written."""

import ctypes
import errno
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

GENERIC = (64, 66, 68, 70, 287, 47, 285)  # write, writev, pwrite64, pwritev, pwritev2, fallocate, copy_file_range
WRITES = {"x86_64": (1, 20, 18, 296, 328, 285, 326), "aarch64": GENERIC, "riscv64": GENERIC}  # numbers of system calls
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of a seccomp filter; it begins with the call's number, at offset 0
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000
FULL_DEVICE = Path("/dev/full")


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def on_full_disk(call: Callable[[], object]) -> None:
    """Files can be made and removed, but nothing is written to any. Raises what `call` raises. Skips the test where
    there are no such filters."""
    if (numbers := WRITES.get(platform.machine())) is None:
        pytest.skip(f"the numbers of system calls on {platform.machine()} are not known here")
    with ThreadPoolExecutor(1) as thread:  # a filter holds for one thread, and ends with it
        try:
            thread.submit(_refuse_writes, numbers).result()
        except OSError as error:
            pytest.skip(f"no filter of system calls may be set here: {error}")
        thread.submit(call).result()


def on_full_device(call: Callable[[], object]) -> None:
    """Files that Python opens by their path to be written are the device that is always full, on any machine."""
    open_path = Path.open

    def onto_device(path: Path, mode: str = "r", *others: Any, **settings: Any) -> Any:
        return open_path(FULL_DEVICE if "w" in mode else path, mode, *others, **settings)

    with patch.object(Path, "open", onto_device):
        call()


def _refuse_writes(numbers: tuple[int, ...]) -> None:
    steps = [(LOAD, 0, 0, 0)]
    steps += [(JUMP_IF_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL_WITH | errno.ENOSPC)]
    program = _Program(len(steps), (_Instruction * len(steps))(*(_Instruction(*step) for step in steps)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    nothing = ctypes.c_ulong(0)
    for option, first, second in (
        (PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), nothing),
        (PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program)),
    ):
        if prctl(option, first, second, nothing, nothing):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
