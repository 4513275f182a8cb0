"""The routes under /early_exit/ in front of an engine that only answers `collective_rpc`."""

import asyncio
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from apparate_llm.api import access, metrics
from apparate_llm.api.access import MAX_BODY_BYTES, Access
from apparate_llm.api.engines import ask_all
from apparate_llm.api.metrics import LISTENERS_AT_ONCE
from apparate_llm.api.plugin import MAX_STREAMS, ExitServer, page, router, stream, watch_requests
from apparate_llm.config import ConfigError, EarlyExitConfig, parse_live
from apparate_llm.renamed import STATUS

KEY = {"Authorization": "Bearer right"}
LOCAL, STRANGER = ("127.0.0.1", 1), ("192.0.2.7", 1)


class Engine:
    """Changes its options as the worker does; `max_exits` above 6 it refuses."""

    def __init__(self) -> None:
        self.config = EarlyExitConfig()
        self.asked: list[str] = []
        self.running = 0
        self.errored = False

    async def collective_rpc(self, method, args=()):
        self.asked.append(method)
        if method == "early_exit_configure":
            if args[0].get("max_exits", 0) > 6:
                return ["max_exits: at most 6"]
            self.config = parse_live(args[0], self.config)
            return [None]
        return [{"config": self.config.model_dump(), "counts": {}, "running": self.running}]

    def generate(self, prompt, sampling_params):
        return "generated"


def served(*, keys=(), exits=True) -> tuple[FastAPI, Engine]:
    app, engine = FastAPI(), Engine()
    app.include_router(page)
    app.include_router(router)
    app.state.early_exit_access = Access(keys)
    app.state.early_exit = ExitServer(engine, engine.config) if exits else None
    return app, engine


def ask(app, method, path, *, client=LOCAL, **kwargs) -> httpx.Response:
    async def answer():
        transport = httpx.ASGITransport(app=app, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000/early_exit") as http:
            return await http.request(method, path, **kwargs)

    return asyncio.run(answer())


def test_options_change_and_the_answer_says_what_is_in_force():
    app, engine = served()
    before = ask(app, "GET", "/config").json()
    assert before["config"]["accuracy_bound"] == 0.01 and "ramps" not in before["live"]
    after = ask(app, "PATCH", "/config", json={"accuracy_bound": 0.05, "tpt_target_ms": 20})
    assert after.status_code == 200 and after.json()["config"]["tpt_target_ms"] == 20.0
    assert engine.config.accuracy_bound == ask(app, "GET", "/config").json()["config"]["accuracy_bound"] == 0.05
    assert ask(app, "PATCH", "/config", json={"tpt_target_ms": None}).json()["config"]["tpt_target_ms"] is None
    assert ask(app, "POST", "/reset").json() == {"reset": True} and engine.asked[-1] == "early_exit_forget"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"accuracy_bound": 1.5}', "accuracy_bound: Input should be less than 1, got 1.5"),
        (b'{"acuracy_bound": 0.1}', "acuracy_bound: cannot be changed while serving (allowed: policy, accuracy_bound"),
        (b'{"ramps": "x"}', "ramps: cannot be changed while serving"),
        (b'{"max_exits": 7}', "max_exits: at most 6"),  # the worker's word
    ],
)
def test_what_is_not_allowed_is_refused_with_the_reason_and_changes_nothing(body, says):
    app, engine = served()
    answer = ask(app, "PATCH", "/config", content=body)
    assert answer.status_code == 400 and says in answer.json()["detail"]
    assert engine.config == app.state.early_exit.config == EarlyExitConfig()


