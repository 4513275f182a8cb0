"""How old what is told may be, in one API process and in several; and what happens when the engine does not answer."""

import asyncio
import time
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest

from apparate_llm.api import ending, metrics
from apparate_llm.api.access import Access
from apparate_llm.api.ending import EngineGoneError
from apparate_llm.api.metrics import ExitCollector, MetricsMiddleware, poll
from apparate_llm.api.neighbours import OPTIONS, WORK, Neighbours
from apparate_llm.api.plugin import ExitServer, page, router, stream, watch_requests
from apparate_llm.config import EarlyExitConfig, parse_live
from tests.logged import logged

LOCAL = ("127.0.0.1", 1)


class Engine:
    """One or several engines, each with its own options, that answer as the workers do."""

    def __init__(self, number: int = 1) -> None:
        self.configs = [EarlyExitConfig() for _ in range(number)]
        self.errored = False
        self.answers = True
        self.emitted = self.running = self.num_statuses = 0
        self.fails_to_configure: set[int] = set()
        self.max_exits = [10] * number
        if number > 1:
            self.engine_core = SimpleNamespace(core_engines=range(number), call_utility_all_async=self._all)

    async def _all(self, utility, method, timeout, args, kwargs):
        return [[await self._answer(number, method, args)] for number in range(len(self.configs))]

    async def collective_rpc(self, method, args=()):
        return [await self._answer(0, method, args)]

    async def _answer(self, number, method, args):
        if not self.answers:
            await asyncio.sleep(3600)
        if method == "early_exit_configure":
            if args[0].get("max_exits", 0) > self.max_exits[number]:
                return f"max_exits: at most {self.max_exits[number]}"
            if len(args) == 1:
                if number in self.fails_to_configure:
                    self.fails_to_configure.discard(number)
                    raise RuntimeError("Worker failed with error 'disk'")
                self.configs[number] = parse_live(args[0], self.configs[number])
            return None
        self.num_statuses += number == 0
        return {
            "config": self.configs[number].model_dump(),
            "counts": {"emitted": self.emitted, "divergences": 0, "unverified": 0},
            "running": self.running,
            "active": True,
            "failure": None,
            "tenants": {},
            "audit": {},
            "distributions": {},
            "budget_left": 0.0,
            "budget_fill_frac": 0.0,
        }

    def generate(self, prompt, sampling_params):
        return "generated"


def served(engine: Engine, folder=None) -> FastAPI:
    app = FastAPI()
    app.include_router(page)
    app.include_router(router)
    app.add_middleware(MetricsMiddleware)
    app.get("/metrics", response_class=PlainTextResponse)(lambda: "vllm:other 1.0\n")
    app.state.early_exit_access = Access(())
    app.state.early_exit = ExitServer(engine, engine.configs[0], neighbours=Neighbours(folder and str(folder)))
    return app


async def ask(app, method, path, **kwargs) -> httpx.Response:
    transport = httpx.ASGITransport(app=app, client=LOCAL)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
        return await http.request(method, path, **kwargs)


