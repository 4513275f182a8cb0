"""How often the engine is asked for its status, however many ask the server."""

import asyncio
import time
from types import SimpleNamespace

import httpx

from apparate_llm.api import metrics
from apparate_llm.api.plugin import watch_requests
from tests.exit_routes import LOCAL, served


def test_however_many_ask_the_engine_is_asked_once_a_second(monkeypatch):
    monkeypatch.setattr(metrics, "POLL_INTERVAL_S", 0.2)
    app, engine = served()
    engine.running = 1
    server = app.state.early_exit

    async def many():
        began = time.monotonic()
        transport = httpx.ASGITransport(app=app, client=LOCAL)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/early_exit") as http:

            async def go_on():
                while time.monotonic() - began < 0.7:
                    answer = await http.get("/config" if engine.num_asked % 2 else "/status")
                    assert answer.status_code == 200

            await asyncio.gather(*(go_on() for _ in range(50)), metrics_for(server, 0.7))
        return time.monotonic() - began

    took = asyncio.run(many())
    assert 3 <= engine.num_asked <= took / 0.2 + 1


async def metrics_for(server, seconds):
    polling = asyncio.create_task(metrics.poll(server.collector, server.engine, server.polled_status))
    await asyncio.sleep(seconds)
    polling.cancel()


def test_an_answer_is_never_older_than_its_question_while_there_is_work(monkeypatch):
    monkeypatch.setattr(metrics, "POLL_INTERVAL_S", 0.1)
    app, engine = served()
    server = app.state.early_exit
    watch_requests(server)

    async def run():
        for number in range(3):
            engine.generate("prompt", SimpleNamespace(extra_args=None))
            engine.shares = {"x": SimpleNamespace(as_dict=lambda number=number: {"emitted": number})}
            assert (await server.status())["tenants"] == {"x": {"emitted": number}}
        await asyncio.sleep(0.11)
        asked = engine.num_asked + 1
        for _ in range(20):  # idle: the last answer is as good as any
            await server.status()
        assert engine.num_asked == asked

    asyncio.run(run())


def test_one_that_goes_away_takes_the_answer_from_nobody_and_a_failure_is_told_to_all(monkeypatch):
    monkeypatch.setattr(metrics, "POLL_INTERVAL_S", 0.05)
    app, engine = served()
    engine.running = 1
    server = app.state.early_exit

    async def run():
        asking = [asyncio.ensure_future(server.status()) for _ in range(5)]
        await asyncio.sleep(0)
        asking[0].cancel()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError) and all(one == answers[1] for one in answers[1:])
        engine.fails = True
        answers = await asyncio.gather(*(server.status() for _ in range(5)), return_exceptions=True)
        assert all(isinstance(one, RuntimeError) for one in answers) and engine.num_asked == 2
        engine.fails = False
        assert (await server.status())["active"]

    asyncio.run(run())
