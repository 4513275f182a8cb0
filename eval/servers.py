"""Servers under evaluation, each a process group of its own: started, warmed, paused, stopped."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path
from random import SystemRandom
from typing import Any, NamedTuple

import httpx
import psutil

from apparate_llm.address import authorization
from apparate_llm.eval.client import GREEDY, Fields, PlannedRequest, Sampling
from apparate_llm.eval.systems import System
from apparate_llm.files import private_opener
from apparate_llm.log_watch import errors_in
from apparate_llm.renamed import counts_of_any_version

STOP_TIMEOUT_S = 30.0
LOG_LINES = 15  # that an error quotes
PORTS = range(20_000, 32_000)  # below those that connections get, which would take one before the server listens


class Usage(NamedTuple):
    """Of all processes of a server."""

    cpu_s: float  # user and system, since the start
    peak_memory_gib: float  # largest resident sizes, added up


class Server:
    """Context manager around one server process group listening on loopback, or one that is running elsewhere.

    It stays in this session: Linux shares cores between sessions, and a client in another one than a server whose
    processes spin waits up to seconds for each system call.
    """

    def __init__(self, system: System, *, log: Path, start_timeout_s: float) -> None:
        self.system = system
        self.log = log
        self.start_timeout_s = start_timeout_s
        self.base_url = system.base_url or ""
        self.headers = authorization(system.api_key)
        self.process: subprocess.Popen[bytes] | None = None  # None: not ours
        self.watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        if self.system.base_url is not None:
            return self
        port = free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        with open(self.log, "wb", opener=private_opener) as log:
            self.process = subprocess.Popen(
                [*self.system.command, "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.system.environment,
                process_group=0,
            )
        # Ends the group once this process is gone, even by kill -9: a server that is paused cannot see that itself.
        self.watcher = subprocess.Popen(
            ["/bin/sh", "-c", 'read _; kill -9 "-$0"', str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        return self

    def wait_ready(self) -> None:
        """Raises RuntimeError with the end of the log if the server does not come up."""
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            if self.process is not None and self.process.poll() is not None:
                raise RuntimeError(f"{self.system.name} ended with exit code {self.process.returncode}{self._tail()}")
            if waited > self.start_timeout_s:
                raise RuntimeError(f"{self.system.name} not ready after {waited:.0f} s{self._tail()}")
            try:
                # Not every OpenAI-compatible server has /health.
                path = "/health" if self.process is not None else "/v1/models"
                status = httpx.get(f"{self.base_url}{path}", headers=self.headers, timeout=2.0).status_code
                if status == 200:
                    return
                if status in (401, 403):
                    raise RuntimeError(f"{self.system.name} wants another API key: --api-key KEY (HTTP {status})")
            except httpx.HTTPError as error:
                if self.process is None:
                    raise RuntimeError(f"{self.system.name} does not answer at {self.base_url}: {error}") from None
            time.sleep(0.5)

    def model_name(self) -> str:
        """Raises RuntimeError where the server names none as OpenAI's does."""
        response = httpx.get(f"{self.base_url}/v1/models", headers=self.headers, timeout=10.0).raise_for_status()
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            text = response.text[:100]
            raise RuntimeError(f"{self.system.name} is no OpenAI-compatible server: /v1/models says {text!r}") from None

    def fields(self, ask: PlannedRequest, sampling: Sampling = GREEDY) -> Fields:
        """Of a request to it, the system's own included. A salt of its own keeps it from being answered out of a prefix
        cache."""
        salt = {"cache_salt": secrets.token_hex(16)} if self.system.prefix_cache == "salted" else {}
        return {**sampling.fields(ask), **salt, **self.system.fields}

    def status(self) -> dict[str, Any]:
        """Of its exits; for a system that has them."""
        response = httpx.get(f"{self.base_url}/early_exit/status", headers=self.headers, timeout=10.0)
        status: dict[str, Any] = response.raise_for_status().json()
        return status

    def counts(self) -> dict[str, Any] | None:
        """Running totals of its exits, None for a system without."""
        return counts_of_any_version(self.status()["counts"]) if self.system.has_exits else None

    def usage(self) -> Usage | None:
        """None for a server that is not ours."""
        if self.process is None:
            return None
        cpu_s = peak = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    cpu_s += times.user + times.system
                    peak += _peak_resident_gib(process.pid)
        return Usage(cpu_s, peak)

    def pause(self) -> None:
        """Take it off the processors: idle engines still poll, which would disturb the other systems."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def __exit__(self, *exc: object) -> None:
        if self.process is None or self.watcher is None:
            return
        self.watcher.kill()  # before the group's number may be another's
        self.watcher.wait()
        self.resume()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        self._signal(signal.SIGKILL)  # what is left of the group
        self.process.wait()
        self.process = None  # its number may be another's from here on

    def _signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _tail(self) -> str:
        if self.process is None:
            return ""
        text = self.log.read_text(errors="replace").strip()
        lines = errors_in(text)[:LOG_LINES] or text.splitlines()[-LOG_LINES:]
        return f"; end of its log {self.log}:\n" + "\n".join(lines)


def free_port() -> int:
    """A port that nothing listens at; raises OSError if none is found."""
    for port in SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port among a hundred of {PORTS.start} to {PORTS.stop - 1}")


def _peak_resident_gib(pid: int) -> float:
    """0 where the system does not keep it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return 0.0
