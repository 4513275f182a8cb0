"""The processes of a server: how they come to be, the cores they may use, what each tells, and how they end."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from apparate_llm.eval.servers import free_port
from apparate_llm.host.limits import cpu_limits
from tests.e2e.conftest import START_TIMEOUT_S, TINY_FLAGS, group_alive
from tests.environment import clean_environment

END_TIMEOUT_S = 10


@dataclass
class Started:
    process: subprocess.Popen
    port: int
    log: Path
    heard: dict[str, list[str]] = field(default_factory=dict)  # lines of each stream
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not re.search(pattern, self.log.read_text(errors="replace")):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def named(self, title: str) -> psutil.Process:
        """The process with this title, which it may take some seconds after its siblings."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if [word.strip() for word in child.cmdline()[:1]] == [title]:
                        return child
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def listen(self, name: str, method: str, path: str, **body: object) -> None:
        """Read a stream in a thread until it ends or breaks off, one answer after the other; returns when the first
        has begun."""
        lines = self.heard[name] = []

        def read() -> None:
            with suppress(httpx.HTTPError), httpx.Client(base_url=self.url, timeout=60) as http:
                while not lines or lines[-1] == "data: [DONE]":
                    with http.stream(method, path, **body) as stream:
                        lines.append(str(stream.status_code))
                        for line in stream.iter_lines():
                            lines.extend([line] if line else [])

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        self.threads.append(thread)
        deadline = time.monotonic() + 60
        while len(lines) < 2:
            assert time.monotonic() < deadline, f"{name}: {lines}"
            time.sleep(0.01)

    def listen_and_stream(self, model: Path) -> None:
        """A dashboard, and clients in a closed loop, for answers of different lengths: they do not all end at
        once."""
        body = {"model": str(model), "prompt": "w1 w2 w3", "ignore_eos": True, "stream": True}
        self.listen("events", "GET", "/early_exit/events")
        for number, length in enumerate((230, 190, 150, 110)):
            self.listen(f"answer {number}", "POST", "/v1/completions", json={**body, "max_tokens": length})

    def wait_until_gone(self, *, within_s: float = END_TIMEOUT_S) -> int:
        """The exit code; every process has ended and every stream with it."""
        deadline = time.monotonic() + within_s
        code = self.process.wait(within_s)
        while group_alive(self.process.pid):
            assert time.monotonic() < deadline, "the server left processes behind"
            time.sleep(0.05)
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive(), "a stream did not end"
        return code


@pytest.fixture(scope="module")
def started(tiny_llama, lens_ramps, tmp_path_factory):
    """started(*flags, **variables) -> context manager of an `apparate-llm serve` of the tiny model."""

    @contextmanager
    def start(*flags: str, is_ready: bool = True, **variables: str) -> Iterator[Started]:
        port, log = free_port(), tmp_path_factory.mktemp("logs") / "server.log"
        command = [
            sys.executable,
            "-m",
            "apparate_llm.cli",
            "serve",
            str(tiny_llama),
            "--controller-state",
            "none",
            *TINY_FLAGS,
        ]
        command += ["--ramps", str(lens_ramps(depth=3)), "--host", "127.0.0.1", "--port", str(port), *flags]
        env = clean_environment()
        env |= {"VLLM_LOGGING_LEVEL": "INFO", **variables}
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=env, process_group=0)
        server = Started(process, port, log)
        try:
            if is_ready:
                server.wait_for("Application startup complete")
                assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
            yield server
        finally:
            if group_alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return start


@pytest.fixture(scope="module")
def server(started) -> Iterator[Started]:
    with started() as server:
        yield server


def mapped_at(process: psutil.Process) -> str:
    """Of what the kernel maps into every process at random: a fork has it where its parent has it."""
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return next(line.split("-")[0] for line in maps.splitlines() if line.endswith("[vdso]"))


def test_engine_and_worker_are_forks_and_only_the_worker_is_bound_to_its_cores(server):
    api = psutil.Process(server.process.pid)
    engine, worker = server.named("VLLM::EngineCore"), server.named("VLLM::Worker")
    assert engine.ppid() == api.pid and worker.ppid() == engine.pid
    assert mapped_at(api) == mapped_at(engine) == mapped_at(worker)
    everything = frozenset(os.sched_getaffinity(0))
    assert allowed(engine) == {everything}
    deadline = time.monotonic() + 60
    while len(allowed(worker)) > 1 and time.monotonic() < deadline:
        time.sleep(0.2)  # what runs beside the start (engine/background.py) may use any core, until it is done
    (bound,) = allowed(worker)
    assert bound < everything or len(everything) == 1


