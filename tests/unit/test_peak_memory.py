"""The peak of a preparation: its own memory and its children's, without pages of files."""

import mmap
import subprocess
import sys
import time

from apparate_llm.prepare.peak_memory import PeakMemory

MIB = 1 << 20
CHILD = f"import time; held = bytearray(b'x') * (120 * {MIB}); print('ready', flush=True); time.sleep(30)"


def test_own_memory_and_a_child_s_count_and_pages_of_files_do_not(tmp_path):
    file = tmp_path / "rows"
    file.write_bytes(bytes(200 * MIB))
    with PeakMemory() as memory:
        time.sleep(0.2)
        before = memory.peak_bytes
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as rows:
            assert sum(rows[:: mmap.PAGESIZE]) == 0  # every page is in memory
            time.sleep(1.3)
        assert memory.peak_bytes < before + 50 * MIB
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(1.3)
        child.kill()
        child.wait()
        assert memory.peak_bytes > before + 110 * MIB
        whole = memory.peak_bytes
    assert memory.peak_bytes == whole, "a peak does not fall"
