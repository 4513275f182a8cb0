"""Confidence -> probability of agreement, learned from verdicts and forgetting old ones."""

import math
from dataclasses import dataclass

MAX_LOGIT = 6.0
MOST_SURE = 1.0 / (1.0 + math.exp(-MAX_LOGIT))
MIN_SCALE, MAX_SCALE, MAX_OFFSET = 0.2, 3.0, 8.0
MEMORY_VERDICTS = 100.0  # where chances are four to one
PRIOR_VERDICTS = 20.0  # that a calibration counts for which was made with another model
STEPS = (5.0, 0.4)  # of offset and scale, over the memory


def logit(p: float) -> float:
    """In [-MAX_LOGIT, MAX_LOGIT]; what is no number is not sure at all. This and what follows run for every exit of a
    step: comparisons, no calls."""
    if p >= MOST_SURE:
        return MAX_LOGIT
    if not p > 1.0 - MOST_SURE:
        return -MAX_LOGIT
    return math.log(p / (1.0 - p))


def clamped(value: float, least: float, most: float) -> float:
    return least if value < least else most if value > most else value


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else 1.0 - 1.0 / (1.0 + math.exp(x))


@dataclass(slots=True)
class OnlineCalibration:
    """P(agree) = sigmoid(scale x logit(confidence) + offset): logistic regression by gradient steps of constant size.

    It starts as the calibration made when the ramps were prepared. As the steps do not shrink, old verdicts fade; as a
    step is the surprise, a ramp that is wrong while sure moves it most. What it starts as counts for `prior_verdicts`:
    with fewer than the memory the first steps are larger.
    """

    scale: float = 1.0
    offset: float = 0.0
    num_verdicts: int = 0
    memory_verdicts: float = MEMORY_VERDICTS
    prior_verdicts: float = MEMORY_VERDICTS

    def __post_init__(self) -> None:
        """Raises ValueError for what observing cannot have led to, as a state file may hold it."""
        for name, least, most in (
            ("scale", MIN_SCALE, MAX_SCALE),
            ("offset", -MAX_OFFSET, MAX_OFFSET),
            ("num_verdicts", 0, math.inf),
            ("memory_verdicts", 1.0, math.inf),
            ("prior_verdicts", 1.0, math.inf),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"calibration: {name} must be in [{least}, {most}], got {getattr(self, name)}")

    def probability(self, confidence: float) -> float:
        return sigmoid(self.scale * logit(confidence) + self.offset)

    def observe(self, confidence: float, agrees: bool) -> None:
        if confidence != confidence:  # NaN teaches nothing
            return
        x = logit(confidence)
        surprise = agrees - sigmoid(self.scale * x + self.offset)
        step = surprise / min(self.memory_verdicts, self.prior_verdicts + self.num_verdicts)
        self.scale = clamped(self.scale + STEPS[1] * step * x, MIN_SCALE, MAX_SCALE)
        self.offset = clamped(self.offset + STEPS[0] * step, -MAX_OFFSET, MAX_OFFSET)
        self.num_verdicts += 1