IN_ENGINE = ("--worker", "engine")
BLOCKING = ("--queues", "block")
BY_DEFAULT = ("--tuning", "auto")


@pytest.mark.long
def test_a_worker_in_the_engine_is_bound_and_what_reads_writes_and_answers_is_not(started):
    with started(*IN_ENGINE) as server:
        api, engine = psutil.Process(server.process.pid), server.named("VLLM::EngineCore")
        assert not [child for child in engine.children() if "VLLM" in "".join(child.cmdline())]
        assert engine.ppid() == api.pid and mapped_at(api) == mapped_at(engine)
        everything = frozenset(os.sched_getaffinity(0))
        computes = frozenset(os.sched_getaffinity(engine.pid))
        assert computes < everything or len(everything) == 1
        assert everything in allowed(engine) and allowed(api) == {everything}


@pytest.fixture(scope="module")
def answer_of(tiny_llama):
    """(a server) -> the tokens of one answer."""

    def ask(server: Started) -> str:
        body = {"model": str(tiny_llama), "prompt": "w1 w2 w3", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 40
        text: str = answer.json()["choices"][0]["text"]
        return text

    return ask


@pytest.mark.long
def test_all_cores_compute_where_they_are_asked_to(started, answer_of):
    limits = cpu_limits()
    with started("--threads", str(limits.threads), *BLOCKING) as server:
        assert f"Tuned: {limits.threads} of {limits.threads} threads" in server.log.read_text()
        answer_of(server)
        worker, deadline = server.named("VLLM::Worker"), time.monotonic() + 30
        wanted = {frozenset([core]) for core in limits.cores}
        while (bound := {cores for cores in allowed(worker) if len(cores) == 1}) != wanted:
            assert time.monotonic() < deadline, bound
            time.sleep(0.2)


def errors_of_ours(log: str) -> list[str]:
    return [line for line in log.splitlines() if "ERROR" in line and "apparate_llm/" in line]


@pytest.mark.long
def test_however_its_processes_are_a_server_answers_alike_and_ends_in_order(started, answer_of, tiny_llama):
    texts = []
    for flags in ((), BLOCKING, IN_ENGINE, BY_DEFAULT):
        with started(*flags) as server:
            assert ("not measured here" in server.log.read_text()) == (flags == BY_DEFAULT)
            texts.append(answer_of(server))
            time.sleep(6)  # until readers have heard of their first notices: longer waits from here on
            assert answer_of(server) == texts[0]
            server.listen_and_stream(tiny_llama)
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_until_gone() == 0
        assert not errors_of_ours(server.log.read_text()), "vLLM itself may log that its streams broke off"
    assert texts[0] and texts == [texts[0]] * 4


def test_waiting_engines_and_workers_that_block_take_no_processor(started, answer_of):
    """While a request is under way each waits for the other; vLLM's spin meanwhile, and for a second after."""
    spent = {}
    for flags in ((), BLOCKING):
        with started(*flags) as server:
            worker = server.named("VLLM::Worker")
            spent[flags] = max(cpu_s_after(answer_of, server, worker) for _ in range(3))  # what else runs takes it away
    assert spent[BLOCKING] < 0.2 < spent[()], spent


def cpu_s_after(answer_of, server, worker: psutil.Process) -> float:
    """Of the second for which a reader spins."""
    answer_of(server)
    before = cpu_s(worker)
    time.sleep(0.7)
    return cpu_s(worker) - before


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def allowed(process: psutil.Process) -> set[frozenset[int]]:
    """Sets of cores that threads of the process may use."""
    cores = set()
    for thread in process.threads():
        with suppress(ProcessLookupError):  # it has ended
            cores.add(frozenset(os.sched_getaffinity(thread.id)))
    return cores


def test_sigterm_ends_a_server_in_order_while_clients_listen_and_answers_stream(server, tiny_llama):
    """Also while a client has sent half of a request, or a signal comes twice."""
    server.listen_and_stream(tiny_llama)
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(b"PATCH /early_exit/config HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with suppress(ProcessLookupError):
            server.process.send_signal(signal.SIGTERM)
        assert server.wait_until_gone() == 0
    log = server.log.read_text()
    assert "Task was destroyed" not in log and "never retrieved" not in log
    assert "nanobind: leaked" not in log


SPAWNED = {"VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}


@pytest.mark.parametrize(
    ("killed", "flags", "variables"),
    [
        ("API server", (), {}),
        ("VLLM::EngineCore", (), {}),
        ("VLLM::Worker", (), {}),
        ("API server", (), SPAWNED),
        ("VLLM::Worker", (), SPAWNED),
        ("API server", BLOCKING, {}),
        ("VLLM::Worker", BLOCKING, {}),
        ("API server", IN_ENGINE, {}),
        ("VLLM::EngineCore", IN_ENGINE, {}),
    ],
    ids=[
        "server",
        "engine",
        "worker",
        "server-spawned",
        "worker-spawned",
        "server-blocking",
        "worker-blocking",
        "server-in-engine",
        "engine-in-engine",
    ],
)
def test_where_one_process_is_killed_the_others_end_and_the_port_is_free(started, tiny_llama, killed, flags, variables):
    with started(*flags, **variables) as server:
        server.listen_and_stream(tiny_llama)
        victim = server.process.pid if killed == "API server" else server.named(killed).pid
        os.kill(victim, signal.SIGKILL)
        if killed == "API server":
            server.process.wait()
            with socket.create_server(("127.0.0.1", server.port)):
                pass
        else:
            time.sleep(1)
            with suppress(httpx.TransportError):  # nobody listens any more
                assert httpx.get(f"{server.url}/health", timeout=5).status_code == 503
        assert server.wait_until_gone() == (-signal.SIGKILL if killed == "API server" else 0)
        assert server.heard["events"][0] == "200"
        answers = [lines for name, lines in server.heard.items() if name != "events"]
        assert any(lines[-1] != "data: [DONE]" for lines in answers), "all answers say that they are whole"


def test_where_one_of_several_api_processes_is_killed_all_end(started, tiny_llama):
    with started("--api-server-count", "2") as server:
        server.listen_and_stream(tiny_llama)
        os.kill(server.named("VLLM::APIServer_1").pid, signal.SIGKILL)
        assert server.wait_until_gone() != 0
        with socket.create_server(("127.0.0.1", server.port)):
            pass


@pytest.mark.parametrize("stage", ["Starting: vllm serve", r"\(EngineCore pid", r"\(Worker pid"])
def test_sigterm_while_a_server_starts_ends_it_by_that_signal_without_a_trace(started, stage):
    with started(is_ready=False) as server:
        server.wait_for(stage)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_until_gone() == -signal.SIGTERM
        assert "Traceback" not in server.log.read_text() and "warnings.warn" not in server.log.read_text()


def total(page: str, name: str) -> float:
    return float(page.split(f"\napparate:{name} ")[1].split()[0])


def test_each_of_several_api_processes_tells_what_is_and_changes_reach_all_engines(started, tiny_llama):
    """Two engines and, by vLLM's own choice, two API processes. Connections are spread over these."""
    body = {"model": str(tiny_llama), "prompt": "w1 w2", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    with started("--data-parallel-size", "2") as server, ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=60)) for _ in range(6)]
        for client in clients:
            assert client.get("/early_exit/status").status_code == 200
        time.sleep(5)  # idle: nobody asks the engines any more
        for _ in range(3):
            assert clients[0].post("/v1/completions", json=body).status_code == 200
        time.sleep(1)
        assert [total(client.get("/metrics").text, "emitted_total") for client in clients] == [60.0] * 6
        time.sleep(5)
        changed = clients[0].patch("/early_exit/config", json={"accuracy_bound": 0.25, "max_exits": 3})
        assert changed.status_code == 200, changed.text
        time.sleep(1)
        refused = [
            client.post("/v1/completions", json=body | {"vllm_xargs": {"accuracy_bound": 0.3}}) for client in clients
        ]
        assert [answer.status_code for answer in refused] == [400] * 6
        assert all("at most the server's 0.25" in answer.text for answer in refused)
        assert [total(client.get("/metrics").text, "max_exits") for client in clients] == [3.0] * 6
        engines = clients[0].get("/early_exit/status").json()["engines"]
        assert [engine["config"]["accuracy_bound"] for engine in engines] == [0.25, 0.25]
        too_many = clients[1].patch("/early_exit/config", json={"accuracy_bound": 0.5, "max_exits": 1000})
        assert too_many.status_code == 400
        assert clients[2].get("/early_exit/config").json()["config"]["accuracy_bound"] == 0.25
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_until_gone() == 0
