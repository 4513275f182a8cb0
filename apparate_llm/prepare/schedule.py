"""How a preparation's time is spent: costs, laps of synthesis and training, the other depths, what they bring.

Each lap doubles what there is, and its score is a point of the learning curve: what another doubling would bring, and
whether tokens or training are short. What takes as long as it takes comes first, so that the rest can be planned.
"""

import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Self

from apparate_llm.prepare.records import HeadRecord
from apparate_llm.prepare.workspace import Workspace

PROFILE_SHARE, MOST_PROFILE_S = 0.05, 300.0  # of the budget, for the costs
PROFILE_S = 90.0  # without a budget
RESERVE_SHARE, LEAST_RESERVE_S, MOST_RESERVE_SHARE = 0.02, 40.0, 0.3  # of the budget, for test rows and the report
MEASURE_SHARE, LEAST_MEASURE_S = 0.003, 4.0  # of the budget, for each depth's rows of a split
ENOUGH_S, ENOUGH_TOKENS = 900.0, 200_000  # for more than one lap
MOST_STARTS_SHARE = 0.15  # of the time to write, for starts of the model: one in each lap
MOST_EPOCHS, FEWEST_EPOCHS = 3.0, 1.5  # of the first depth; the others start from it and take half as many
ENOUGH_ROWS = 1_280_000  # seen by then, more epochs overfit few rows and only cost time with many
TRAINING_MARGIN = 1.15  # of the time that trainings should take: evaluations, saves
SHIFT = 0.12  # of the time left, to what is short
OVERFITTED, UNDERFITTED = 0.05, 0.02  # TPT on training rows lower by that than on others
KEEP_CLOCK_EVERY_S = 15.0
STOP_BELOW = 0.005  # of TPT: what the next doubling must bring
# Gain of a doubling over that of the one before: assumed after two laps, and at most. Qwen2.5-Coder-0.5B gained 0.22
# accepted tokens per step in the doubling after 386,000 tokens and 0.14 in the next one.
FIRST_FADING, MOST_FADING = 0.5, 0.6


@dataclass(frozen=True, slots=True)
class Course:
    """How time is shared."""

    laps: tuple[float, ...]  # of the tokens, after each
    training: tuple[float, ...]  # of the first depth's training, in each
    synthesis_frac: float  # of the time; training of all depths has the rest


ONE_LAP = Course((1.0,), (1.0,), 0.6)
THREE_LAPS = Course((0.25, 0.5, 1.0), (0.2, 0.3, 0.5), 0.6)


class WorkClock:
    """Seconds of work, those of earlier starts included. While it is entered they are kept, whatever goes on; from
    then on they count, until the end or `stop`."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.before_s = float((workspace.read("clock", {}) or {"seconds": 0.0})["seconds"])
        self.began_s = time.monotonic()
        self._stopped_s: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_on, name="work-clock", daemon=True)

    def __enter__(self) -> Self:
        self.began_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # of a full disk the work itself tells
            self.stop()

    def stop(self) -> None:
        """What follows is no work of this clock's budget."""
        self._ended.set()
        self._thread.join()
        if self._stopped_s is None:
            self._stopped_s = time.monotonic()
            self.keep()

    @property
    def is_stopped(self) -> bool:
        return self._stopped_s is not None

    @property
    def spent_s(self) -> float:
        now_s = time.monotonic() if self._stopped_s is None else self._stopped_s
        return self.before_s + now_s - self.began_s

    def keep(self) -> None:
        self.workspace.write("clock", {}, {"seconds": self.spent_s})

    def _keep_on(self) -> None:
        while not self._ended.wait(KEEP_CLOCK_EVERY_S):
            with suppress(OSError):
                self.keep()


@dataclass(frozen=True, slots=True)
class Lap:
    number: int
    last: bool
    fraction: float  # of all tokens, in the end
    tokens: float  # answer tokens that there are to be
    synthesise_until_s: float  # of the work clock
    train_until_s: float
    training_share: float  # of the first depth's training


