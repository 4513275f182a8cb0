"""Exit counters on vLLM's /metrics page. They live in the worker; a task asks for them every few seconds."""

import asyncio
from collections.abc import Iterable
from typing import Any

from prometheus_client.core import REGISTRY, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

POLL_INTERVAL_S = 5.0
COUNTERS = {
    "emitted": "Output tokens, exits included",
    "held": "Held exits checked by the full model",
    "accepted": "Held exits that were emitted",
    "accepted_diverged": "Held exits emitted although the full model disagreed",
    "released": "Exits emitted before their remaining layers ran",
    "verified": "Released exits that have their verdict",
    "diverged": "Emitted tokens that differ from their verdict",
    "regret_nats": "Over all divergences, how much better the full model's best token was",
    "unverified": "Released exits whose request ended before their verdict",
    "targets_met": "Requests that ended within their time per output token",
    "targets_missed": "Requests that were slower than their target",
    "fallbacks": "Times early exits failed and serving went on without them",
}


class ExitCollector(Collector):
    def __init__(self) -> None:
        self.status: dict[str, Any] | None = None  # written by `poll`, None before the first answer

    def collect(self) -> Iterable[Metric]:
        if self.status is None:
            return
        for name, help_text in COUNTERS.items():
            yield CounterMetricFamily(f"apparate:{name}", help_text, value=self.status["counts"][name])
        active = float(self.status["active"])
        yield GaugeMetricFamily("apparate:active", "1 while exits are made, 0 after a failure", value=active)


async def poll(collector: ExitCollector, engine: Any) -> None:
    """Runs as long as the engine answers."""
    while not engine.errored:
        collector.status = (await engine.collective_rpc("early_exit_status"))[0]
        await asyncio.sleep(POLL_INTERVAL_S)


def start_polling(engine: Any) -> asyncio.Task[None]:
    collector = ExitCollector()
    REGISTRY.register(collector)
    return asyncio.create_task(poll(collector, engine))
