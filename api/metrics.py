"""What exits do, on vLLM's /metrics page.

The counts live in the worker. A task asks for them every second, but only while there is work: a worker that is asked
spins for a second after its answer. Who reads the page is told nothing older than a second.
"""

import asyncio
import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger

from apparate_llm.api.metric_names import (
    COUNTERS,
    EXITS,
    FIELDS,
    GAUGES,
    HISTOGRAMS,
    PREFIX,
    STATUS_AGE,
    STATUS_ERRORS,
    TENANT_COUNTERS,
)
from apparate_llm.renamed import LABELS as OLD_LABELS
from apparate_llm.renamed import METRICS as OLD_NAMES

logger = init_logger("vllm.apparate")
POLL_INTERVAL_S = 1.0
PAGE_WAIT_S = 1.0  # for an engine that takes longer to answer; then the page has the last status
LISTENERS_AT_ONCE = 20  # that are told of a status
QUIET_POLLS = 3  # without a change and without a request, after which nothing is asked until one comes


class ExitCollector(Collector):
    """The last status of the worker, for the metrics page and for whoever waits for the next one."""

    def __init__(self) -> None:
        self.status: dict[str, Any] | None = None  # None before the first answer
        self.text = ""  # the same as JSON
        self._waiting: deque[asyncio.Future[str | None]] = deque()
        self._has_ended = False
        self._published_s = float("-inf")
        self.work = asyncio.Event()  # set when a request comes
        self.num_errors = 0  # questions for the status that were not answered
        self._is_failing = False

    def publish(self, status: dict[str, Any]) -> None:
        """The same once more is nothing new."""
        self._is_failing = False
        if status is self.status:
            return
        self.status, self.text, self._published_s = status, json.dumps(status), time.monotonic()
        for _ in range(min(len(self._waiting), LISTENERS_AT_ONCE)):
            self._tell(self._waiting.popleft(), self.text)

    def fail(self, error: Exception) -> None:
        """There is no new status; what was published last stays."""
        self.num_errors += 1
        if not self._is_failing:
            logger.warning("No status of early exits: %s", error or type(error).__name__)
        self._is_failing = True

    def end(self) -> None:
        """Nothing is published any more."""
        self._has_ended = True
        while self._waiting:
            self._tell(self._waiting.popleft(), None)

    @staticmethod
    def _tell(listener: asyncio.Future[str | None], text: str | None) -> None:
        if not listener.done():
            listener.set_result(text)

    async def next_text(self) -> str | None:
        """The next status that is published, as JSON; None at the end. Where many wait, those that have waited longest
        get it, and the others a later one: requests are served by the same process."""
        if self._has_ended:
            return None
        listener: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(listener)
        try:
            return await listener
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):
                self._waiting.remove(listener)
            raise

    def collect(self) -> Iterable[Metric]:
        if self.status is not None or self.num_errors:
            yield CounterMetricFamily(PREFIX + STATUS_ERRORS[0], STATUS_ERRORS[1], self.num_errors)
        if self.status is not None:
            age_s = time.monotonic() - self._published_s
            yield GaugeMetricFamily(PREFIX + STATUS_AGE[0], STATUS_AGE[1], age_s)
            yield from metrics_of(self.status)


def metrics_of(status: dict[str, Any]) -> Iterable[Metric]:
    """With the names of version 0.1. status: the worker's `early_exit_status`."""
    for metric in present_metrics(status):
        yield metric
        if old := OLD_NAMES.get(metric.name.removeprefix(PREFIX)):
            yield by_its_old_name(metric, PREFIX + old)


def by_its_old_name(metric: Metric, old: str) -> Metric:
    again = Metric(old, f"Old name of {metric.name}, goes with version 0.3", metric.type)
    for sample in metric.samples:
        labels = {OLD_LABELS.get(label, label): value for label, value in sample.labels.items()}
        again.samples.append(sample._replace(name=old + sample.name.removeprefix(metric.name), labels=labels))
    return again