@dataclass(frozen=True, slots=True)
class Schedule:
    """Of a preparation with a number of tokens, or with a time budget; the other one is None."""

    tokens: int | None
    time_budget_s: float | None
    num_depths: int
    begins_s: float = 0.0  # of the work clock: when costs were known and laps began
    start_s: float = 0.0  # of the model, as far as that is known

    @property
    def course(self) -> Course:
        if self.tokens is not None:
            return THREE_LAPS if self.tokens >= ENOUGH_TOKENS else ONE_LAP
        synthesis_s = THREE_LAPS.synthesis_frac * self.whole_s
        are_cheap = len(THREE_LAPS.laps) * self.start_s <= MOST_STARTS_SHARE * synthesis_s
        return THREE_LAPS if (self.time_budget_s or 0.0) >= ENOUGH_S and are_cheap else ONE_LAP

    @property
    def profile_s(self) -> float:
        """For measuring costs, beside what a model takes to start."""
        return PROFILE_S if self.time_budget_s is None else min(MOST_PROFILE_S, PROFILE_SHARE * self.time_budget_s)

    @property
    def measure_s(self) -> float:
        """For what one depth says in the rows of one split."""
        return math.inf if self.time_budget_s is None else max(LEAST_MEASURE_S, MEASURE_SHARE * self.time_budget_s)

    @property
    def work_s(self) -> float:
        """When synthesis and training of all depths are to end."""
        if self.time_budget_s is None:
            return math.inf
        reserve_s = max(LEAST_RESERVE_S, RESERVE_SHARE * self.time_budget_s)
        return self.time_budget_s - min(reserve_s, MOST_RESERVE_SHARE * self.time_budget_s)

    @property
    def whole_s(self) -> float:
        """For synthesis and training."""
        return max(0.0, self.work_s - self.begins_s)

    @property
    def first_depth_frac(self) -> float:
        """Of the time of all trainings: each of the others takes half as long."""
        return 1 / (0.5 + 0.5 * self.num_depths)

    def laps(self) -> list[Lap]:
        """As planned at the beginning."""
        course, whole_s = self.course, self.whole_s
        first_depth_s = whole_s * (1 - course.synthesis_frac) * self.first_depth_frac
        laps, until_s, before = [], self.begins_s, 0.0
        for number, (fraction, share) in enumerate(zip(course.laps, course.training, strict=True)):
            synthesise_until_s = until_s + whole_s * course.synthesis_frac * (fraction - before)
            until_s, before = synthesise_until_s + first_depth_s * share, fraction
            tokens = math.inf if self.tokens is None else math.ceil(self.tokens * fraction)
            last = number == len(course.laps) - 1
            laps.append(Lap(number, last, fraction, tokens, synthesise_until_s, until_s, share))
        return laps


def without_more_rows(lap: Lap, schedule: Schedule) -> Lap:
    """The lap as the last one: the first depth trains on its rows for all that is left of its training."""
    later = schedule.laps()[lap.number :]
    made = replace(lap, last=True, fraction=1.0, training_share=sum(one.training_share for one in later))
    if math.isinf(schedule.work_s):
        return made
    train_s = schedule.first_depth_frac * max(0.0, schedule.work_s - lap.synthesise_until_s)
    return replace(made, train_until_s=lap.synthesise_until_s + train_s)


def shifted(lap: Lap, spent_s: float, work_s: float, short: str) -> Lap:
    """The lap with more of the time that is left for what is `short`: tokens, training, or neither."""
    if math.isinf(work_s) or short == "neither":
        return lap
    change_s = (SHIFT if short == "tokens" else -SHIFT) * max(0.0, work_s - spent_s)
    until_s = min(max(lap.synthesise_until_s + change_s, spent_s), work_s)
    # Training of the first depth and of the others gives, or gets, in proportion.
    factor = (work_s - until_s) / max(1e-9, work_s - lap.synthesise_until_s)
    train_s = (lap.train_until_s - lap.synthesise_until_s) * factor
    return replace(lap, synthesise_until_s=until_s, train_until_s=until_s + train_s)


