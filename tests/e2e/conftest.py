import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest

from apparate_llm.eval.servers import free_port
from tests.environment import clean_environment

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30
TINY_FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", "33554432")


@contextmanager
def running(command: list[str], port: int, log: Path, **environment: str) -> Iterator[str]:
    """Base URL of a server started by `command`, stopped with SIGTERM, its whole group gone afterwards."""
    env = clean_environment()
    env.update(environment)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, process_group=0)
    base_url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None, f"server ended with {process.returncode}:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"server not ready:\n{log.read_text()[-3000:]}"
            try:
                if httpx.get(f"{base_url}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield base_url
        assert process.poll() is None, f"server died:\n{log.read_text()[-3000:]}"
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while group_alive(process.pid):
            assert time.monotonic() < deadline, "the server left processes behind"
            time.sleep(0.2)
    finally:
        if group_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AbstractContextManager[str]]:
    """serve(model, *flags) -> context manager around `apparate-llm serve`."""

    def start(*flags: str, **environment: str) -> AbstractContextManager[str]:
        port = free_port()
        log = tmp_path_factory.mktemp("logs") / "server.log"
        command = [sys.executable, "-m", "apparate_llm.cli", "serve", *flags, "--controller-state", "none"]
        return running([*command, "--host", "127.0.0.1", "--port", str(port)], port, log, **environment)

    return start
