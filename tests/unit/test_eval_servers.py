"""Servers under evaluation end with the evaluation, however that ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import System

PROGRAM = """
import os, pathlib, signal, sys, time
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import System

child = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
with Server(System("one", (sys.executable, "-c", child)), log=pathlib.Path(sys.argv[1]), start_timeout_s=5) as server:
    time.sleep(0.5)
    server.pause()
    print(server.process.pid, flush=True)
    if sys.argv[2] == "waits":
        time.sleep(60)
"""


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_has_the_variables_of_its_system(tmp_path):
    tells = "import os, time; print(os.environ['OMP_NUM_THREADS'], os.environ['HOME'], flush=True); time.sleep(60)"
    system = System("one", (sys.executable, "-c", tells), variables={"OMP_NUM_THREADS": "7"})
    with Server(system, log=tmp_path / "log", start_timeout_s=5):
        until = time.monotonic() + 20
        while not (output := (tmp_path / "log").read_text()) and time.monotonic() < until:
            time.sleep(0.05)
    assert output.split() == ["7", os.environ["HOME"]] and system.started_by.startswith("OMP_NUM_THREADS=7 python -c ")


@pytest.mark.parametrize("ending", ["waits", "ends"])
def test_no_server_outlives_the_evaluation(ending, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "log"), ending], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    group = int(process.stdout.readline())
    if ending == "waits":
        assert group_is_alive(group)
        process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while group_is_alive(group) and time.monotonic() < until:
        time.sleep(0.05)
    assert not group_is_alive(group)
