"""Who may do what under /early_exit/: the admin, a tenant, this machine, a stranger, and whoever comes by a proxy."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request

from apparate_llm.admin import digest_of
from apparate_llm.api import metrics, plugin
from apparate_llm.api.access import PROXY_HEADERS, Access, is_local
from apparate_llm.api.answers import AnswerMiddleware, Caller, tenants_by_key
from apparate_llm.api.exit_server import ExitServer
from apparate_llm.api.plugin import page, router, watch_requests
from apparate_llm.config import (
    KEY_TENANT_PROOF,
    ConfigError,
    EarlyExitConfig,
    key_tenant_proof,
    parse_config,
    parse_live,
    parse_request_options,
    public_config,
)
from apparate_llm.exits.tenants import UNNAMED, shares_of

LOCAL, STRANGER = ("127.0.0.1", 1), ("192.0.2.7", 1)
TENANTS: dict[str, dict[str, Any]] = {
    "mine": {"api_keys_sha256": [digest_of("sk-mine")], "accuracy_bound": 0.004},
    "theirs": {"api_keys_sha256": [digest_of("sk-theirs")], "tpt_target_ms": 33.25},
    "open": {},
}
CHANGES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("PATCH", "/config", {"json": {"accuracy_bound": 0.05}}),
    ("POST", "/reset", {}),
)
FORWARDED = [
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-For": "192.0.2.7, 127.0.0.1"},
    {"Forwarded": "for=127.0.0.1"},
    {"X-Real-IP": "127.0.0.1"},
    {"Via": "1.1 proxy"},
    {"X-Forwarded-Proto": "https"},
    {"CF-Connecting-IP": "192.0.2.7"},
]


class Engine:
    """Answers as the worker does."""

    def __init__(self, config: EarlyExitConfig) -> None:
        self.config = config
        self.asked: list[str] = []
        self.running = 0
        self.errored = False
        self.fails = False
        self.shares = shares_of(config)
        for number, share in enumerate(self.shares.values()):
            share.emitted, share.divergences = 1000 + number, number

    async def collective_rpc(self, method: str, args: Sequence[Any] = ()) -> list[dict[str, Any] | None]:
        self.asked.append(method)
        await asyncio.sleep(0.002)
        if self.fails:
            raise RuntimeError("engine gone")
        if method == "early_exit_configure":
            self.config = parse_live(args[0], self.config)
            return [None]
        return [
            {
                "clock_s": 1.0,
                "active": True,
                "depth": 3,
                "running": self.running,
                "config": public_config(self.config),
                "tenants": {name: share.as_dict() for name, share in self.shares.items()},
                "counts": {"emitted": 4006, "divergences": 6, "divergence_frac": 6 / 4006},
                "distributions": {"tpt_ms": {"counts": [7777]}},
                "budget_left": 5.5,
                "budget_fill_frac": 0.77,
            }
        ]

    @property
    def num_asked(self) -> int:
        return self.asked.count("early_exit_status")

    def generate(self, prompt: str, sampling_params: Any) -> Any:
        return sampling_params


def served(
    *, keys: Sequence[str] = (), admin: Sequence[str] = (), tenants: dict[str, dict[str, Any]] | None = None
) -> tuple[FastAPI, Engine]:
    config = parse_config({"tenants": tenants or {}})
    app, engine = FastAPI(), Engine(config)
    app.include_router(page)
    app.include_router(router)
    app.state.early_exit_access = Access(keys, [digest_of(key) for key in admin])
    server = ExitServer(engine, config, tenants_by_key=tenants_by_key(config))  # type: ignore[arg-type]  # a fake engine
    app.state.early_exit = server
    return app, engine


def ask(
    app: FastAPI,
    method: str,
    path: str,
    *,
    client: tuple[str, int] = LOCAL,
    key: str | None = None,
    headers: Any = None,
    **kwargs: Any,
) -> httpx.Response:
    own = {"Authorization": f"Bearer {key}"} if key else {}

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000/early_exit") as http:
            return await http.request(method, path, headers={**own, **(headers or {})}, **kwargs)

    return asyncio.run(answer())


@pytest.fixture
def heard(monkeypatch):
    lines = []
    monkeypatch.setattr(plugin.logger, "info", lambda message, *args: lines.append(message % args))
    return lines


# ---- changes


@pytest.mark.parametrize(("method", "path", "kwargs"), CHANGES)
def test_with_an_admin_key_only_its_holder_changes_anything(method, path, kwargs, heard):
    app, engine = served(keys=["sk-mine", "sk-theirs"], admin=["other", "boss"], tenants=TENANTS)
    for client in (LOCAL, STRANGER):
        tenant = ask(app, method, path, client=client, key="sk-mine", **kwargs)
        assert tenant.status_code == 403 and "only the admin key may change" in tenant.json()["detail"]
        assert "admin" in tenant.headers["WWW-Authenticate"]
        for key in (None, "wrong", "boss "):
            assert ask(app, method, path, client=client, key=key and key.strip() + "x", **kwargs).status_code == 401
    assert engine.asked == [] and heard == []
    assert ask(app, method, path, client=STRANGER, key="boss", **kwargs).status_code == 200
    assert engine.asked[0] in ("early_exit_configure", "early_exit_forget")
    assert (
        len(heard) == 1 and f"admin key {digest_of('boss')[:8]} from 192.0.2.7" in heard[0] and "boss" not in heard[0]
    )


@pytest.mark.parametrize(("method", "path", "kwargs"), CHANGES)
def test_without_an_admin_key_only_this_machine_changes_anything(method, path, kwargs, heard):
    app, engine = served(keys=["sk"])
    refused = ask(app, method, path, client=STRANGER, key="sk", **kwargs)
    assert refused.status_code == 403 and "--admin-key" in refused.json()["detail"]
    assert ask(app, method, path, client=LOCAL, **kwargs).status_code == 401  # the API key is wanted all the same
    assert engine.asked == [] and ask(app, "GET", "/status", client=STRANGER, key="sk").status_code == 200
    assert ask(app, method, path, client=LOCAL, key="sk", **kwargs).status_code == 200
    assert f"API key {digest_of('sk')[:8]} from 127.0.0.1" in heard[0]
    keyless, _ = served()
    assert ask(keyless, method, path, client=LOCAL, **kwargs).status_code == 200 and "this machine" in heard[1]
    assert ask(keyless, method, path, client=STRANGER, **kwargs).status_code == 403


def test_with_an_admin_key_alone_this_machine_may_still_read():
    app, _ = served(admin=["boss"])
    assert ask(app, "GET", "/config").json()["may_change"] is False
    for method, path, kwargs in CHANGES:
        refused = ask(app, method, path, **kwargs)
        assert refused.status_code == 401 and "admin" in refused.headers["WWW-Authenticate"]
    assert ask(app, "GET", "/status", key="wrong").status_code == 401
    assert ask(app, "GET", "/status", client=STRANGER).status_code == 401
    assert ask(app, "GET", "/status", headers={"X-Forwarded-For": "127.0.0.1"}).status_code == 401
    assert ask(app, "GET", "/config", client=STRANGER, key="boss").json()["may_change"] is True
    assert ask(app, "GET", "/", client=STRANGER).status_code == 200  # it asks for the key


def test_a_change_is_logged_with_what_it_was_and_what_it_is(heard):
    app, _ = served()
    ask(app, "PATCH", "/config", json={"accuracy_bound": 0.05, "tpt_target_ms": 20})
    ask(app, "PATCH", "/config", json={"accuracy_bound": 2})
    ask(app, "PATCH", "/config", json={})
    assert heard[0].endswith(": accuracy_bound 0.01 -> 0.05, tpt_target_ms None -> 20.0")
    assert heard[1].endswith("none named") and len(heard) == 2


def test_an_admin_key_that_tenants_have_is_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr(plugin.logger, "warning", lambda message, *args: warnings.append(message % args))
    monkeypatch.setenv("APPARATE_ADMIN_KEY", "boss")
    access = plugin.access_of(SimpleNamespace(api_key=["sk", "boss"]))
    assert access.has_admin_key and len(warnings) == 1
    plugin.access_of(SimpleNamespace(api_key=["sk"]))
    assert len(warnings) == 1


# ---- what a tenant sees

FOREIGN = ("theirs", "33.25", "7777", "4006", "0.77", "api_keys", digest_of("sk-mine"))


@pytest.mark.parametrize(
    ("key", "own"), [("sk-mine", "mine"), ("sk-theirs", "theirs"), ("sk-plain", UNNAMED), (None, UNNAMED)]
)
def test_a_tenant_sees_its_own_tenant_only(key, own):
    keys = ["sk-mine", "sk-theirs", "sk-plain"] if key else []
    app, _ = served(keys=keys, admin=["boss"], tenants=TENANTS)
    status, config = (ask(app, "GET", path, key=key).json() for path in ("/status", "/config"))
    assert list(status["tenants"]) == [own] and status["tenant"] == own
    for figures in (status["counts"], status["tenants"][own]):
        assert figures["diverged"] == figures["divergences"]  # the old name, too
    assert status["counts"]["emitted"] == status["tenants"][own]["emitted"]
    assert status["config"] == config["config"] and list(config["config"]["tenants"]) in ([own], [])
    foreign = [word for word in FOREIGN if not (own == "theirs" and word in ("theirs", "33.25"))]
    assert not [word for word in foreign if word in json.dumps([status, config])]
    whole = ask(app, "GET", "/status", key="boss").json()
    assert list(whole["tenants"]) == ["mine", "theirs", "open", UNNAMED] and whole["counts"]["emitted"] == 4006


def test_the_stream_of_events_shows_a_tenant_its_own_tenant_only():
    app, engine = served(keys=["sk-mine"], admin=["boss"], tenants=TENANTS)
    server = app.state.early_exit

    async def listen():
        server.collector.publish(await server.status())
        streams = {name: plugin.stream(server, name) for name in ("mine", None)}
        first = {name: await anext(one) for name, one in streams.items()}
        waiting = {name: asyncio.ensure_future(anext(one)) for name, one in streams.items()}
        await asyncio.sleep(0.01)
        engine.shares["mine"].emitted = 5
        server.collector.publish(await server.changed_status())
        second = {name: await one for name, one in waiting.items()}
        for one in streams.values():
            await one.aclose()
        return first, second

    first, second = asyncio.run(listen())
    for texts, emitted in ((first, 1000), (second, 5)):
        mine, whole = (json.loads(texts[name].removeprefix("data: ")) for name in ("mine", None))
        assert list(mine["tenants"]) == ["mine"] and mine["counts"]["emitted"] == emitted
        assert not [word for word in FOREIGN if word in texts["mine"]]
        assert "theirs" in whole["tenants"] and whole["counts"]["emitted"] == 4006


def test_without_tenants_a_holder_of_an_api_key_sees_the_totals():
    app, _ = served(keys=["sk"], admin=["boss"])
    assert ask(app, "GET", "/status", key="sk", client=STRANGER).json()["counts"]["emitted"] == 4006


# ---- proxies, and who is this machine


@pytest.mark.parametrize("headers", FORWARDED)
def test_without_an_admin_key_what_comes_by_a_proxy_is_refused(headers):
    for keys, key in (((), None), (("sk",), "sk")):
        app, engine = served(keys=keys)
        for path in ("/status", "/config", "/events", "/", ""):
            refused = ask(app, "GET", path, key=key, headers=headers)
            assert refused.status_code == 403 and "--admin-key" in refused.json()["detail"]
        for method, path, kwargs in CHANGES:
            assert ask(app, method, path, key=key, headers=headers, **kwargs).status_code == 403
        assert engine.asked == []
    app, _ = served(keys=["sk"], admin=["boss"])
    assert ask(app, "GET", "/status", key="sk", headers=headers).status_code == 200
    assert ask(app, "POST", "/reset", key="sk", headers=headers).status_code == 403
    assert ask(app, "POST", "/reset", key="boss", headers=headers).status_code == 200


def test_the_names_of_the_issue_are_among_the_headers_of_proxies():
    assert {"forwarded", "via", "x-real-ip"} <= set(PROXY_HEADERS)


@pytest.mark.parametrize(
    ("client", "may"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),  # to a socket that listens for IPv4 and IPv6
        ("::ffff:192.0.2.7", False),
        ("192.0.2.7", False),
        ("0.0.0.0", False),
        ("localhost", False),  # no address
        ("", False),
        ("::ffff:7f00:1x", False),
    ],
)
def test_a_loopback_address_is_this_machine(client, may):
    app, _ = served()
    assert ask(app, "GET", "/status", client=(client, 1)).status_code == (200 if may else 403)


@pytest.mark.parametrize(
    ("scope", "may"),
    [
        ({"client": None, "server": ("/run/x.sock", None)}, True),  # as uvicorn has it
        ({"client": None, "server": ("127.0.0.1", 8000)}, False),  # a peer that nobody knows
        ({"client": None}, False),
        ({"client": None, "server": ("/run/x.sock", None), "headers": [(b"via", b"1.1 x")]}, False),
        ({"client": LOCAL, "server": LOCAL, "http_version": "1.0"}, False),  # as nginx asks by default
    ],
)
def test_a_unix_socket_is_this_machine_and_an_unknown_peer_is_not(scope, may):
    assert is_local(Request({"type": "http", "http_version": "1.1", "headers": [], **scope})) is may


MALFORMED = (
    b"Host: [::1\r\n",
    b"Host: a\xff\r\n",
    b"Host: [v1.\xe2\x84\x80]\r\n",
    b"Host: localhost\r\nOrigin: http://[\r\n",
    b"Host: localhost\r\nHost: localhost\r\n",
)


@contextmanager
def listening(app, **options):
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        for _ in range(500):
            if server.started:
                break
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()


def test_over_real_sockets_a_header_makes_nobody_this_machine(tmp_path, monkeypatch):
    """uvicorn with its defaults, as vLLM starts it: it believes X-Forwarded-For of a peer on this machine; told to
    believe everybody, of all."""
    for trusted in ("127.0.0.1", "*"):
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
        app, _ = served()
        with socket.create_server(("127.0.0.1", 0)) as held:
            port = held.getsockname()[1]
        with listening(app, host="127.0.0.1", port=port):
            url = f"http://127.0.0.1:{port}/early_exit/config"
            assert httpx.get(url).status_code == 200
            for headers in FORWARDED:
                assert httpx.patch(url, json={"accuracy_bound": 0.9}, headers=headers).status_code == 403
                assert httpx.get(url, headers=headers).status_code == 403
            for lines in MALFORMED:
                with socket.create_connection(("127.0.0.1", port)) as raw:
                    raw.sendall(b"GET /early_exit/config HTTP/1.1\r\n" + lines + b"Connection: close\r\n\r\n")
                    assert b" 40" in raw.makefile("rb").readline(), lines
        path = str(tmp_path / f"{len(trusted)}.sock")
        with listening(app, uds=path), httpx.Client(transport=httpx.HTTPTransport(uds=path)) as http:
            assert http.patch("http://localhost/early_exit/config", json={"accuracy_bound": 0.02}).status_code == 200
            for headers in FORWARDED:
                assert http.get("http://localhost/early_exit/config", headers=headers).status_code == 403


# ---- what a stranger sends


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "[::1"},
        {"Host": "[v1.x"},
        {"Host": "a]b"},
        {"Host": "x" * 5000},
        {"Host": "localhost", "Origin": "http://["},
        {"Host": "localhost", "Origin": "http://[::1"},
        {"Host": "localhost", "Origin": "//"},
        {"Authorization": "Bearer"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Authorization": b"\xff"},
    ],
)
def test_malformed_headers_are_a_4xx_on_every_route(headers):
    for keys in ((), ("sk",)):
        app, _ = served(keys=keys)
        for path in ("/status", "/config", "/events", "/x", "/status/"):
            if path == "/events" and not keys and "Authorization" in headers:
                continue  # it is let in, and told of events until it goes
            answer = ask(app, "GET", path, headers=headers, follow_redirects=True)
            assert answer.status_code < 500, (path, answer.text)
            assert answer.status_code >= 400 or "Authorization" in headers
        for method, path, kwargs in CHANGES:
            assert ask(app, method, path, headers=headers, **kwargs).status_code < 500


def test_two_hosts_are_none():
    app, _ = served()
    for name, values in (("Host", ("localhost", "evil.example")), ("Origin", ("http://localhost", "http://evil"))):
        answer = ask(
            app, "GET", "/status", headers=httpx.Headers([("Host", "localhost"), *((name, v) for v in values)])
        )
        assert answer.status_code in (400, 403)


BODIES = [
    b"[" * 30_000,
    b"[" * 30_000 + b"]" * 30_000,
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b'{"accuracy_bound":' + b"[" * 300 + b"]" * 300 + b"}",
    b'{"accuracy_bound":' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"accuracy_bound": ' + b"9" * 5000 + b"}",
    b'{"max_exits": ' + b"9" * 4000 + b"}",
    b'{"max_exits": -' + b"9" * 4000 + b"}",
    b'{"accuracy_bound": ' + b"9" * 4000 + b"}",
    b'{"accuracy_bound": 1e999}',
    b'{"accuracy_bound": NaN}',
    b'{"accuracy_bound": -Infinity}',
    b'{"accuracy_bound": "0.\xff"}',
    b'{"policy": "\\ud800"}',
    b'{"depth": "\\ud800"}',
    b'{"\\ud800": 1}',
    b'{"a\\nb\\u0000": 1}',
    b'{"' + b"x" * 50_000 + b'": 1}',
    b'{"policy": "' + b"x" * 50_000 + b'"}',
    b'{"policy": {"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}}',
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b"null",
    b"",
    b'"x"',
    b"1" * 5000,
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_makes_no_sense_is_a_4xx_in_one_short_line(body):
    app, engine = served()
    answer = ask(app, "PATCH", "/config", content=body)
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 1500 and "\n" not in answer.json()["detail"]
    assert "early_exit_configure" not in engine.asked
    assert ask(app, "POST", "/reset", content=body).status_code == 200  # it reads none


@pytest.mark.parametrize(
    "options",
    [
        {"early_exit\ud800": 1},
        {"early_exit_" + "x" * 10_000: 1},
        {"early_exit_tenant": "\ud800\n"},
        {"early_exit_tenant": "x" * 10_000},
        {"early_exit_tenant": ["mine"]},
        {"accuracy_bound": 10**400},
        {"tpt_target_ms": "x" * 10_000},
        {"early_exit": [[[[[[[[[[1]]]]]]]]]]},
    ],
)
def test_a_request_s_bad_option_is_repeated_in_one_short_line_that_can_be_sent(options):
    with pytest.raises(ConfigError) as error:
        parse_request_options(options, EarlyExitConfig())
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    str(error.value).encode()


def test_headers_that_are_no_text_pass_the_middleware_as_a_key_of_nobody():
    app = FastAPI()
    app.add_middleware(AnswerMiddleware)
    app.state.early_exit = SimpleNamespace(tenants_by_key={digest_of("sk-mine"): "mine"})
    seen = []

    @app.post("/v1")
    async def route():
        from apparate_llm.api.answers import CALLER

        seen.append(CALLER.get().key_tenant)
        return {}

    for value in (b"Bearer \xff\xfe", b"\xff", b"", b"Bearer", b"Basic sk-mine", b"bearer sk-mine"):
        assert ask(app, "POST", "http://localhost/v1", headers={"Authorization": value}).status_code == 200
    assert seen == [None, None, None, None, None, "mine"]


# ---- a tenant by its key


def test_a_tenant_with_keys_is_not_for_those_who_name_it():
    config = parse_config({"tenants": {**TENANTS, "both": {"api_keys_sha256": [digest_of("k")], "by_name": True}}})
    with pytest.raises(ConfigError, match=r"unknown tenant mine \(allowed: open, both\)"):
        parse_request_options({"early_exit_tenant": "mine"}, config)
    assert parse_request_options({"early_exit_tenant": "mine"}, config, "mine").accuracy_bound == 0.004
    for name in ("open", "both"):
        assert parse_request_options({"early_exit_tenant": name}, config).early_exit_tenant == name


def test_a_default_tenant_with_keys_is_not_for_those_who_have_none():
    keyed = {"default": {"api_keys_sha256": [digest_of("k")], "early_exit": 0}}
    config = parse_config({"tenants": keyed})
    assert parse_request_options({}, config).early_exit_tenant is None
    assert parse_request_options({}, config, "default").early_exit == 0
    keyed["default"]["by_name"] = True
    assert parse_request_options({}, parse_config({"tenants": keyed})).early_exit_tenant == "default"


def test_the_engine_believes_the_api_and_nobody_else():
    """It completes what the API did, and knows no keys: the proof tells it of one."""
    app, engine = served(keys=["sk-mine"], tenants=TENANTS)
    server = app.state.early_exit
    watch_requests(server)
    token = plugin.CALLER.set(Caller(key_tenant="mine"))
    try:
        params = engine.generate("prompt", SimpleNamespace(extra_args=None))
        again = engine.generate("prompt", params)  # vLLM may pass the same ones for several prompts
    finally:
        plugin.CALLER.reset(token)
    assert parse_request_options(again.extra_args, server.config).early_exit_tenant == "mine"
    forged = {"early_exit_tenant": "mine", KEY_TENANT_PROOF: key_tenant_proof(server.config, "theirs")}
    for proof in (forged[KEY_TENANT_PROOF], 1, [], "", "x"):
        with pytest.raises(ConfigError):
            parse_request_options({**forged, KEY_TENANT_PROOF: proof}, server.config)


@pytest.mark.parametrize("value", [None, "mine"])
def test_an_old_field_does_not_travel_beside_the_tenant_that_the_api_found(value):
    """The engine would refuse both, and take the server's limits for the tenant's."""
    app, engine = served(keys=["sk-mine"], tenants=TENANTS)
    server = app.state.early_exit
    watch_requests(server)
    token = plugin.CALLER.set(Caller(key_tenant="mine"))
    try:
        params = engine.generate("prompt", SimpleNamespace(extra_args={"early_exit_class": value}))
    finally:
        plugin.CALLER.reset(token)
    assert "early_exit_class" not in params.extra_args
    assert parse_request_options(params.extra_args, server.config).early_exit_tenant == "mine"


def test_a_tenant_that_nobody_can_be_of_is_refused():
    from apparate_llm.config import check_tenants

    with pytest.raises(ConfigError, match="a: no request can be of it"):
        check_tenants(parse_config({"tenants": {"a": {"by_name": False}}}))


# ---- how often the engine is asked


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
