"""What a verification pass and a draft step cost on this machine, measured while serving.

Machines get slower and faster by the minute, most of all shared ones. What decides is how costs compare, so every
time is divided by the slowdown of the moment before it is averaged: ms at slowdown 1.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Self

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # where a curve has its points
MEMORY = 32  # observations a point averages over
MAX_SURPRISE = 2.0  # an observation counts as at most so many times what was expected: something disturbed it
SETTLED = 4
GUESS_WEIGHT = 4.0  # observations that what was expected of a new point counts as at first
GUESS_FADES = 0.25  # less for each observation
STALE = 256  # observations elsewhere after which a point's mean counts for little
SLOWDOWN_GAIN = 0.2  # how fast it follows the last passes
NOTICEABLE = 0.01  # change of a mean after which the curve is made anew


@dataclass(slots=True)
class CostCurve:
    """ms over rows: at each point of ROWS a moving average, between them linear; points that were not measured yet
    follow the prior's shape from their measured neighbours. Never falls with more rows."""

    prior: tuple[float, ...]  # ms at each of ROWS; only the shape counts once something was measured
    means: list[float] = field(default_factory=lambda: [0.0] * len(ROWS))
    counts: list[int] = field(default_factory=lambda: [0] * len(ROWS))
    guesses: list[float] = field(default_factory=lambda: [0.0] * len(ROWS))  # what was expected before the first one
    seen: list[int] = field(default_factory=lambda: [0] * len(ROWS))  # number of the last observation at each point
    num_observed: int = 0
    # Made of the above:
    values: list[float] = field(init=False)  # what `__call__` reads
    settled: list[float] = field(init=False)  # the means it was made of
    slopes: list[float] = field(init=False)  # ms per row before each point, of the convex curve below

    def __post_init__(self) -> None:
        """Raises ValueError for lists that do not fit ROWS, as a state file may hold them."""
        self.prior = tuple(self.prior)
        if {len(self.prior), len(self.means), len(self.counts), len(self.guesses), len(self.seen)} != {len(ROWS)}:
            raise ValueError(f"a cost curve has {len(ROWS)} points, got {len(self.means)}")
        if min(self.prior) <= 0.0 or min(*self.means, *self.guesses, *self.counts, *self.seen) < 0:
            raise ValueError("a cost curve has points below zero")
        self._settle()

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Reads what `state` wrote, and leaves what else is in it."""
        return cls(**{item.name: state[item.name] for item in fields(cls) if item.init})

    def state(self) -> dict[str, object]:
        """A copy of what was observed, to be written as JSON."""
        known = asdict(self)
        return {item.name: known[item.name] for item in fields(self) if item.init}

    def __call__(self, rows: float) -> float:
        right = bisect_left(ROWS, rows)
        if right == 0:
            return self.values[0]
        if right == len(ROWS):
            return self.values[-1] * rows / ROWS[-1]
        left = right - 1
        share = (rows - ROWS[left]) / (ROWS[right] - ROWS[left])
        return self.values[left] + share * (self.values[right] - self.values[left])

    def of_another(self, rows: int) -> float:
        """ms that one row more than `rows` costs, as one of several: a step that the curve seems to have is shared by
        the rows behind it. Or a single slow pass over two rows, and no second row is ever tried again."""
        right = bisect_left(ROWS, rows + 1)
        if right == len(ROWS):
            return self.values[-1] / ROWS[-1]
        return self.slopes[right]

    def observe(self, rows: int, ms: float) -> None:
        right = min(bisect_left(ROWS, rows), len(ROWS) - 1)
        left = max(right - 1, 0)
        point = right if ROWS[right] == rows or rows - ROWS[left] > ROWS[right] - rows else left
        if any(self.counts):
            ms = min(ms, MAX_SURPRISE * self(rows))
        if not self.counts[point]:
            self.guesses[point] = self.values[point] if any(self.counts) else ms
        self.num_observed += 1
        if self.num_observed - self.seen[point] > STALE:
            self.counts[point] = min(self.counts[point], SETTLED)  # what it cost long ago says little
            self.guesses[point] = self.values[point]
        self.seen[point] = self.num_observed
        self.counts[point] = min(self.counts[point] + 1, MEMORY)
        self.means[point] += (ms - self.means[point]) / self.counts[point]
        is_new = GUESS_FADES * self.counts[point] <= GUESS_WEIGHT
        if is_new or abs(self.means[point] - self.settled[point]) > NOTICEABLE * self.means[point]:
            self._settle()

    def measured(self) -> dict[int, float]:
        return {rows: mean for rows, mean, count in zip(ROWS, self.means, self.counts, strict=True) if count}

    def _settle(self) -> None:
        known = [i for i, count in enumerate(self.counts) if count]
        raw = list(self.prior)
        for i in range(len(ROWS)):
            if known:
                left = max((j for j in known if j <= i), default=known[0])
                right = min((j for j in known if j >= i), default=known[-1])
                share = (i - left) / (right - left) if right > left else 0.0
                times = [self._believed(j) / self.prior[j] for j in (left, right)]  # of the prior
                raw[i] = self.prior[i] * (times[0] + share * (times[1] - times[0]))
        self.settled = list(self.means)
        self.values = _isotonic(raw, [max(count, 1) for count in self.counts])
        steps = [right - left for left, right in pairwise(ROWS)]
        rises = [(right - left) / step for (left, right), step in zip(pairwise(self.values), steps, strict=True)]
        self.slopes = [0.0, *_isotonic(rises, steps)]

    def _believed(self, point: int) -> float:
        """A single slow pass must not make a new number of rows look expensive: it would not be tried again."""
        weight = max(0.0, GUESS_WEIGHT - GUESS_FADES * self.counts[point])
        return (self.counts[point] * self.means[point] + weight * self.guesses[point]) / (self.counts[point] + weight)


def _isotonic(values: list[float], weights: list[int]) -> list[float]:
    """The rising sequence nearest to `values` (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        block = (value, float(weight), 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, total, length = blocks.pop()
            joined = total + block[1]
            block = ((mean * total + block[0] * block[1]) / joined, joined, length + block[2])
        blocks.append(block)
    return [mean for mean, _, length in blocks for _ in range(length)]


# Before anything is measured: a pass over 8 rows costs a quarter more than one over a single row, over 32 twice as
# much; a draft step at depth 0 costs a twentieth of a pass.
PRIOR_PASS_MS = tuple(30.0 * (1.0 + 0.033 * (rows - 1)) for rows in ROWS)
PRIOR_DRAFT_STEP_SHARE = 0.05


@dataclass(slots=True)
class CostModel:
    """Verification passes by rows; draft steps by depth and rows. All in ms at slowdown 1."""

    num_layers: int
    slowdown: float = 1.0  # how much slower than that the machine is now
    verify_ms: CostCurve = field(default_factory=lambda: CostCurve(PRIOR_PASS_MS))
    draft_steps: dict[int, CostCurve] = field(default_factory=dict)

    def draft_step_ms(self, depth: int, rows: float) -> float:
        curve = self.draft_steps.get(depth)
        if curve is None or not any(curve.counts):
            return (PRIOR_DRAFT_STEP_SHARE + depth / self.num_layers) * self.verify_ms(rows)
        return curve(rows)

    def observe_verification(self, rows: int, ms: float) -> None:
        """A number of rows that is new takes up the difference to what was expected of it, one that is well known
        leaves it to the slowdown."""
        self.verify_ms.observe(rows, ms / self.slowdown)
        slower = ms / self.slowdown / self.verify_ms(rows)
        self.slowdown *= min(max(slower, 1 / MAX_SURPRISE), MAX_SURPRISE) ** SLOWDOWN_GAIN

    def observe_draft_step(self, depth: int, rows: int, ms: float) -> None:
        if depth not in self.draft_steps:
            self.draft_steps[depth] = CostCurve(tuple(1.0 + 0.05 * (point - 1) for point in ROWS))
        self.draft_steps[depth].observe(rows, ms / self.slowdown)
