"""When a server is told to stop, or its engine has ended: nobody may be kept waiting for an answer.

vLLM's HTTP server ends when the last connection does, however long that takes, and an engine that is gone answers no
question that it was asked before.
"""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import HTTPException
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

T = TypeVar("T")
LOOK_INTERVAL_S = 0.2
GRACE_S = 5  # for connections whose clients neither read nor leave, where uvicorn would wait without end


class EngineGoneError(HTTPException):
    def __init__(self) -> None:
        super().__init__(503, "the engine has ended")


class Ending:
    """The end of what answers here, for all that wait for it."""

    def __init__(self) -> None:
        self.has_come = False
        self._waiting: set[asyncio.Future[None]] = set()

    def come(self) -> None:
        self.has_come = True
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def or_answer(self, answer: Awaitable[T]) -> T:
        """The answer; raises EngineGoneError where the end comes first."""
        asking = asyncio.ensure_future(answer)
        ending = asyncio.get_running_loop().create_future()
        self._waiting.add(ending)
        try:
            if not self.has_come:
                await asyncio.wait({asking, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise EngineGoneError
            return asking.result()
        finally:
            self._waiting.discard(ending)
            asking.cancel()


async def wait_for_end(engine: EngineClient, state: State) -> None:
    """Returns when the engine is gone or the HTTP server, which vLLM puts into the application's `state` after our
    part of the start, is to stop."""
    while not engine.errored:
        http = getattr(state, "server", None)
        if http is not None:
            if http.should_exit:
                return
            if http.config.timeout_graceful_shutdown is None:
                http.config.timeout_graceful_shutdown = GRACE_S
        await asyncio.sleep(LOOK_INTERVAL_S)
