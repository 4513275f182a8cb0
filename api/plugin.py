"""vLLM entry point `vllm.endpoint_plugins`: GET /early_exit/status beside the OpenAI routes."""

from argparse import Namespace
from typing import Any

from apparate_llm.api.metrics import start_polling
from fastapi import APIRouter, FastAPI, HTTPException, Request

router = APIRouter(prefix="/early_exit")


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Knobs, depth in use and running totals; 503 where the server runs without early exits."""
    engine = request.app.state.early_exit_engine
    if engine is None:
        raise HTTPException(503, "this server runs without early exits (policy off)")
    return (await engine.collective_rpc("early_exit_status"))[0]


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
            state.early_exit_polling = start_polling(engine_client)  # kept: an unreferenced task may be collected
