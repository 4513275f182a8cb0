"""Histograms of what an engine does: counts of values between bounds, as Prometheus histograms are."""

import math
from bisect import bisect_left
from dataclasses import dataclass, field, fields

MS = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1000.0)
SHORT_MS = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
TOKENS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 12.0, 17.0)
NATS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(slots=True)
class Histogram:
    bounds: tuple[float, ...]  # upper ones, themselves inside
    counts: list[int] = field(default_factory=list)  # one more than bounds: what is above the last
    total: float = 0.0  # of the values

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        if not math.isfinite(value):  # would be all that the total says from then on
            return
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class Distributions:
    tpt_ms: Histogram = field(default_factory=lambda: Histogram(MS))  # time per output token of requests that ended
    tokens_per_pass: Histogram = field(default_factory=lambda: Histogram(TOKENS))  # of one request, released included
    verify_ms: Histogram = field(default_factory=lambda: Histogram(MS))  # an engine step without drafting
    draft_step_ms: Histogram = field(default_factory=lambda: Histogram(SHORT_MS))
    controller_ms: Histogram = field(default_factory=lambda: Histogram(SHORT_MS))  # its decisions, per engine step
    regret_nats: Histogram = field(default_factory=lambda: Histogram(NATS))  # of divergences

    def as_dict(self) -> dict[str, object]:
        histograms = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: {"bounds": h.bounds, "counts": h.counts, "total": h.total} for name, h in histograms.items()}