def write_until_s(
    lap: Lap, schedule: Schedule, *, spent_s: float, tokens: int, tokens_per_s: float, row_s: float
) -> float:
    """When a lap's synthesis is to end; that of the last one goes on for as long as trainings have too few rows to
    fill the time that is left.

    tokens: answer tokens at `spent_s` of the work clock; tokens_per_s: how many are added; row_s: what a training
    takes for a row and epoch. 0.0: not known.
    """
    if not lap.last or schedule.time_budget_s is None or min(tokens_per_s, row_s) <= 0:
        return lap.synthesise_until_s
    epochs = epochs_of_lap(lap, tokens) + (schedule.num_depths - 1) * epochs_of_other_depth(tokens)
    token_s = TRAINING_MARGIN * epochs * row_s
    spare_s = schedule.work_s - spent_s - token_s * tokens
    return max(lap.synthesise_until_s, spent_s + spare_s / (1 + token_s * tokens_per_s))


def train_until_s(lap: Lap, spent_s: float, work_s: float) -> float:
    """When the training of a lap whose synthesis has just ended is to end: it gets its part of the time that is left,
    whenever the synthesis was to end."""
    if math.isinf(work_s):
        return math.inf
    frac = (lap.train_until_s - lap.synthesise_until_s) / max(1e-9, work_s - lap.synthesise_until_s)
    return spent_s + min(1.0, frac) * max(0.0, work_s - spent_s)


def what_is_short(train_score: float, validation_score: float) -> str:
    """From accepted tokens per step on rows trained on and on others: far apart, more rows would help."""
    gap = 1 - (1 + validation_score) / (1 + train_score)
    return "tokens" if gap > OVERFITTED else "training" if gap < UNDERFITTED else "neither"


def after_doublings(scores: list[float], number: float) -> float | None:
    """Accepted tokens per step that `number` more doublings of tokens and training would add, by what the last ones
    did; None where one lap tells nothing."""
    gains = [after - before for before, after in pairwise(scores)]
    if not gains:
        return None
    last = max(0.0, gains[-1])
    fading = FIRST_FADING if len(gains) < 2 or gains[-2] <= 0 else min(MOST_FADING, last / gains[-2])
    return last * fading * (1 - math.pow(fading, number)) / (1 - fading)


def tpt_saved(score: float, added: float) -> float:
    """Share of TPT that `added` accepted tokens per step save, costs of a step as they are."""
    return 1 - (1 + score) / (1 + score + added)


def another_hour(scores: list[float], spent_s: float) -> float | None:
    """Share of TPT that an hour more would save."""
    if spent_s <= 0:
        return None
    added = after_doublings(scores, math.log2((spent_s + 3600.0) / spent_s))
    return None if added is None else tpt_saved(scores[-1], added)


def epochs_of_lap(lap: Lap, tokens: float) -> float:
    """Of the first depth's training, over the lap's `tokens`."""
    return round(_epochs_for(tokens / lap.fraction) * lap.training_share / lap.fraction, 2)


def epochs_of_other_depth(tokens: float) -> float:
    return round(_epochs_for(tokens) * 0.5, 2)


def _epochs_for(tokens: float) -> float:
    return round(min(MOST_EPOCHS, max(FEWEST_EPOCHS, ENOUGH_ROWS / max(1.0, tokens))), 2)


def outlook(scores: list[float], spent_s: float, short: str) -> str:
    """The learning curve in one sentence."""
    saved = another_hour(scores, spent_s)
    if saved is None:
        return "Too short a preparation to tell what more time would bring; a longer one can tell."
    if saved < STOP_BELOW:
        return "Another hour would bring next to nothing."
    more = {"tokens": "; tokens are short", "training": "; training is short"}.get(short, "")
    return f"Another hour would bring about {100 * saved:.0f} % TPT{more}.".replace("about 0 %", "less than 1 %")


def point(record: HeadRecord) -> float:
    """Score of a lap's training record."""
    return record["validation_accepted_per_step"]
