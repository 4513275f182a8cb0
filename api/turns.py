"""One question, put at most once in an interval, whoever wants to know the answer."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Turns(Generic[T]):
    """Who asks within `interval_s` of the last question waits for the next, together with all who ask meanwhile. So
    no answer is older than the wish for it, and the engine is not asked more often for many than for one."""

    def __init__(self, ask: Callable[[], Awaitable[T]], interval_s: Callable[[], float]) -> None:
        self._ask = ask
        self._interval_s = interval_s
        self.answer: T | None = None  # the last one
        self.asked_s = float("-inf")  # when it was asked for, on the monotonic clock
        self._last_asked_s = float("-inf")  # whether it was answered or not
        self._next: asyncio.Task[T] | None = None  # waits for its turn
        self._turn = asyncio.Lock()

    async def get(self, *, max_age_s: float = 0.0) -> T:
        """An answer asked for at most `max_age_s` ago; with 0, from now on. Raises what asking raises."""
        if monotonic() - self.asked_s <= max_age_s:
            return cast(T, self.answer)  # asked for, so there is one
        if self._next is None or self._next.done():
            self._next = asyncio.create_task(self._in_turn())
            self._next.add_done_callback(_hear)
        return await asyncio.shield(self._next)  # one that goes away does not take the answer from the others

    async def now(self) -> T:
        """The answer to a question put at once, for one who has changed it."""
        asked_s = self._last_asked_s = monotonic()
        answer = await self._ask()
        if asked_s >= self.asked_s:
            self.answer, self.asked_s = answer, asked_s
        return answer

    async def _in_turn(self) -> T:
        try:
            async with self._turn:
                await asyncio.sleep(max(0.0, self._last_asked_s + self._interval_s() - monotonic()))
                self._next = None  # who comes from now on waits for the next turn
                return await self.now()
        finally:
            if self._next is asyncio.current_task():
                self._next = None


def _hear(task: asyncio.Task[T]) -> None:
    """Nobody may be left to hear of a failure, and asyncio complains of one that nobody heard."""
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()
