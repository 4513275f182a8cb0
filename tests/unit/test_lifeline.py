"""How processes end: a fork with its parent, a start by the signal that came, a conversion without leftovers."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from apparate_llm import default_model as dm
from apparate_llm import gguf_model

HEAD = """
import json, multiprocessing, os, signal, socket, sys, threading, time
from apparate_llm.lifeline import end_at_once_on_signals, tie_forks, undone_by_sigterm
context = multiprocessing.get_context("fork")
def say(**facts): print(json.dumps(facts), flush=True)
"""


def run(code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", HEAD + code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def heard(process: subprocess.Popen) -> dict:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return json.loads(line)


def gone(pid: int, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


ENGINE_AND_WORKER = """
tie_forks()
server = socket.create_server(("127.0.0.1", 0))
named = socket.socket(socket.AF_UNIX); named.bind(sys.argv[1]); named.listen()
ours, theirs = socket.socketpair()
def kind(number): return os.readlink(f"/proc/self/fd/{number}")
def worker(): say(worker=os.getpid()); time.sleep(60)
def engine():
    say(engine=os.getpid(), port=kind(server.fileno()), named=kind(named.fileno()), pair=kind(ours.fileno()),
        handler=signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
    context.Process(target=worker).start()
    time.sleep(60)
end_at_once_on_signals()
say(port=server.getsockname()[1])
context.Process(target=engine).start()
time.sleep(60)
"""


def test_forks_end_with_a_killed_parent_and_hold_nothing_that_others_wait_for(tmp_path):
    process = run(ENGINE_AND_WORKER, str(tmp_path / "socket"))
    port = heard(process)["port"]
    engine = heard(process)
    worker = heard(process)["worker"]
    assert engine["port"] == engine["named"] == "/dev/null" and engine["pair"].startswith("socket:")
    assert engine["handler"]
    with socket.create_connection(("127.0.0.1", port)) as client:
        process.kill()
        process.wait()
        client.settimeout(5)
        with pytest.raises(ConnectionResetError):  # not accepted yet, and nobody is left to do so
            assert client.recv(1) == b"x"
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert gone(engine["engine"]) and gone(worker)


def test_a_fork_of_another_thread_outlives_that_thread():
    code = """
tie_forks()
def child(): time.sleep(0.5); say(alive=True)
thread = threading.Thread(target=lambda: context.Process(target=child).start())
thread.start(); thread.join(); time.sleep(60)
"""
    process = run(code)
    assert heard(process) == {"alive": True}
    process.kill()


SPAWNED = (
    HEAD
    + """
from apparate_llm.lifeline import tie_to_parent
def child():
    tie_to_parent()
    say(child=os.getpid())
    time.sleep(60)
if __name__ == "__main__":
    tie_forks()
    multiprocessing.get_context("spawn").Process(target=child).start()
    time.sleep(60)
"""
)


def test_a_process_that_was_started_anew_ends_with_a_killed_parent_too(tmp_path):
    """Where the user wants engines spawned, and API processes, which always are."""
    script = tmp_path / "script.py"
    script.write_text(SPAWNED)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = json.loads(process.stdout.readline())["child"]
    process.kill()
    process.wait()
    assert gone(child)


def test_other_processes_that_load_our_plugin_are_left_alone():
    """A vLLM that merely has our package installed, or one in a program of the user's."""
    code = """
from apparate_llm.lifeline import TOGETHER, tie_to_parent
tie_to_parent()
child = context.Process(target=lambda: (tie_to_parent(), time.sleep(0.5), say(alive=TOGETHER not in os.environ)))
child.start()
os._exit(0)
"""
    assert heard(run(code)) == {"alive": True}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_ends_by_its_signal_with_one_line_whoever_catches_exceptions(number):
    code = """
end_at_once_on_signals()
child = context.Process(target=lambda: time.sleep(60)); child.start()
try:
    say(child=child.pid); time.sleep(60)
except BaseException:
    time.sleep(60)
"""
    process = run(code)
    child = heard(process)["child"]
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == -number
    assert error == f"apparate-llm: stopped by {signal.Signals(number).name} while starting\n"
    assert gone(child)


@pytest.mark.parametrize("work", ["end_at_once_on_signals(); ready()", "with undone_by_sigterm(): ready()"])
def test_the_first_process_of_a_container_ends_too(work):
    """The kernel lets no signal end it."""
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this user may make no process namespace")
    code = f"def ready(): say(pid=os.getpid()); time.sleep(60)\n{work}\n"
    command = [*alone, sys.executable, "-c", HEAD + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert heard(process) == {"pid": 1}
        (first,) = psutil.Process(process.pid).children()
        first.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


def test_a_conversion_that_is_stopped_leaves_nothing_and_one_that_was_killed_is_cleared_away(tmp_path, monkeypatch):
    code = """
from pathlib import Path
from apparate_llm import default_model as dm, gguf_model
def convert(gguf, out): (out / "half").write_text("x"); say(converting=True); time.sleep(60)
dm.gguf_path, gguf_model.convert = lambda: Path("model.gguf"), convert
dm.default_model(Path(sys.argv[1]))
"""
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = run(code, str(tmp_path))
        assert heard(process)["converting"]
        process.send_signal(number)
        assert process.wait(20) == -number
        left = [path for path in tmp_path.iterdir() if path.is_dir()]
        assert bool(left) == (number == signal.SIGKILL)
    monkeypatch.setattr(dm, "gguf_path", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(gguf_model, "convert", lambda gguf, out: (out / "model.safetensors").write_text("x"))
    dm.default_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [dm.NAME]
    assert os.listdir(tmp_path / dm.NAME)
