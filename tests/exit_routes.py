"""The routes under /early_exit/ in front of a fake engine, and requests to them by whomever a test names."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
from fastapi import FastAPI

from apparate_llm.admin import digest_of
from apparate_llm.api.access import Access
from apparate_llm.api.answers import tenants_by_key
from apparate_llm.api.exit_server import ExitServer
from apparate_llm.api.plugin import page, router
from apparate_llm.config import EarlyExitConfig, parse_config, parse_live, public_config
from apparate_llm.exits.tenants import shares_of

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