def test_an_oversized_body_is_not_read_to_its_end():
    app, engine = served()
    answer = ask(app, "PATCH", "/config", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413 and engine.asked == []


@pytest.mark.parametrize(("method", "path"), [("GET", "/status"), ("GET", "/events"), ("PATCH", "/config")])
def test_only_holders_of_the_key_are_let_in(method, path):
    app, engine = served(keys=["other", "right"])
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
        answer = ask(app, method, path, headers=headers)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert engine.asked == []
    assert ask(app, "GET", "/status", headers=KEY, client=STRANGER).status_code == 200


def test_without_a_key_only_this_machine_is_let_in():
    app, engine = served()
    answer = ask(app, "GET", "/status", client=STRANGER)
    assert answer.status_code == 403 and "--api-key" in answer.json()["detail"] and engine.asked == []
    assert ask(app, "GET", "/status", client=("::1", 1)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"Origin": "https://evil.example"}, "pages of other sites may not ask"),
        ({"Origin": "null"}, "pages of other sites may not ask"),
        ({"Host": "evil.example"}, "served as localhost only"),  # a name that was made to point here
    ],
)
def test_without_a_key_pages_of_other_sites_are_not_let_in(headers, says):
    app, engine = served()
    for path in ("/config", "/"):
        answer = ask(app, "GET", path, headers=headers)
        assert answer.status_code == 403 and says in answer.json()["detail"]
    assert engine.asked == []
    own = {"Origin": "http://localhost:8000"}
    assert ask(app, "GET", "/status", headers=own).status_code == 200


def test_the_page_has_nothing_of_the_server_and_nothing_of_other_hosts():
    app, engine = served(keys=["right"])
    answer = ask(app, "GET", "/", client=STRANGER)  # it asks for the key itself
    assert answer.status_code == 200 and engine.asked == []
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.findall(r"""(?:src|href)=["'](?!data:,)""", answer.text)
    assert set(re.findall(r"https?://[^\s\"'<]+", answer.text)) == {"http://www.w3.org/2000/svg"}
    keyless, _ = served()
    assert ask(keyless, "GET", "/", client=STRANGER).status_code == 403


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(access, "BODY_TIMEOUT_S", 0.05)
    app, engine = served()

    async def slow():
        yield b"{"
        await asyncio.sleep(5)

    answer = ask(app, "PATCH", "/config", content=slow())
    assert answer.status_code == 408 and engine.asked == []


def test_a_server_that_stood_still_does_not_blame_the_client(monkeypatch):
    """A body that came while nothing ran is read, however late."""
    monkeypatch.setattr(access, "BODY_TIMEOUT_S", 0.2)
    app, engine = served()

    async def content():
        yield b"{"
        asyncio.get_running_loop().call_soon(time.sleep, 0.5)
        await asyncio.sleep(0.001)
        yield b'"accuracy_bound": 0.05}'

    answer = ask(app, "PATCH", "/config", content=content())
    assert answer.status_code == 200 and engine.config.accuracy_bound == 0.05


def test_several_engines_are_asked_and_told_of_as_one():
    class Core:
        core_engines = (0, 1)

        async def call_utility_all_async(self, utility, method, timeout, args, kwargs):
            return [[{"number": number, "method": method, "args": args}, "second rank"] for number in self.core_engines]

    reports = asyncio.run(ask_all(SimpleNamespace(engine_core=Core()), "early_exit_report", "key"))
    assert [one["number"] for one in reports] == [0, 1] and reports[0]["args"] == ("key",)


def test_counts_go_by_their_old_names_too():
    known = {"emitted": 9, **{name: number for number, name in enumerate(STATUS["counts"])}}

    class Counting(Engine):
        async def collective_rpc(self, method, args=()):
            (first,) = await super().collective_rpc(method, args)
            return [{**first, "counts": known}]

    app, _ = served()
    app.state.early_exit.engine = Counting()
    counts = ask(app, "GET", "/status").json()["counts"]
    for new, old in STATUS["counts"].items():
        assert counts.pop(old) == counts[new]
    assert counts == known


class Ranks(Engine):
    """Two tensor-parallel ranks, of which the second one failed."""

    async def collective_rpc(self, method, args=()):
        (first,) = await super().collective_rpc(method, args)
        if method == "early_exit_status":
            well = {**first, "active": True, "failure": None, "counts": {"fallbacks": 0}}
            failure = {"part": "drafting", "error": "RuntimeError", "returns_in_s": 12.0}
            return [well, {**well, "active": False, "failure": failure, "counts": {"fallbacks": 1}}]
        if method == "early_exit_forget":
            return [True, False]
        return [first, "the second rank says why"]


