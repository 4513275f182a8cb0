"""vLLM entry point `vllm.endpoint_plugins`: the routes under /early_exit/ beside the OpenAI ones."""

import asyncio
import json
import os
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from pathlib import Path
from time import monotonic

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from prometheus_client.core import REGISTRY
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from apparate_llm.admin import admin_digests, digest_of
from apparate_llm.api.access import Access, Visitor, read_object
from apparate_llm.api.answers import CALLER, AnswerMiddleware, tenants_by_key
from apparate_llm.api.changes import change_all
from apparate_llm.api.exit_server import ExitServer
from apparate_llm.api.metrics import MetricsMiddleware
from apparate_llm.api.neighbours import FOLDER, Neighbours
from apparate_llm.api.reports import reporting
from apparate_llm.api.requests import check_requests
from apparate_llm.api.views import status_view, tenant_seen
from apparate_llm.config import (
    KEY_TENANT_PROOF,
    ConfigError,
    EarlyExitConfig,
    config_from_vllm,
    key_tenant_proof,
    new_options,
    new_request_fields,
    parse_request_options,
)

logger = init_logger("vllm.apparate")
MAX_STREAMS = 256
KEEP_ALIVE_S = 15.0
PAGE_HEADERS = {  # nothing from, and nothing to, another host
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def authorised(request: Request) -> None:
    request.state.visitor = request.app.state.early_exit_access.check(request)


async def may_change(request: Request) -> None:
    request.app.state.early_exit_access.check_change(request.state.visitor)


def visitor_of(request: Request) -> Visitor:
    visitor: Visitor = request.state.visitor
    return visitor


def tenant_seen_by(request: Request, server: ExitServer) -> str | None:
    """The tenant that the visitor sees; None: all."""
    visitor = visitor_of(request)
    key_tenant = server.tenants_by_key.get(visitor.key_digest or "")
    return tenant_seen(server.config, key_tenant, sees_all=visitor.may_change)


def server_of(request: Request) -> ExitServer:
    server: ExitServer | None = request.app.state.early_exit
    if server is None:
        raise HTTPException(503, "this server runs without early exits (policy off)")
    return server


router = APIRouter(prefix="/early_exit", dependencies=[Depends(authorised)])
page = APIRouter()  # has nothing of the server in it: it asks for the API key where there is one


@page.get("/early_exit", include_in_schema=False)
async def dashboard_without_slash(request: Request) -> RedirectResponse:
    request.app.state.early_exit_access.check_page(request)
    return RedirectResponse(request.scope.get("root_path", "") + "/early_exit/")


@page.get("/early_exit/")
async def dashboard(request: Request) -> HTMLResponse:
    """Live figures, the switch and a prompt to try, as one page."""
    request.app.state.early_exit_access.check_page(request)
    return HTMLResponse((Path(__file__).parent / "dashboard.html").read_text(), headers=PAGE_HEADERS)


@router.get("/status")
async def status(request: Request) -> dict[str, object]:
    """Options, depth in use and running totals; 503 where the server runs without early exits."""
    server = server_of(request)
    now = await server.status()
    return status_view(now, server.config, tenant_seen_by(request, server))


@router.get("/config")
async def config(request: Request) -> dict[str, object]:
    """The options in force and those that may change."""
    server = server_of(request)
    await server.status()
    return {
        **server.config_in_force(tenant_seen_by(request, server)),
        "may_change": visitor_of(request).may_change,
    }


@router.patch("/config", dependencies=[Depends(may_change)])
async def change_config(request: Request) -> dict[str, object]:
    """Options to change, as a JSON object: in force from the next engine step on, for requests under way as well.
    400 says what is not allowed, and changes nothing."""
    server = server_of(request)
    try:
        changes = new_options(await read_object(request))
    except ConfigError as error:
        raise HTTPException(400, str(error)) from None
    async with server.changing, server.neighbours.alone():
        before = await change_all(server, changes)
        log_change(visitor_of(request), before, server.config, changes)
        server.neighbours.tell_options()
    return server.config_in_force()


def log_change(visitor: Visitor, before: EarlyExitConfig, after: EarlyExitConfig, names: Iterable[str]) -> None:
    changes = ", ".join(f"{name} {getattr(before, name)} -> {getattr(after, name)}" for name in names)
    logger.info("Options changed by %s: %s", visitor.who, changes or "none named")


@router.post("/reset", dependencies=[Depends(may_change)])
async def reset(request: Request) -> dict[str, bool]:
    """Forget what the controller has learned; totals go on. 409 where that failed."""
    if not all(await server_of(request).ask("early_exit_forget")):
        raise HTTPException(409, "nothing was forgotten: it failed on an engine, the server's log says why")
    logger.info("What the controller has learned was dropped by %s", visitor_of(request).who)
    return {"reset": True}


@router.get("/events")
async def events(request: Request) -> StreamingResponse:
    """The status as server-sent events, one a second while there is work; 503 where too many listen already."""
    server = server_of(request)
    if server.num_streams >= MAX_STREAMS:
        raise HTTPException(503, f"{MAX_STREAMS} clients listen already", {"Retry-After": "10"})
    await server.freshen()
    return StreamingResponse(
        stream(server, tenant_seen_by(request, server)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def text_for(server: ExitServer, tenant_name: str | None) -> str:
    """The last status that was published, as JSON; tenant_name: the one tenant that the listener sees."""
    status, text = server.collector.status, server.collector.text
    if tenant_name is None or status is None:
        return text
    return json.dumps(status_view(status, server.config, tenant_name))


async def stream(server: ExitServer, tenant_name: str | None = None) -> AsyncIterator[str]:
    server.num_streams += 1
    try:
        if server.collector.text:
            yield f"data: {text_for(server, tenant_name)}\n\n"
        while True:
            try:
                text = await asyncio.wait_for(server.collector.next_text(), KEEP_ALIVE_S)
                if text is None:
                    return
                yield f"data: {text if tenant_name is None else text_for(server, tenant_name)}\n\n"
            except TimeoutError:
                yield ": nothing new\n\n"
    finally:
        server.num_streams -= 1


def watch_requests(server: ExitServer) -> None:
    """Wake the polling, refuse bad early-exit options that came past the check at the door (vLLM answers a ValueError
    raised here with HTTP 400), give a request its tenant, and report where one asks for it."""
    generate: Callable[..., AsyncGenerator[RequestOutput]] = server.engine.generate

    def checked(
        prompt: object, sampling_params: SamplingParams, *args: object, **kwargs: object
    ) -> AsyncGenerator[RequestOutput]:
        caller = CALLER.get()
        passed = getattr(sampling_params, "extra_args", None)
        given = new_request_fields({**(caller.options if caller else {}), **(passed or {})})
        options = parse_request_options(given, server.config, caller.key_tenant if caller else None)
        server.last_request_s = monotonic()
        server.collector.work.set()
        server.neighbours.tell_work()
        if options.early_exit_tenant is not None:
            given["early_exit_tenant"] = options.early_exit_tenant
        if caller is not None and caller.key_tenant is not None:
            given[KEY_TENANT_PROOF] = key_tenant_proof(server.config, caller.key_tenant)
        if given != (passed or {}):
            sampling_params.extra_args = given
        if caller is None or not options.early_exit_report:
            return generate(prompt, sampling_params, *args, **kwargs)
        caller.wants_report = True
        return reporting(
            lambda params: generate(prompt, params, *args, **kwargs),
            prompt,
            sampling_params,
            caller,
            ask=server.ask,
            tokenizer=lambda: server.engine.renderer.tokenizer,
        )

    vars(server.engine)["generate"] = checked  # for this engine only


def keys_of(args: Namespace) -> list[str]:
    """The API keys of /v1, found as vLLM does."""
    given = getattr(args, "api_key", None)
    keys = given if isinstance(given, list) else [given]
    return [key for key in keys if key] or [key for key in [os.environ.get("VLLM_API_KEY")] if key]


def warn_of_keys(by_key: dict[str, str], keys: list[str]) -> None:
    accepted = {digest_of(key) for key in keys}
    for name in sorted({own for digest, own in by_key.items() if digest not in accepted}):
        logger.warning("Tenant %s has an API key that the server does not accept: give it to --api-key as well", name)


def access_of(args: Namespace) -> Access:
    keys, admin_keys = keys_of(args), admin_digests(os.environ)
    if any(digest_of(key) in admin_keys for key in keys):
        logger.warning("An admin key is an API key, too: all that have it may change the options of the server")
    return Access(keys, admin_keys)


class StatusPlugin:
    name = "apparate"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(page)
        app.include_router(router)
        check_requests(app)
        app.add_middleware(AnswerMiddleware)
        app.add_middleware(MetricsMiddleware)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        from apparate_llm.engine.proposer import WORKER_CLASS

        state.early_exit_access = access_of(args)
        state.early_exit = None
        if engine_client is not None and args.worker_cls == WORKER_CLASS:
            config = config_from_vllm(engine_client.vllm_config)
            state.early_exit = server = ExitServer(
                engine_client,
                config,
                tenants_by_key=tenants_by_key(config),
                neighbours=Neighbours(os.environ.get(FOLDER)),
            )
            warn_of_keys(server.tenants_by_key, keys_of(args))
            watch_requests(server)
            REGISTRY.register(server.collector)
            server.run(state)
