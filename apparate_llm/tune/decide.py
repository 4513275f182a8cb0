"""Which candidate is kept, out of what was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from apparate_llm.eval.closed_loop import ratio_of
from apparate_llm.eval.intervals import Interval
from apparate_llm.host.choice import Choice

BETTER = 0.98  # of the old choice's time per token: what the whole interval must lie below
WORSE = 1 / BETTER  # with one number of clients: where the whole interval lies above, the others do not count
TOO_FEW = "too few turns to be certain"
GAP = 1.25  # of the old choice's 99th percentile of gaps between tokens: above it means do not count


@dataclass(frozen=True, slots=True)
class Times:
    """Of one server with one number of clients. None: not known."""

    tpt_by_turn_ms: list[float | None]
    tpt_ms: float | None  # mean over answers
    gap_p99_ms: float | None


@dataclass(slots=True)
class Trial:
    """A candidate, beside the old choice in the same turns."""

    choice: Choice
    times: dict[int, tuple[Times, Times]] = field(default_factory=dict)  # by clients: (its own, the old choice's)
    problem: str | None = None  # why it is not chosen by itself

    def ratio(self, clients: Sequence[int] = ()) -> tuple[float, Interval | None]:
        """Of times per token, its own / the old choice's, geometric mean over pairs of turns, with its 95 % interval,
        None of too few; by itself over all numbers of clients. Raises ValueError where no pair is left."""
        pairs: list[tuple[float, float]] = []
        for number in clients or self.times:
            ours, theirs = self.times[number]
            pairs += zip(_known(ours.tpt_by_turn_ms), _known(theirs.tpt_by_turn_ms), strict=True)
        estimate = ratio_of([one for one, _ in pairs], [other for _, other in pairs])
        return float(estimate["ratio"]), estimate["ci95"]

    def verdict(self) -> str | None:
        """Why it does not take the old choice's place; None: it may."""
        if self.problem is not None:
            return self.problem
        for number, (ours, theirs) in self.times.items():
            _, edges = self.ratio([number])
            if edges is None:
                return TOO_FEW
            if edges[0] > WORSE:
                return f"slower with {number} client{'s' * (number != 1)}"
            if ours.gap_p99_ms and theirs.gap_p99_ms and ours.gap_p99_ms > GAP * theirs.gap_p99_ms:
                return f"longer gaps with {number} client{'s' * (number != 1)}"
        _, edges = self.ratio()
        if edges is None:
            return TOO_FEW
        return None if edges[1] < BETTER else "not faster by more than noise"

    def as_dict(self) -> dict[str, object]:
        """For a file."""
        ratio, ci95 = self.ratio() if self.times else (None, None)
        levels = [
            {
                "clients": number,
                "tpt_ms": ours.tpt_ms,
                "gap_p99_ms": ours.gap_p99_ms,
                "old_tpt_ms": theirs.tpt_ms,
                "old_gap_p99_ms": theirs.gap_p99_ms,
            }
            for number, (ours, theirs) in self.times.items()
        ]
        verdict = self.verdict() if self.times else self.problem
        return {
            "choice": self.choice.model_dump(),
            "ratio": ratio,
            "ci95": ci95,
            "levels": levels,
            "not_kept": verdict,
        }


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The fastest that may take the old choice's place; None: the old one stays."""
    allowed = [trial for trial in trials if trial.times and trial.verdict() is None]
    return min(allowed, key=lambda trial: trial.ratio()[0], default=None)


def _known(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
