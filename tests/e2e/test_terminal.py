"""`apparate-llm serve` on a terminal: few lines there, vLLM's log in a file, ends and exit codes as without one."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from apparate_llm.eval.servers import free_port
from apparate_llm.log_watch import COLOURS
from tests.e2e.conftest import START_TIMEOUT_S, TINY_FLAGS, group_alive
from tests.environment import clean_environment

END_TIMEOUT_S = 30


@dataclass
class OnTerminal:
    process: subprocess.Popen[bytes]
    terminal: int  # our end of it
    port: int
    cache: Path
    shown: bytes = b""
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            while part := os.read(self.terminal, 65536):
                self.shown += part
        except OSError:  # nobody has the other end any more
            pass

    @property
    def text(self) -> str:
        return COLOURS.sub("", self.shown.decode(errors="replace")).replace("\r\n", "\n")

    @property
    def log(self) -> Path:
        return self.cache / "logs" / f"serve-{self.port}.log"

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not re.search(pattern, self.text):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.05)

    def end(self) -> int:
        """The exit code; no process is left, and all that was shown has come."""
        code = self.process.wait(END_TIMEOUT_S)
        deadline = time.monotonic() + END_TIMEOUT_S
        while group_alive(self.process.pid):
            assert time.monotonic() < deadline, "the server left processes behind"
            time.sleep(0.05)
        self.thread.join(5)
        return code


@pytest.fixture(scope="module")
def on_terminal(tiny_llama, lens_ramps, tmp_path_factory):
    """on_terminal(*flags) -> context manager of an `apparate-llm serve` of the tiny model that owns a terminal."""

    @contextmanager
    def start(*flags: str, **variables: str) -> Iterator[OnTerminal]:
        port, cache = free_port(), tmp_path_factory.mktemp("cache")
        command = [sys.executable, "-m", "apparate_llm.cli", "serve", str(tiny_llama), *TINY_FLAGS]
        command += ["--ramps", str(lens_ramps(depth=3)), "--host", "127.0.0.1", "--port", str(port), *flags]
        kept = clean_environment()
        env = kept | {"APPARATE_CACHE": str(cache), "TERM": "xterm", "VLLM_LOGGING_LEVEL": "INFO"} | variables
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(theirs)
        server = OnTerminal(process, ours, port, cache)
        try:
            yield server
        finally:
            if group_alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            server.thread.join(5)
            os.close(ours)

    return start


def _own_terminal() -> None:
    """Ctrl-C on it reaches this process and its children."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.long
def test_a_start_shows_six_lines_ctrl_c_ends_it_and_all_else_is_in_the_log(on_terminal, tiny_llama):
    with on_terminal() as server:
        server.wait_for(r"Docs: .*\n")
        lines = server.text.splitlines()
        assert [line.split(":")[0] for line in lines] == ["Model", "Exits", "vLLM's log", "API", "Page", "Docs"]
        url = f"http://127.0.0.1:{server.port}"
        assert f"API: {url}/v1" in lines[3] and str(server.log) in lines[2] and lines[0] == f"Model: {tiny_llama}"
        assert httpx.get(f"{url}/early_exit/", timeout=30).status_code == 200
        assert httpx.get(f"{url}/docs", timeout=30).status_code == 200
        os.write(server.terminal, b"\x03")
        assert server.end() == 0
        assert server.text.splitlines()[6:] == ["^CThe server has ended."]
        log = server.log.read_text()
        assert "Starting: vllm serve" in log and "Application startup complete" in log and "GET /docs" in log
        assert server.log.stat().st_mode & 0o077 == 0


@pytest.mark.long
def test_with_verbose_all_of_it_is_on_the_terminal(on_terminal):
    with on_terminal("--verbose") as server:
        server.wait_for("Application startup complete")
        assert "Starting: vllm serve" in server.text and "Model:" not in server.text
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert not server.log.exists()


@pytest.mark.long
def test_a_failed_start_shows_why_and_names_the_log(on_terminal):
    with on_terminal("--kv-cache-memory-bytes", "10") as server:
        assert server.end() == 1
        assert "error: EngineCore failed to start.\n  ValueError: " in server.text
        assert "memory" in server.text
        assert f"all of it: {server.log}\napparate-llm: error: " in server.text
        assert len(server.text.splitlines()) <= 12 and "Traceback" not in server.text
        assert "Traceback" in server.log.read_text()


@pytest.mark.long
def test_bad_input_that_vllm_finds_is_one_line_behind_the_first(on_terminal):
    with on_terminal("--max-num-seqs", "many") as server:
        assert server.end() == 2
        last = server.text.splitlines()[-1]
        assert last.startswith("apparate-llm: error: ") and "--max-num-seqs" in last and "all of it" not in server.text


@pytest.mark.long
@pytest.mark.parametrize(("how", "name"), [(signal.SIGTERM, "SIGTERM"), (b"\x03", "SIGINT")], ids=["sigterm", "ctrl-c"])
def test_a_signal_while_it_starts_ends_it_and_the_terminal_says_so(on_terminal, how, name):
    with on_terminal() as server:
        server.wait_for("vLLM's log: ")
        deadline = time.monotonic() + START_TIMEOUT_S
        while "EngineCore pid" not in server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if isinstance(how, bytes):
            os.write(server.terminal, how)
        else:
            server.process.send_signal(how)
        assert server.end() == -getattr(signal, name)
        assert server.text.endswith(f"apparate-llm: stopped by {name} while starting\n")
        assert "Traceback" not in server.text


@pytest.mark.long
def test_what_goes_wrong_later_reaches_the_terminal(on_terminal):
    """A warning of ours, of the worker's process, and the death of the engine."""
    with on_terminal("--feedback-log", "/dev/full") as server:
        server.wait_for(r"Docs: .*\n")
        body = {"model": "m", "prompt": "w1 w2", "max_tokens": 20, "ignore_eos": True}
        url = f"http://127.0.0.1:{server.port}"
        body["model"] = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        server.wait_for("warning: Feedback log /dev/full not written")
        engine = next(
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "VLLM::EngineCore" in " ".join(child.cmdline())
        )
        engine.kill()
        assert server.end() == 0  # as plain vLLM
        assert re.search(r"error: (.*\n)?.*[Ee]ngine", server.text), server.text
        assert server.text.endswith("The server has ended.\n")
