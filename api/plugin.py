"""vLLM entry point `vllm.endpoint_plugins`: the routes under /early_exit/ beside the OpenAI ones."""

import asyncio
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from apparate_llm.api.access import Access, read_object
from apparate_llm.api.metrics import ExitCollector, poll
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from prometheus_client.core import REGISTRY

from apparate_llm.config import (
    LIVE_KNOBS,
    ConfigError,
    EarlyExitConfig,
    config_from_vllm,
    parse_live,
    parse_request_knobs,
)

MAX_STREAMS = 256
KEEP_ALIVE_S = 15.0


@dataclass
class ExitServer:
    """What the routes know of the engine behind them."""

    engine: Any
    config: EarlyExitConfig  # in force
    collector: ExitCollector = field(default_factory=ExitCollector)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_streams: int = 0
    polling: asyncio.Task[None] | None = None  # kept: an unreferenced task may be collected

    async def ask(self, method: str, *args: Any) -> Any:
        return (await self.engine.collective_rpc(method, args=args))[0]


async def authorised(request: Request) -> None:
    request.app.state.early_exit_access.check(request)


def server_of(request: Request) -> ExitServer:
    server = request.app.state.early_exit
    if server is None:
        raise HTTPException(503, "this server runs without early exits (policy off)")
    return server


router = APIRouter(prefix="/early_exit", dependencies=[Depends(authorised)])


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Knobs, depth in use and running totals; 503 where the server runs without early exits."""
    return await server_of(request).ask("early_exit_status")


@router.get("/config")
async def config(request: Request) -> dict[str, Any]:
    """The knobs in force and those that may change."""
    return {"config": server_of(request).config.model_dump(), "live": LIVE_KNOBS}


@router.patch("/config")
async def change_config(request: Request) -> dict[str, Any]:
    """Knobs to change, as a JSON object: in force from the next engine step on, for requests under way as well.
    400 says what is not allowed, and changes nothing."""
    server = server_of(request)
    changes = await read_object(request)
    async with server.changing:
        try:
            changed = parse_live(changes, server.config)
        except ConfigError as error:
            raise HTTPException(400, str(error)) from None
        refused = await server.ask("early_exit_configure", changes)
        if refused is not None:
            raise HTTPException(400, refused)
        server.config = changed
        server.collector.publish(await server.ask("early_exit_status"))
    return {"config": changed.model_dump(), "live": LIVE_KNOBS}


@router.post("/reset")
async def reset(request: Request) -> dict[str, Any]:
    """Forget what the controller has learned; totals go on."""
    await server_of(request).ask("early_exit_forget")
    return {"reset": True}


@router.get("/events")
async def events(request: Request) -> StreamingResponse:
    """The status as server-sent events, one a second while there is work; 503 where too many listen already."""
    server = server_of(request)
    if server.num_streams >= MAX_STREAMS:
        raise HTTPException(503, f"{MAX_STREAMS} clients listen already", {"Retry-After": "10"})
    return StreamingResponse(
        stream(server), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


async def stream(server: ExitServer) -> AsyncIterator[str]:
    server.num_streams += 1
    try:
        if server.collector.text:
            yield f"data: {server.collector.text}\n\n"
        while True:
            try:
                yield f"data: {await asyncio.wait_for(server.collector.next_text(), KEEP_ALIVE_S)}\n\n"
            except TimeoutError:
                yield ": nothing new\n\n"
    finally:
        server.num_streams -= 1


def watch_requests(server: ExitServer) -> None:
    """Wake the polling, and refuse bad early-exit knobs where a request comes in: vLLM answers a ValueError raised
    here with HTTP 400."""
    generate = server.engine.generate

    def checked(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        parse_request_knobs(getattr(sampling_params, "extra_args", None), server.config)
        server.collector.work.set()
        return generate(prompt, sampling_params, *args, **kwargs)

    server.engine.generate = checked


def keys_of(args: Namespace) -> list[str]:
    """The API keys of /v1, found as vLLM does."""
    given = getattr(args, "api_key", None)
    keys = given if isinstance(given, list) else [given]
    return [key for key in keys if key] or [key for key in [os.environ.get("VLLM_API_KEY")] if key]


class StatusPlugin:
    name = "apparate"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        from apparate_llm.engine.proposer import WORKER_CLASS

        state.early_exit_access = Access(keys_of(args))
        state.early_exit = None
        if engine_client is not None and args.worker_cls == WORKER_CLASS:
            state.early_exit = server = ExitServer(engine_client, config_from_vllm(engine_client.vllm_config))
            watch_requests(server)
            REGISTRY.register(server.collector)
            server.polling = asyncio.create_task(poll(server.collector, engine_client))
