"""What a request's body says of early exits, checked before its route runs.

All of vLLM's routes that take JSON depend on `validate_json_request`, and FastAPI lets an application put another
function in its place. There the body is parsed already, and nothing is sent yet: a bad option is HTTP 400 on a route
that streams as well, and on one whose request never reaches the engine as it came (beam search).
"""

from collections.abc import Mapping

from fastapi import FastAPI, HTTPException, Request
from pydantic import TypeAdapter, ValidationError
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from apparate_llm.api.answers import CALLER
from apparate_llm.config import ConfigError, RequestOptions, new_request_fields, parse_request_options

NO_TEXT = (  # routes that answer with no text of the model
    "/v1/systemone",
    "/generative_scoring",
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
)
BOOL, INT = TypeAdapter(bool), TypeAdapter(int)


def check_requests(app: FastAPI) -> None:
    app.dependency_overrides[validate_json_request] = checked_request


async def checked_request(raw_request: Request) -> None:
    """Raises ConfigError, which vLLM answers with HTTP 400."""
    await validate_json_request(raw_request)
    server, caller = getattr(raw_request.app.state, "early_exit", None), CALLER.get()
    if server is None or caller is None:
        return
    try:
        body = await raw_request.json()  # kept by the request: parsed once
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not valid JSON") from None
    path = raw_request.scope["route"].path
    given = options_given(body, path)
    if not given:
        return
    options = parse_request_options(given, server.config, caller.key_tenant)
    if options.early_exit_report and (reason := why_no_report(body, path)) is not None:
        raise ConfigError(f"vllm_xargs: early_exit_report: no report {reason}")
    given = new_request_fields(given)
    caller.options = {name: value for name, value in given.items() if name in RequestOptions.model_fields}
    caller.wants_report = bool(options.early_exit_report)


def options_given(body: object, path: str) -> Mapping[str, object]:
    """What `vllm_xargs` holds; vLLM says what is wrong where that is no object."""
    if not isinstance(body, dict):
        return {}
    given = body.get("vllm_xargs")
    if path == "/inference/v1/generate":
        params = body.get("sampling_params")
        given = params.get("extra_args") if isinstance(params, dict) else None
    return given if isinstance(given, dict) else {}


def why_no_report(body: Mapping[str, object], path: str) -> str | None:
    """None where there will be one."""
    if path in NO_TEXT:
        return f"on {path}: it generates no text"
    if path == "/v1/responses" and is_true(body, "background"):
        return "with background: the answer is sent before it is there"
    if path in ("/v1/chat/completions", "/v1/completions", "/invocations") and is_true(body, "use_beam_search"):
        return "with use_beam_search: beam search takes no exits"
    if path in ("/v1/completions", "/invocations") and is_true(body, "echo") and is_zero(body, "max_tokens"):
        return "with echo and max_tokens 0: nothing is generated"
    return None


def is_true(body: Mapping[str, object], name: str) -> bool:
    """As vLLM will read it."""
    try:
        return BOOL.validate_python(body.get(name))
    except ValidationError:
        return False


def is_zero(body: Mapping[str, object], name: str) -> bool:
    try:
        return INT.validate_python(body.get(name)) == 0
    except ValidationError:
        return False
