"""Policy `apparate`: the paper's two-level adaptation (Dai et al., SOSP 2024, sections 3.2 and 3.3), for generation.

Exits are only released, never held. A ramp's threshold is the largest error score, 1 - confidence, at which it still
lets a token exit. Every `window` verdicts the thresholds are searched anew on that window; every `adjust_every`
verdicts the set of active ramps is adjusted by their utilities. A single ramp is active at a time here (the ramp
budget is one), as a draft step runs to one depth only.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from apparate_llm.controller.policy import ExitKind, Policy, draft_steps_within, kind_of
from apparate_llm.core import Decision, Exit

FIRST_STEP, LEAST_STEP = 0.01, 0.001


class Seen(NamedTuple):
    """One ramp's prediction for one token: error score and whether the full model agreed."""

    error: float
    agrees: bool


Record = Sequence[Seen | None]  # one token at every ramp, shallowest first; None where it was not evaluated


def replay_window(
    records: Sequence[Record], thresholds: Sequence[float], savings: Sequence[float]
) -> tuple[float, float]:
    """(share of tokens that come out right, latency saved per token) had these thresholds been in force."""
    right, saved = 0, 0.0
    for record in records:
        for seen, threshold, saving in zip(record, thresholds, savings, strict=True):
            if seen is not None and seen.error < threshold:
                right += seen.agrees
                saved += saving
                break
        else:
            right += 1
    return right / len(records), saved / len(records)


def tune_thresholds(records: Sequence[Record], savings: Sequence[float], accuracy_bound: float) -> list[float]:
    """Greedy search from zero: raise the threshold that saves most latency per accuracy lost while the accuracy stays
    within the bound; a threshold that moved doubles its step, and when none can move all steps halve."""
    thresholds = [0.0] * len(savings)
    steps = [FIRST_STEP] * len(savings)
    if not records:
        return thresholds
    accuracy, saved = replay_window(records, thresholds, savings)
    while max(steps) >= LEAST_STEP:
        best: tuple[float, int, float, float] | None = None  # gain, ramp, accuracy, saved
        for ramp in range(len(savings)):
            tried = [*thresholds]
            tried[ramp] = min(1.0, tried[ramp] + steps[ramp])
            if tried[ramp] == thresholds[ramp]:
                continue
            new_accuracy, new_saved = replay_window(records, tried, savings)
            if new_accuracy < 1.0 - accuracy_bound - 1e-9:
                continue
            lost = max(accuracy - new_accuracy, 1e-6)
            gain = (new_saved - saved) / lost
            if best is None or gain > best[0]:
                best = (gain, ramp, new_accuracy, new_saved)
        if best is None:
            steps = [step / 2 for step in steps]
            continue
        _, ramp, accuracy, saved = best
        thresholds[ramp] = min(1.0, thresholds[ramp] + steps[ramp])
        steps[ramp] *= 2
    return thresholds


def utilities(exit_fracs: Sequence[float], latencies: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Per active ramp, shallowest first: latency its exits save minus what it costs the tokens that do not exit there.

    latencies: one more than there are ramps, of running up to each ramp and of the whole model.
    """
    return [
        frac * (latencies[i + 1] - latencies[i]) - (1.0 - sum(exit_fracs[: i + 1])) * costs[i]
        for i, frac in enumerate(exit_fracs)
    ]


def adjust_ramps(active: int, utility: float, depths: Sequence[int]) -> int:
    """The next active ramp: a deeper one if this one costs more than it saves, else a shallower one is tried."""
    index = depths.index(active)
    return depths[min(index + 1, len(depths) - 1)] if utility < 0 else depths[max(index - 1, 0)]


@dataclass(slots=True, kw_only=True)
class ApparatePolicy(Policy):
    depth: int
    depths: tuple[int, ...]
    accuracy_bound: float
    max_exits: int
    max_batch_tokens: int
    window: int = 16
    adjust_every: int = 128
    sibling: bool = False
    _verdicts: Counter[ExitKind] = field(default_factory=Counter)
    _threshold: float = field(init=False, default=0.0)
    _records: deque[Record] = field(init=False)
    _to_search: tuple[Record, ...] = ()  # the window of a search that is due
    _num_verdicts: int = 0
    _num_proposed: int = 0
    _num_exits: int = 0
    _draft_step_ms: float = 0.0
    _pass_ms: float = 0.0

    def __post_init__(self) -> None:
        self._records = deque(maxlen=self.window)

    @property
    def threshold(self) -> float:
        """Searched when it is first read: of the windows that fill up within a step only the last one decides."""
        if self._to_search:
            (self._threshold,) = tune_thresholds(self._to_search, [self._pass_ms or 1.0], self.accuracy_bound)
            self._to_search = ()
        return self._threshold

    def start(self, num_requests: int) -> int:
        return draft_steps_within(self.max_batch_tokens, self.max_exits, num_requests)

    def decide(self, exit_: Exit, *, joint_acceptance: float, may_release: bool, num_tokens: int) -> Decision:
        exit_.probability = exit_.confidence
        self._num_proposed += 1
        if may_release and 1.0 - exit_.confidence < self.threshold:
            self._num_exits += 1
            return Decision.RELEASE
        return Decision.STOP

    def on_verdict(self, exit_: Exit, agrees: bool) -> None:
        self._verdicts[kind_of(exit_)] += 1
        self._records.append((Seen(1.0 - exit_.confidence, agrees),))
        self._num_verdicts += 1
        if self._num_verdicts % self.window == 0:
            self._to_search = tuple(self._records)
        # A second period that ends within one step has proposed nothing since the first.
        if self._num_verdicts % self.adjust_every == 0 and self._num_proposed:
            exit_frac = self._num_exits / self._num_proposed
            (utility,) = utilities([exit_frac], [0.0, self._pass_ms], [self._draft_step_ms])
            self.depth = adjust_ramps(self.depth, utility, self.depths)
            self._num_proposed = self._num_exits = 0

    def num_verdicts(self, exit_: Exit) -> int:
        return self._verdicts[kind_of(exit_)]

    def on_draft_step(self, depth: int, num_tokens: int, ms: float) -> None:
        self._draft_step_ms += 0.1 * (ms - self._draft_step_ms)

    def on_decode_step(self, num_requests: int, num_tokens: int, ms: float) -> None:
        self._pass_ms += 0.1 * (ms - self._pass_ms)
