"""What a stranger sends: malformed headers, bodies and options, each answered in one short line."""

from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from apparate_llm.admin import digest_of
from apparate_llm.api.answers import AnswerMiddleware
from apparate_llm.config import ConfigError, EarlyExitConfig, parse_request_options
from tests.exit_routes import CHANGES, ask, served


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
