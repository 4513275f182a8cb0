"""vLLM entry point `vllm.endpoint_plugins`: GET /early_exit/status beside the OpenAI routes."""

from argparse import Namespace
from typing import Any

from apparate_llm.api.metrics import start_polling
from fastapi import APIRouter, FastAPI, HTTPException, Request

from apparate_llm.config import config_from_vllm, parse_request_knobs

router = APIRouter(prefix="/early_exit")


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Knobs, depth in use and running totals; 503 where the server runs without early exits."""
    engine = request.app.state.early_exit_engine
    if engine is None:
        raise HTTPException(503, "this server runs without early exits (policy off)")
    return (await engine.collective_rpc("early_exit_status"))[0]


def check_request_knobs(engine_client: Any) -> None:
    """Refuse bad early-exit knobs where a request comes in: vLLM answers a ValueError raised here with HTTP 400."""
    config, generate = config_from_vllm(engine_client.vllm_config), engine_client.generate

    def checked(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        parse_request_knobs(getattr(sampling_params, "extra_args", None), config)
        return generate(prompt, sampling_params, *args, **kwargs)

    engine_client.generate = checked


class StatusPlugin:
    name = "apparate"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        from apparate_llm.engine.proposer import WORKER_CLASS

        has_exits = engine_client is not None and args.worker_cls == WORKER_CLASS
        state.early_exit_engine = engine_client if has_exits else None
        if has_exits:
            check_request_knobs(engine_client)
            state.early_exit_polling = start_polling(engine_client)  # kept: an unreferenced task may be collected
