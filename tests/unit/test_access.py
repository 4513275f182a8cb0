"""Who may do what under /early_exit/: the admin, a tenant, this machine, a stranger, and whoever comes by a proxy."""

import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from fastapi import Request

from apparate_llm.admin import digest_of
from apparate_llm.api import plugin
from apparate_llm.api.access import PROXY_HEADERS, is_local
from tests.exit_routes import CHANGES, LOCAL, STRANGER, TENANTS, ask, served

FORWARDED = [
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-For": "192.0.2.7, 127.0.0.1"},
    {"Forwarded": "for=127.0.0.1"},
    {"X-Real-IP": "127.0.0.1"},
    {"Via": "1.1 proxy"},
    {"X-Forwarded-Proto": "https"},
    {"CF-Connecting-IP": "192.0.2.7"},
]


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