def page_of(collector: ExitCollector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


@pytest.fixture
def no_metrics(monkeypatch):
    monkeypatch.setattr(metrics, "metrics_of", lambda status: ())


def test_the_polling_survives_a_failure_and_says_that_it_failed(monkeypatch, no_metrics):
    monkeypatch.setattr(metrics, "POLL_INTERVAL_S", 0.001)
    collector, engine = ExitCollector(), Engine()
    asked = []

    async def status():
        asked.append(True)
        if len(asked) <= 3:
            raise RuntimeError("no answer")
        return {"counts": {"emitted": len(asked)}, "running": 1}

    async def run():
        polling = asyncio.create_task(poll(collector, engine, status))
        await asyncio.sleep(0.1)
        assert not polling.done() and collector.status["counts"]["emitted"] > 4
        polling.cancel()

    with logged() as lines:
        asyncio.run(run())
    assert lines == ["No status of early exits: no answer"]  # once
    assert "apparate:status_errors_total 3.0" in page_of(collector)
    assert float(page_of(collector).split("apparate:status_age_seconds ")[-1].split()[0]) < 60


def test_a_request_that_comes_while_the_engine_is_asked_is_not_forgotten(monkeypatch):
    monkeypatch.setattr(metrics, "POLL_INTERVAL_S", 0.001)
    collector = ExitCollector()
    asked = []

    async def status():
        asked.append(time.monotonic())
        await asyncio.sleep(0.005)
        if len(asked) == metrics.QUIET_POLLS + 1:
            collector.work.set()  # after the worker told that it is idle, before that is heard
        return {"counts": {}, "running": 0}

    async def run():
        polling = asyncio.create_task(poll(collector, Engine(), status))
        await asyncio.sleep(0.3)
        polling.cancel()

    asyncio.run(run())
    assert len(asked) >= 2 * metrics.QUIET_POLLS + 1


def test_nothing_sleeps_while_a_request_of_this_process_waits(monkeypatch):
    monkeypatch.setattr(metrics, "POLL_INTERVAL_S", 0.001)
    asked = []

    async def status():
        asked.append(True)
        return {"counts": {}, "running": 0}

    engine = SimpleNamespace(errored=False, output_processor=SimpleNamespace(has_unfinished_requests=lambda: True))

    async def run():
        polling = asyncio.create_task(poll(ExitCollector(), engine, status))
        await asyncio.sleep(0.1)
        polling.cancel()

    asyncio.run(run())
    assert len(asked) > 2 * metrics.QUIET_POLLS


def test_the_metrics_page_is_made_new_for_whoever_reads_it_and_an_idle_engine_is_left_alone(monkeypatch):
    monkeypatch.setattr(metrics, "POLL_INTERVAL_S", 0.2)

    async def run():
        engine = Engine()
        app = served(engine)
        server = app.state.early_exit
        await ask(app, "GET", "/metrics")
        engine.emitted = 7  # by a request of another API process
        await asyncio.sleep(0.25)
        assert engine.num_statuses == 1
        assert (await ask(app, "GET", "/metrics/")).status_code in (200, 307, 404)
        assert server.collector.status["counts"]["emitted"] == 7
        for _ in range(5):
            assert (await ask(app, "GET", "/metrics")).text.startswith("vllm:other")
        assert engine.num_statuses == 2
        engine.answers = False
        await asyncio.sleep(0.25)
        monkeypatch.setattr(metrics, "PAGE_WAIT_S", 0.05)
        assert (await ask(app, "GET", "/metrics")).text.startswith("vllm:other")  # with the last status
        assert server.collector.num_errors == 1

    asyncio.run(run())


def test_another_process_hears_of_work_and_takes_up_changed_options_within_a_second(monkeypatch, tmp_path):
    async def run():
        engine = Engine()
        apps = [served(engine, tmp_path) for _ in range(2)]
        one, other = (app.state.early_exit for app in apps)
        for server in (one, other):
            watch_requests(server)
            server.run(SimpleNamespace())
        monkeypatch.setattr(metrics, "QUIET_POLLS", 0)  # idle from the first answer on
        await asyncio.sleep(0.1)
        asked = engine.num_statuses
        await asyncio.sleep(1.2)
        assert engine.num_statuses == asked  # nobody asks an idle engine
        changed = await ask(apps[0], "PATCH", "/early_exit/config", json={"accuracy_bound": 0.05})
        assert changed.status_code == 200 and one.config.accuracy_bound == 0.05
        await asyncio.sleep(0.6)
        assert other.config.accuracy_bound == 0.05
        await asyncio.sleep(1.2)
        engine.emitted, engine.running = 9, 1
        one.neighbours.tell_work()
        await asyncio.sleep(0.9)
        assert other.collector.status["counts"]["emitted"] == 9
        for server in (one, other):
            for task in server.tasks:
                task.cancel()

    asyncio.run(run())


def test_changes_by_two_processes_are_made_one_after_the_other(tmp_path):
    async def run():
        inside = []
        both = [Neighbours(str(tmp_path)) for _ in range(2)]

        async def change(neighbour):
            async with neighbour.alone():
                inside.append(neighbour)
                await asyncio.sleep(0.05)
                assert len(inside) == 1
                inside.remove(neighbour)

        await asyncio.gather(*(change(neighbour) for neighbour in both * 2))
        both[0].tell_options()
        assert both[1].hear(OPTIONS) and not both[1].hear(OPTIONS) and not both[0].hear(OPTIONS)
        assert not both[1].hear(WORK)

    asyncio.run(run())


def test_options_that_one_engine_refuses_change_on_none():
    engine = Engine(2)
    engine.max_exits = [10, 4]
    answer = asyncio.run(ask(served(engine), "PATCH", "/early_exit/config", json={"max_exits": 5}))
    assert answer.status_code == 400 and answer.json()["detail"] == "max_exits: at most 4"
    assert engine.configs == [EarlyExitConfig()] * 2


def test_options_that_one_engine_fails_to_take_up_are_taken_back_on_all():
    engine = Engine(2)
    engine.fails_to_configure = {1}
    app = served(engine)
    answer = asyncio.run(ask(app, "PATCH", "/early_exit/config", json={"accuracy_bound": 0.2, "max_exits": 3}))
    assert answer.status_code == 503 and answer.json()["detail"].startswith("nothing was changed: Worker failed")
    assert engine.configs == [EarlyExitConfig()] * 2 and app.state.early_exit.config == EarlyExitConfig()
    answer = asyncio.run(ask(app, "PATCH", "/early_exit/config", json={"accuracy_bound": 0.2, "max_exits": 3}))
    assert answer.status_code == 200 and {config.accuracy_bound for config in engine.configs} == {0.2}


@pytest.mark.parametrize("cause", ["told to stop", "engine gone"])
def test_nobody_is_kept_waiting_when_the_server_stops_or_its_engine_is_gone(monkeypatch, cause):
    """An engine that was killed never answers what it was asked before."""
    monkeypatch.setattr(ending, "LOOK_INTERVAL_S", 0.01)
    problems = []

    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context["message"]))
        engine = Engine()
        server = ExitServer(engine, engine.configs[0])
        http = SimpleNamespace(should_exit=False, config=SimpleNamespace(timeout_graceful_shutdown=None))
        server.run(SimpleNamespace(server=http))
        await asyncio.sleep(0.05)

        async def listen():
            return [text async for text in stream(server)]

        engine.answers = False
        waiting = [asyncio.create_task(listen()) for _ in range(3)]
        asked = asyncio.create_task(server.ask("early_exit_status"))
        await asyncio.sleep(0.05)
        assert not asked.done() and not any(one.done() for one in waiting)
        if cause == "engine gone":
            engine.errored = True
        else:
            http.should_exit = True
        done, _ = await asyncio.wait([*waiting, asked, *server.tasks], timeout=2)
        assert len(done) == 4 + len(server.tasks) and server.num_streams == 0
        with pytest.raises(EngineGoneError):
            asked.result()
        assert [len(one.result()) for one in waiting] == [1] * 3
        assert await asyncio.wait_for(listen(), 1)  # and who comes later is told at once
        assert http.config.timeout_graceful_shutdown == ending.GRACE_S

    asyncio.run(run())
    assert problems == []
