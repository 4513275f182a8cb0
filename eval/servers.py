"""Servers under evaluation, each a process group of its own: started, warmed, paused, stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from apparate_llm.launch import server_environment

STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class System:
    """A way to serve the model."""

    name: str
    command: tuple[str, ...]  # without --port
    has_exits: bool


def plain_vllm(model: Path, vllm_flags: list[str]) -> System:
    """vLLM as it comes, in the same environment."""
    command = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *vllm_flags)
    return System("vllm", command, has_exits=False)


def early_exits(name: str, model: Path, knobs: list[str], vllm_flags: list[str]) -> System:
    command = (sys.executable, "-m", "apparate_llm.cli", "serve", str(model), *knobs, *vllm_flags)
    return System(name, command, has_exits="off" not in knobs)


class Server:
    """Context manager around one server process group listening on loopback."""

    def __init__(self, system: System, *, log: Path, start_timeout_s: float) -> None:
        self.system = system
        self.log = log
        self.start_timeout_s = start_timeout_s
        self.base_url = ""
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        port = _free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.system.command, "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(),
                start_new_session=True,
            )
        return self

    def wait_ready(self) -> None:
        """Raises RuntimeError with the end of the log if the server does not come up."""
        assert self.process is not None
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.system.name} ended with exit code {self.process.returncode}{self._tail()}")
            if waited > self.start_timeout_s:
                raise RuntimeError(f"{self.system.name} not ready after {waited:.0f} s{self._tail()}")
            try:
                if httpx.get(f"{self.base_url}/health", timeout=2.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)

    def model_name(self) -> str:
        response = httpx.get(f"{self.base_url}/v1/models", timeout=10.0)
        return response.raise_for_status().json()["data"][0]["id"]

    def status(self) -> dict[str, Any]:
        """Of its exits; for a system that has them."""
        return httpx.get(f"{self.base_url}/early_exit/status", timeout=10.0).raise_for_status().json()

    def counts(self) -> dict[str, Any] | None:
        """Running totals of its exits, None for a system without."""
        return self.status()["counts"] if self.system.has_exits else None

    def pause(self) -> None:
        """Take it off the processors: idle engines still poll, which would disturb the other system."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def __exit__(self, *exc: object) -> None:
        assert self.process is not None
        self.resume()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        self._signal(signal.SIGKILL)  # what is left of the group
        self.process.wait()

    def _signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()[-15:]
        return f"; end of its log {self.log}:\n" + "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
