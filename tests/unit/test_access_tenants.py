"""What a tenant sees of others, and who is a tenant."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from apparate_llm.admin import digest_of
from apparate_llm.api import plugin
from apparate_llm.api.answers import Caller
from apparate_llm.api.plugin import watch_requests
from apparate_llm.api.views import status_view
from apparate_llm.config import (
    KEY_TENANT_PROOF,
    ConfigError,
    key_tenant_proof,
    parse_config,
    parse_live,
    parse_request_options,
)
from apparate_llm.exits.tenants import UNNAMED
from tests.exit_routes import STRANGER, TENANTS, ask, served

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


def test_a_tenant_sees_the_bound_and_the_target_that_are_in_force_for_it():
    """A bound that the server's went below is not in force any more."""
    app, engine = served(tenants=TENANTS)

    def seen():
        server = app.state.early_exit
        status = asyncio.run(server.changed_status())
        views = [status_view(status, server.config, name) for name in ("mine", "theirs", UNNAMED)]
        return [(view["accuracy_bound"], view["tpt_target_ms"]) for view in views]

    assert seen() == [(0.004, None), (0.01, 33.25), (0.01, None)]
    engine.config = parse_live({"accuracy_bound": 0.001, "tpt_target_ms": 20.0}, engine.config)
    assert seen() == [(0.001, 20.0), (0.001, 33.25), (0.001, 20.0)]


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
