import mmap
import re
from pathlib import Path

import torch

from apparate_llm.engine.huge_pages import (
    AT_ONCE,
    MADV_COLLAPSE,
    MADV_HUGEPAGE,
    PAGE,
    advise,
    allocated,
    move,
    use_huge_pages,
)

MAPS = """\
559f0a000000-559f0a021000 r-xp 00000000 fe:00 1234 /usr/bin/python3.11
559f0b100000-559f0b900000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
7f0000200000-7f0000700000 r--p 00000000 00:00 0
7f0001100000-7f0004f00000 rw-p 00000000 00:00 0
7f0005000000-7f0009000000 rw-s 00000000 00:01 77 /dev/shm/psm
7ffe00000000-7ffe00800000 rw-p 00000000 00:00 0 [stack]
"""


def test_whole_huge_pages_of_large_private_allocations():
    assert allocated(MAPS) == [(0x559F0B200000, 0x559F0B800000), (0x7F0001200000, 0x7F0004E00000)]


def test_what_the_kernel_refuses_is_left_as_it_is():
    asked = []

    def advise(first, size, advice):
        asked.append((first, size, advice))
        return first != 10 * PAGE and size != PAGE

    size = AT_ONCE + PAGE
    assert move([(0, size), (10 * PAGE, 20 * PAGE)], advise) == AT_ONCE
    assert asked == [
        (0, size, MADV_HUGEPAGE),
        (0, AT_ONCE, MADV_COLLAPSE),
        (AT_ONCE, PAGE, MADV_COLLAPSE),
        (10 * PAGE, 10 * PAGE, MADV_HUGEPAGE),
    ]


def test_memory_keeps_its_contents_and_is_in_huge_pages_where_linux_gives_them():
    data = torch.arange(AT_ONCE)  # numpy asks for huge pages by itself
    first = -(-data.data_ptr() // PAGE) * PAGE
    moved = move([(first, first + 7 * AT_ONCE)], advise)
    if linux_gives_them():
        assert moved > 0
    assert in_huge_pages(first + 3 * AT_ONCE) >= moved
    thread = use_huge_pages()
    assert thread is not None
    thread.join()
    assert data.equal(torch.arange(AT_ONCE))


def linux_gives_them() -> bool:
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(bytes(len(memory)))
    try:
        memory.madvise(MADV_HUGEPAGE)
        memory.madvise(MADV_COLLAPSE)
    except OSError:
        return False
    return True


def in_huge_pages(address: int) -> int:
    """Bytes of the mapping that holds the address."""
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_it = int(match[1], 16) <= address < int(match[2], 16)
        elif is_it and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"no mapping holds {address:x}")
