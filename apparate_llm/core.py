"""Shared nouns. Imports nothing of ours and nothing heavy."""

from dataclasses import asdict, dataclass, field
from enum import Enum


class Verb(Enum):
    """What a policy says of one exit."""

    RELEASE = "release"  # emit now, never recall
    HOLD = "hold"  # keep back until the full model has checked it
    STOP = "stop"  # take no exit; ends this request's rounds


@dataclass(slots=True)
class Outstanding:
    """A released exit whose remaining layers have not run yet."""

    position: int  # index in the request's prompt + output tokens
    token_id: int
    depth: int


@dataclass(slots=True)
class ExitCounts:
    """Running totals of one server. `held` exits are counted when the full model checks them."""

    emitted: int = 0  # output tokens, exits included
    held: int = 0
    accepted: int = 0  # held exits the full model agreed with
    released: int = 0
    verified: int = 0  # released exits that have their verdict
    diverged: int = 0  # verified exits the full model disagreed with
    unverified: int = 0  # released exits whose request ended before their verdict
    completion_passes: int = 0
    rounds: int = 0
    fallbacks: int = 0  # times our layer failed and serving went on without exits

    @property
    def outstanding(self) -> int:
        return self.released - self.verified - self.unverified

    @property
    def divergence_frac(self) -> float | None:
        """Share of emitted tokens known to differ from their verdict; None before the first token."""
        return self.diverged / self.emitted if self.emitted else None

    def as_dict(self) -> dict[str, int | float | None]:
        return {**asdict(self), "outstanding": self.outstanding, "divergence_frac": self.divergence_frac}


@dataclass(slots=True)
class RequestExits:
    """What the engine remembers of one live request."""

    releasable: bool  # False where the request's contract needs the full model's scores
    outstanding: list[Outstanding] = field(default_factory=list)
