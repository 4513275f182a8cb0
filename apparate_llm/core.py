"""Shared nouns. Imports nothing of ours and nothing heavy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, StrEnum


class Decision(Enum):
    """What a policy says of one exit."""

    RELEASE = "release"  # emit now, never recall
    HOLD = "hold"  # keep back until the full model has checked it
    STOP = "stop"  # take no exit; ends this request's draft steps


@dataclass(slots=True)
class Exit:
    """A token that a ramp or prompt lookup proposed, from its draft step to its verdict."""

    position: int  # index in the request's prompt + output tokens
    token_id: int
    depth: int  # blocks run for it
    draft_step: int  # of its engine step, counts from 0
    confidence: float  # the ramp's own, as calibrated when it was prepared
    greedy: bool = True  # its verdict is the full model's best token; else whether vLLM's sampler keeps it
    probability: float = 0.0  # of agreeing with its verdict; written by the policy
    decision: Decision = Decision.STOP  # what became of it; written by the drafter
    is_divergence: bool = False  # held, and let through although its verdict differs
    lookup_length: int = 0  # tokens before it that occurred before, where prompt lookup took it from; 0: a ramp's


class Outcome(StrEnum):
    """What became of an exit in the end."""

    HELD_ACCEPTED = "held_accepted"
    HELD_ACCEPTED_DIVERGENCE = "held_accepted_divergence"  # emitted although the full model disagreed
    HELD_REJECTED = "held_rejected"
    RELEASED_RIGHT = "released_right"
    RELEASED_DIVERGENCE = "released_divergence"
    RELEASED_UNVERIFIED = "released_unverified"  # its request ended first


@dataclass(slots=True)
class ExitCounts:
    """Running totals of one server. `held` exits are counted when the full model checks them."""

    emitted: int = 0  # output tokens, exits included
    decode_tokens: int = 0  # of them, all but each answer's first
    decode_s: float = 0.0  # over all requests, from the first token to the last
    held: int = 0
    accepted: int = 0  # held exits that were emitted
    accepted_divergences: int = 0  # of these, emitted although the full model disagreed
    released: int = 0
    verified: int = 0  # released exits that have their verdict
    released_divergences: int = 0  # verified exits the full model disagreed with
    unverified: int = 0  # released exits whose request ended before their verdict
    targets_met: int = 0  # requests that ended within their time per output token
    targets_missed: int = 0
    verification_passes: int = 0
    draft_steps: int = 0
    lookup_exits: int = 0  # exits emitted, released or accepted, that came from prompt lookup: no ramp was asked
    shallow_blocks: int = 0  # decoder blocks run in draft steps, over all rows
    exits_by_depth: dict[int, int] = field(default_factory=dict)  # emitted, released or accepted
    outcomes: dict[Outcome, dict[int, int]] = field(default_factory=lambda: {outcome: {} for outcome in Outcome})
    regret_nats: float = (
        0.0  # over all divergences: log-probability of the full model's best token less the emitted one's
    )
    fallbacks: int = 0  # times our layer failed and serving went on without exits
    recoveries: int = 0  # times exits came back after that

    def emit_exit(self, exit_: Exit) -> None:
        self.exits_by_depth[exit_.depth] = self.exits_by_depth.get(exit_.depth, 0) + 1
        self.lookup_exits += exit_.lookup_length > 0

    def settle(self, outcome: Outcome, depth: int, number: int = 1) -> None:
        by_depth = self.outcomes[outcome]
        by_depth[depth] = by_depth.get(depth, 0) + number

    def settled(self, *outcomes: Outcome) -> int:
        return sum(sum(self.outcomes[outcome].values()) for outcome in outcomes)

    @property
    def outstanding(self) -> int:
        return self.released - self.verified - self.unverified

    @property
    def divergences(self) -> int:
        """Divergences: emitted tokens that differ from their verdict."""
        return self.released_divergences + self.accepted_divergences

    @property
    def divergences_at_worst(self) -> int:
        """The number that the bound holds for: each exit that ended without a verdict counts as a divergence. Those
        that still wait for one are not in it, so it never falls."""
        return self.divergences + self.unverified

    def check_integrity(self) -> None:
        """Raise AssertionError unless they add up."""
        assert 0 <= self.accepted <= self.held, f"accepted {self.accepted} of {self.held} held exits"
        assert 0 <= self.accepted_divergences <= self.accepted, f"accepted more divergences than exits: {self}"
        assert 0 <= self.released_divergences <= self.verified, f"more divergences than verdicts: {self}"
        by_depth = sum(self.exits_by_depth.values())
        assert self.released + self.accepted == by_depth, f"{by_depth} exits by depth: {self}"
        assert 0 <= self.lookup_exits <= by_depth, f"{self.lookup_exits} of {by_depth} exits looked up"
        assert self.settled(Outcome.RELEASED_RIGHT, Outcome.RELEASED_DIVERGENCE) == self.verified, f"{self}"
        assert self.settled(Outcome.RELEASED_UNVERIFIED) == self.unverified, f"{self}"
        held = self.settled(Outcome.HELD_ACCEPTED, Outcome.HELD_ACCEPTED_DIVERGENCE, Outcome.HELD_REJECTED)
        assert held == self.held, f"{held} held exits have an outcome: {self}"
        assert self.released + self.accepted <= self.emitted, f"more exits than tokens: {self}"

    def as_dict(self) -> dict[str, object]:
        derived = {name: getattr(self, name) for name in ("outstanding", "divergences", "divergences_at_worst")}
        outcomes = {outcome.value: dict(by_depth) for outcome, by_depth in self.outcomes.items()}
        return {**asdict(self), **derived, **shares_of(derived, self.emitted), "outcomes": outcomes}


def shares_of(counts: Mapping[str, int], emitted: int) -> dict[str, float | None]:
    """Of the emitted tokens: the divergences, and those at worst; None before the first token."""
    return {
        "divergence_frac": counts["divergences"] / emitted if emitted else None,
        "divergences_at_worst_frac": counts["divergences_at_worst"] / emitted if emitted else None,
    }
