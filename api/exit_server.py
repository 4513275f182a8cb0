"""The engine behind the routes: its status, the options in force, and what goes on beside the requests."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from apparate_llm.api import metrics
from apparate_llm.api.ending import Ending, wait_for_end
from apparate_llm.api.engines import ask_all, merged
from apparate_llm.api.metrics import ExitCollector, poll
from apparate_llm.api.neighbours import Neighbours, follow
from apparate_llm.api.turns import Turns
from apparate_llm.api.views import config_view
from apparate_llm.config import LIVE_OPTIONS, EarlyExitConfig, public_config
from apparate_llm.renamed import beside_old_names


@dataclass
class ExitServer:
    """What the routes know of the engine behind them."""

    engine: EngineClient
    config: EarlyExitConfig  # in force
    collector: ExitCollector = field(default_factory=ExitCollector)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_streams: int = 0
    neighbours: Neighbours = field(default_factory=Neighbours)
    ending: Ending = field(default_factory=Ending)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)  # kept: an unreferenced task may be collected
    tenants_by_key: dict[str, str] = field(default_factory=dict)
    last_request_s: float = float("-inf")  # when one came in, on the monotonic clock

    def __post_init__(self) -> None:
        self._statuses = Turns(self._status, lambda: metrics.POLL_INTERVAL_S)

    async def ask(self, method: str, *args: object) -> list[Any]:
        """One answer from each engine. Raises EngineGoneError where it ends before."""
        return await self.ending.or_answer(ask_all(self.engine, method, *args))

    async def status(self, *, max_age_s: float = 0.0) -> dict[str, Any]:
        """At most one question a second to the engine, whoever asks. The last answer does where nothing can have
        changed: when it was given no request ran, and none had come for a while."""
        turns = self._statuses
        was_idle = turns.answer is not None and not turns.answer["running"]
        if was_idle and self.last_request_s < turns.asked_s - metrics.POLL_INTERVAL_S:
            max_age_s = metrics.POLL_INTERVAL_S
        return await turns.get(max_age_s=max_age_s)

    async def polled_status(self) -> dict[str, Any]:
        """For the polling: what somebody else was just told will do."""
        return await self.status(max_age_s=metrics.POLL_INTERVAL_S / 2)

    async def changed_status(self) -> dict[str, Any]:
        """After a change, at once."""
        return await self._statuses.now()

    async def _status(self) -> dict[str, Any]:
        """Also takes up the options in force: another API process may have changed them."""
        status = merged([beside_old_names(status) for status in await self.ask("early_exit_status")])
        self.config = self.config.model_copy(update={name: status["config"][name] for name in LIVE_OPTIONS})
        return status

    async def freshen(self) -> None:
        """Have a status that is at most a second old published, if the engine answers in time."""
        try:
            status = await asyncio.wait_for(self.status(max_age_s=metrics.POLL_INTERVAL_S), metrics.PAGE_WAIT_S)
            self.collector.publish(status)
        except Exception as error:
            self.collector.fail(error)

    def run(self, state: State) -> None:
        """Begin what goes on beside the requests. state: the application's."""
        work = [poll(self.collector, self.engine, self.polled_status), self.end_with(state)]
        if self.neighbours.exist:
            work.append(follow(self.neighbours, self.collector.work, self.take_up))
        self.tasks = [asyncio.create_task(one) for one in work]

    async def take_up(self) -> None:
        """The options in force, whoever has changed them."""
        self.collector.publish(await self.changed_status())

    async def end_with(self, state: State) -> None:
        """Let go of all who wait, when the server stops or its engine is gone."""
        await wait_for_end(self.engine, state)
        self.ending.come()
        self.collector.end()
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def config_in_force(self, tenant_name: str | None = None) -> dict[str, object]:
        """tenant_name: the one tenant whose options are wanted."""
        return {"config": config_view(public_config(self.config), tenant_name), "live": LIVE_OPTIONS}