def test_all_ranks_have_a_say():
    app, _ = served()
    app.state.early_exit.engine = Ranks()
    status = ask(app, "GET", "/status").json()
    assert status["active"] is False and status["failure"]["part"] == "drafting" and status["counts"]["fallbacks"] == 1
    assert status["ranks"] == [{"active": True, "fallbacks": 0}, {"active": False, "fallbacks": 1}]
    answer = ask(app, "PATCH", "/config", json={"max_exits": 3})
    assert answer.status_code == 400 and answer.json()["detail"] == "the second rank says why"


def test_a_reset_that_was_not_done_is_no_success():
    app, _ = served()
    app.state.early_exit.engine = Ranks()
    answer = ask(app, "POST", "/reset")
    assert answer.status_code == 409 and "nothing was forgotten" in answer.json()["detail"]


def test_every_route_is_in_the_reference():
    reference = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    routes = [route for route in [*router.routes, *page.routes] if route.include_in_schema]
    assert len(routes) >= 6
    for route in routes:
        for method in route.methods:
            assert f"`{method} {route.path}`" in reference


def test_a_server_without_exits_says_so():
    app, _ = served(exits=False)
    assert ask(app, "GET", "/status").status_code == ask(app, "PATCH", "/config", json={}).status_code == 503


def test_requests_are_held_to_the_options_in_force():
    app, engine = served()
    watch_requests(app.state.early_exit)

    params = SimpleNamespace(extra_args={"accuracy_bound": 0.03})
    with pytest.raises(ConfigError, match=r"at most the server's 0\.01"):
        engine.generate("prompt", params)
    ask(app, "PATCH", "/config", json={"accuracy_bound": 0.05})
    assert engine.generate("prompt", params) == "generated"


def test_an_idle_engine_is_not_asked_until_a_request_comes(monkeypatch):
    """A worker that is asked spins for a second: on an idle server that would be a core."""
    monkeypatch.setattr(metrics, "POLL_INTERVAL_S", 0.001)
    app, engine = served()
    server = app.state.early_exit
    watch_requests(server)

    async def serve():
        polling = asyncio.create_task(metrics.poll(server.collector, engine, server.status))
        await asyncio.sleep(0.1)
        asked = len(engine.asked)
        assert metrics.QUIET_POLLS < asked <= metrics.QUIET_POLLS + 2
        await asyncio.sleep(0.05)
        assert len(engine.asked) == asked
        engine.running = 1
        engine.generate("prompt", SimpleNamespace(extra_args=None))
        await asyncio.sleep(0.1)
        assert len(engine.asked) > asked + metrics.QUIET_POLLS
        polling.cancel()

    asyncio.run(serve())


def test_many_listeners_get_a_status_in_batches_and_leave_nothing_behind():
    app, _ = served()
    server, num_listeners = app.state.early_exit, 200

    async def listen():
        streams = [stream(server) for _ in range(num_listeners)]
        first_events = [asyncio.ensure_future(anext(one)) for one in streams]
        await asyncio.sleep(0.01)
        assert server.num_streams == num_listeners
        for number in range(-(-num_listeners // LISTENERS_AT_ONCE)):
            server.collector.publish({"counts": {"emitted": number}})
            await asyncio.sleep(0.01)
            assert sum(one.done() for one in first_events) == min((number + 1) * LISTENERS_AT_ONCE, num_listeners)
        heard = [json.loads((await one).removeprefix("data: "))["counts"]["emitted"] for one in first_events]
        assert heard == [index // LISTENERS_AT_ONCE for index in range(num_listeners)]
        gone = [asyncio.ensure_future(anext(one)) for one in streams]
        await asyncio.sleep(0.01)
        for one in gone:
            one.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        assert not server.collector._waiting

    asyncio.run(listen())
    assert server.num_streams == 0
    server.num_streams = MAX_STREAMS
    assert ask(app, "GET", "/events").status_code == 503
