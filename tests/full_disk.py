"""A full disk for one call: the kernel itself refuses what it writes. No device, mount or privilege is needed."""

import ctypes
import errno
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

GENERIC = (64, 66, 68, 70, 287, 47, 285)  # write, writev, pwrite64, pwritev, pwritev2, fallocate, copy_file_range
WRITES = {"x86_64": (1, 20, 18, 296, 328, 285, 326), "aarch64": GENERIC, "riscv64": GENERIC}  # numbers of system calls
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of a seccomp filter; it begins with the call's number, at offset 0
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def on_full_disk(call: Callable[[], object]) -> None:
    """Files can be made and removed, but nothing is written to any. Raises what `call` raises."""
    with ThreadPoolExecutor(1) as thread:  # a filter holds for one thread, and ends with it
        thread.submit(_refuse_writes).result()
        thread.submit(call).result()


def _refuse_writes() -> None:
    numbers = WRITES[platform.machine()]
    steps = [(LOAD, 0, 0, 0)]
    steps += [(JUMP_IF_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL_WITH | errno.ENOSPC)]
    program = _Program(len(steps), (_Instruction * len(steps))(*steps))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    nothing = ctypes.c_ulong(0)
    for option, first, second in (
        (PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), nothing),
        (PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program)),
    ):
        if prctl(option, first, second, nothing, nothing):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
