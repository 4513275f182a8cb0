"""What the API processes of one server tell each other, by the times of files that all of them see.

Each asks the engines while there is work. Of the others' work and changes it would hear only by asking an idle worker
every second, which spins after each answer.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from vllm.logger import init_logger

logger = init_logger("vllm.apparate")
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # vLLM makes one where there are several such processes
WORK, OPTIONS = "apparate.work", "apparate.options"  # what there is news of
TELL_INTERVAL_S = 0.2
LOOK_INTERVAL_S = 0.2
LOCK_INTERVAL_S = 0.02


class Neighbours:
    """folder: None where there is one API process."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = Path(folder) if folder else None
        self._last_s = float("-inf")
        self._known = {news: self._time_of(news) for news in (WORK, OPTIONS)}

    @property
    def exist(self) -> bool:
        return self._folder is not None

    def tell_work(self) -> None:
        """That a request came; cheap enough for each of them."""
        if self._folder is not None and time.monotonic() - self._last_s >= TELL_INTERVAL_S:
            self._last_s = time.monotonic()
            self._tell(WORK)

    def tell_options(self) -> None:
        if self._folder is not None:
            self._tell(OPTIONS)

    def hear(self, news: str) -> bool:
        """Whether another process has told of it since this was called last."""
        before, self._known[news] = self._known[news], self._time_of(news)
        return before != self._known[news]

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """No other API process is in such a block meanwhile."""
        if self._folder is None:
            yield
            return
        with (self._folder / OPTIONS).open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(LOCK_INTERVAL_S)
            yield

    def _tell(self, news: str) -> None:
        assert self._folder is not None
        with suppress(OSError):  # the folder goes when the server ends
            path = self._folder / news
            path.touch()
            now = time.time_ns()
            os.utime(path, ns=(now, now))
            self._known[news] = now

    def _time_of(self, news: str) -> int | None:
        with suppress(OSError):
            if self._folder is not None:
                return (self._folder / news).stat().st_mtime_ns
        return None


async def follow(neighbours: Neighbours, work: asyncio.Event, take_up: Callable[[], Awaitable[object]]) -> None:
    """Wake the polling for work of others; take up the options that they changed."""
    while True:
        await asyncio.sleep(LOOK_INTERVAL_S)
        if neighbours.hear(WORK):
            work.set()
        if neighbours.hear(OPTIONS):
            try:
                await take_up()
            except Exception as error:  # the polling takes them up later
                logger.warning("Options that another API process changed are not taken up yet: %s", error)
            work.set()
