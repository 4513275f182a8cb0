"""What requests say of early exits, on vLLM's own routes with nothing behind them."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from vllm.entrypoints.anthropic import api_router as messages
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.scale_out.token_in_token_out import api_router as tokens
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.tokenize import api_router as tokenize
from vllm.sampling_params import SamplingParams

from apparate_llm.api.answers import CALLER, AnswerMiddleware
from apparate_llm.api.plugin import watch_requests
from apparate_llm.api.requests import check_requests
from apparate_llm.config import EarlyExitConfig, Tenant

HELLO = [{"role": "user", "content": "hi"}]
BODIES = {
    "/v1/completions": {"prompt": ["hi", "ho"]},
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/chat/completions/batch": {"messages": [HELLO, HELLO]},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"model": "m", "messages": HELLO, "max_tokens": 5},
    "/inference/v1/generate": {"token_ids": [1]},
}
STATE = {
    "openai_serving_completion": "create_completion",
    "openai_serving_chat": "create_chat_completion",
    "openai_serving_chat_batch": "create_batch_chat_completion",
    "openai_serving_responses": "create_responses",
    "anthropic_serving_messages": "create_messages",
    "serving_tokens": "serve_tokens",
    "serving_tokenization": "create_tokenize",
}


class Reached(ValueError):
    """The route was run."""


@pytest.fixture
def app():
    app = FastAPI()
    for module in (messages, chat, completion, responses, tokens, tokenize):
        app.include_router(module.router)
    check_requests(app)
    app.add_middleware(AnswerMiddleware)
    init_exception_handler(app)
    app.state.args = SimpleNamespace(log_error_stack=False)
    tenants = {"batch": Tenant(early_exit=0)}
    app.state.early_exit = SimpleNamespace(
        tenants_by_key={},
        config=EarlyExitConfig(tenants=tenants),
        collector=SimpleNamespace(work=asyncio.Event()),
        neighbours=SimpleNamespace(tell_work=lambda: None),
    )
    app.state.seen = []

    async def reached(*args):
        app.state.seen.append(CALLER.get())
        raise Reached("reached")

    for name, method in STATE.items():
        setattr(app.state, name, SimpleNamespace(**{method: reached}))
    return app


def ask(app, path, body, **kwargs):
    async def answer():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://s") as http:
            return await (http.post(path, json=body) if body is not None else http.post(path, **kwargs))

    return asyncio.run(answer())


def body_of(path, xargs, **more):
    own = {"sampling_params": {"extra_args": xargs}} if path == "/inference/v1/generate" else {"vllm_xargs": xargs}
    return {**BODIES[path], **own, **more}


BAD = [
    ({"early_exit": 7}, "early_exit: Input should be 0 or 1, got 7"),
    ({"early_exit_report": "yes"}, "early_exit_report: Input should be 0 or 1, got 'yes'"),
    ({"early_exit_depth": 1}, "early_exit_depth: unknown option"),
    ({"accuracy_bound": 0.9}, "accuracy_bound: at most the server's 0.01, got 0.9"),
    ({"accuracy_bound": [0.1]}, "accuracy_bound: Input should be a valid number"),
    ({"tpt_target_ms": -1}, "tpt_target_ms: Input should be greater than 0"),
    ({"early_exit_tenant": "none"}, "unknown tenant none (allowed: batch)"),
    ({"early_exit_tenant": ["batch"]}, "early_exit_tenant: Input should be a valid string"),
    ({"early_exit_tenant": "batch", "early_exit": 1}, "requests of tenant batch take no exits"),
]


@pytest.mark.parametrize("path", BODIES)
def test_a_bad_option_is_a_400_before_the_route_is_run(app, path):
    for stream in (False, True):
        for xargs, says in BAD:
            answer = ask(app, path, body_of(path, xargs, stream=stream))
            assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text
    assert app.state.seen == []


@pytest.mark.parametrize("path", BODIES)
def test_what_is_allowed_reaches_the_route_and_is_known_there(app, path):
    assert (
        "reached" in ask(app, path, body_of(path, {"accuracy_bound": 0.005, "early_exit_report": 1, "other": 1})).text
    )
    assert "reached" in ask(app, path, BODIES[path] | {"sampling_params": {}}).text
    first, second = app.state.seen
    assert first.options == {"accuracy_bound": 0.005, "early_exit_report": 1} and first.wants_report
    assert second.options == {} and not second.wants_report


@pytest.mark.parametrize(
    ("path", "more", "says"),
    [
        ("/v1/completions", {"use_beam_search": True, "n": 2}, "beam search takes no exits"),
        ("/v1/chat/completions", {"use_beam_search": 1, "n": 2}, "beam search takes no exits"),
        ("/v1/completions", {"echo": True, "max_tokens": 0}, "nothing is generated"),
        ("/v1/responses", {"background": True}, "sent before it is there"),
    ],
)
def test_where_there_can_be_no_report_the_answer_is_a_400_that_says_why(app, path, more, says):
    answer = ask(app, path, body_of(path, {"early_exit_report": 1}, **more))
    assert answer.status_code == 400 and says in answer.json()["error"]["message"] and app.state.seen == []
    assert "reached" in ask(app, path, body_of(path, {"early_exit_report": 0}, **more)).text


def test_a_route_without_text_has_no_report_either(app):
    answer = ask(app, "/tokenize", {"prompt": "hi", "vllm_xargs": {"early_exit_report": 1}})
    assert answer.status_code == 400 and "on /tokenize: it generates no text" in answer.text
    assert "reached" in ask(app, "/tokenize", {"prompt": "hi"}).text


def test_what_is_not_ours_to_judge_is_left_to_vllm(app):
    path = "/v1/completions"
    for xargs in (None, [], "x", {"early_exit": None}):
        assert ask(app, path, body_of(path, xargs)).status_code == 400  # vLLM's or ours
    for xargs in (None, {}):
        assert "reached" in ask(app, path, body_of(path, xargs)).text
    json_type = {"Content-Type": "application/json"}
    for content in (b"[1]", b"{", b"\xff", b"[" * 30_000, b"7", b""):
        answer = ask(app, path, None, content=content, headers=json_type)
        assert answer.status_code == 400, (content[:9], answer.text)
    assert ask(app, path, None, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 400
    app.state.early_exit = None
    assert "reached" in ask(app, path, body_of(path, {"early_exit": 7})).text


def test_options_that_a_route_does_not_pass_on_hold_all_the_same(app):
    """Beam search asks the engine with parameters of its own."""
    given = []
    server = app.state.early_exit
    server.engine = SimpleNamespace(generate=lambda prompt, params, name: given.append(params.extra_args))
    watch_requests(server)

    async def beam(*args):
        for _ in range(2):
            server.engine.generate("prompt", SamplingParams(), "beam")
        raise Reached("reached")

    app.state.openai_serving_completion.create_completion = beam
    path = "/v1/completions"
    ask(app, path, body_of(path, {"early_exit_tenant": "batch", "other": 1}, use_beam_search=True))
    assert given == [{"early_exit_tenant": "batch"}] * 2