def present_metrics(status: dict[str, Any]) -> Iterable[Metric]:
    counts = status["counts"]
    for name, help_text in COUNTERS.items():
        yield CounterMetricFamily(PREFIX + name, help_text, value=counts[FIELDS.get(name, name)])
    exits = CounterMetricFamily(PREFIX + EXITS[0], EXITS[1], labels=["depth", "outcome"])
    for outcome, by_depth in counts["outcomes"].items():
        for depth, number in by_depth.items():
            exits.add_metric([str(depth), outcome], number)
    yield exits
    shows_tenants = status["tenants"] and status["config"].get("tenant_metrics", True)
    for name, help_text in TENANT_COUNTERS.items() if shows_tenants else ():
        family = CounterMetricFamily(f"{PREFIX}tenant_{name}", help_text, labels=["tenant"])
        for title, share in status["tenants"].items():
            family.add_metric([title], share[FIELDS.get(name, name)])
        yield family
    for name, value in gauges_of(status).items():
        if value is not None:
            yield GaugeMetricFamily(PREFIX + name, GAUGES[name], value=float(value))
    for field, (name, help_text, unit) in HISTOGRAMS.items():
        histogram = status["distributions"][field]
        bounds = [*(str(bound / unit) for bound in histogram["bounds"]), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram["counts"]), strict=True))
        yield HistogramMetricFamily(PREFIX + name, help_text, buckets=buckets, sum_value=histogram["total"] / unit)


def gauges_of(status: dict[str, Any]) -> dict[str, float | None]:
    """Name -> value; None for what there is not."""
    config, counts = status["config"], status["counts"]
    return {
        "active": status["active"],
        "pause_seconds": (status.get("failure") or {}).get("returns_in_s"),
        "divergence_ratio": counts["divergence_frac"],
        "divergences_at_worst_ratio": counts["divergences_at_worst_frac"],
        "outstanding": counts["outstanding"],
        "accuracy_bound": config["accuracy_bound"],
        "budget_left": status["budget_left"],
        "budget_fill_ratio": status["budget_fill_frac"],
        "tpt_target_seconds": config["tpt_target_ms"] and config["tpt_target_ms"] / 1e3,
        "depth": status["depth"],
        "max_exits": config["max_exits"],
        "threshold": config["threshold"] if config["policy"] == "static" else None,
    }


async def poll(collector: ExitCollector, engine: EngineClient, ask: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """Runs as long as there is an engine. A question that fails is put again."""
    quiet, last = 0, None
    while not engine.errored:
        collector.work.clear()  # before asking: what comes from now on is not in the answer
        try:
            status = await ask()
        except Exception as error:
            collector.fail(error)
            quiet = 0
        else:
            collector.publish(status)
            has_work = status["running"] or collector.work.is_set() or is_waited_for(engine)
            is_quiet = not has_work and last is not None and last["counts"] == status["counts"]
            quiet, last = quiet + 1 if is_quiet else 0, status
        if quiet >= QUIET_POLLS:
            await collector.work.wait()
            quiet = 0
        else:
            await asyncio.sleep(POLL_INTERVAL_S)


def is_waited_for(engine: EngineClient) -> bool:
    """Whether a request of this process waits for tokens, also one that no worker knows of yet."""
    processor = getattr(engine, "output_processor", None)
    return processor is not None and bool(processor.has_unfinished_requests())


class MetricsMiddleware:
    """Before vLLM's /metrics: the figures are made new. With several API server processes that page gathers from files
    what each of them wrote, and asks no collector: ours is added. Every process knows all engines."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        server = getattr(scope["app"].state, "early_exit", None) if path.rstrip("/") == "/metrics" else None
        if server is not None:
            await server.freshen()
        if server is None or "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            await self.app(scope, receive, send)
            return
        start: Message = {}

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
                start.update(message, headers=kept)
                return
            if start:
                await send(dict(start))
                start.clear()
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                registry = CollectorRegistry()
                registry.register(server.collector)
                message = {**message, "body": message.get("body", b"") + generate_latest(registry)}
            await send(message)

        await self.app(scope, receive, add)
