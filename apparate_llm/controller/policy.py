"""What every policy is asked and told. A policy knows nothing of vLLM: the replay asks and tells the same."""

# ruff: noqa: B027 - what a policy need not hear goes to an empty method

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from apparate_llm.core import Decision, Exit

CALIBRATED_DRAFT_STEPS = 4  # draft steps that are told apart; later ones are like the last of them
LOOKED_UP = -1  # stands for the depth of exits without a ramp
# On exits like it, before one may diverge on a model that the ramps were not made for: a share of 2 % is known to
# within 1 % then.
LEAST_VERDICTS = 200


class ExitKind(NamedTuple):
    """Exits that are right equally often for the same confidence."""

    depth: int
    draft_step: int
    greedy: bool


def kind_of(exit_: Exit) -> ExitKind:
    if exit_.lookup_length:
        return ExitKind(LOOKED_UP, 0, exit_.greedy)
    return ExitKind(exit_.depth, shared_draft_step(exit_.draft_step), exit_.greedy)


def shared_draft_step(number: int) -> int:
    """The draft step whose calibration and statistics a draft step uses."""
    return number if number < CALIBRATED_DRAFT_STEPS else CALIBRATED_DRAFT_STEPS - 1


class Policy(ABC):
    """Base of the policies; deterministic given the same questions and feedback.

    One engine step: `start`, then for each draft step `decide` once per request that takes part and
    `wants_another_step`; later, when the verification pass has run, `verify_divergence` for held exits that their
    verdict differs from, `on_verdict` for each exit that got one and `on_decode_step` with what it cost.
    """

    depth: int  # of the ramp it wants; read before each step's drafting
    depths: tuple[int, ...]  # ramps there are; a single one where the depth is fixed
    looks_up: bool = False  # whether prompt lookup, without a ramp, may propose exits in the step that `start` began
    sibling: bool = False  # whether the ramps were made, and calibrated, for another model than the one that is served

    @abstractmethod
    def start(self, num_requests: int) -> int:
        """Most draft steps this step may run with so many requests generating; 0: none."""

    def on_request(self) -> None:
        """A request came: the next step reads its prompt, or the first part of it."""

    def wants_lookup(self, length: int, greedy: bool) -> bool:
        """Whether to take what followed before where a request's text repeats its last `length` tokens."""
        return False

    def wants_another_step(self, number: int, joint_acceptances: Sequence[float], num_tokens: int) -> bool:
        """Whether draft step `number` (from 1; the first always runs) is worth it. joint_acceptances: for each request
        still taking part, the probability that all its held exits agree; num_tokens: of the next verification pass, as
        of now."""
        return True

    @abstractmethod
    def decide(self, exit_: Exit, *, joint_acceptance: float, may_release: bool, num_tokens: int) -> Decision:
        """What becomes of an exit; sets its `probability`."""

    def may_diverge(self, exit_: Exit) -> bool:
        """Whether it has heard enough of exits like this one to let one differ. It has from the beginning where the
        ramps were calibrated on this very model."""
        return not self.sibling or self.num_verdicts(exit_) >= LEAST_VERDICTS

    def num_verdicts(self, exit_: Exit) -> int:
        """Heard so far on exits like this one."""
        return 0

    def verify_divergence(self, regret_nats: float, later: Sequence[Exit], fill_frac: float) -> bool:
        """Whether a held exit that differs is worth its cost. later: the request's held exits after it; fill_frac:
        share of the budget's capacity that is there."""
        return False

    def on_verdict(self, exit_: Exit, agrees: bool) -> None:
        """The full model's word on an exit."""

    def on_shadow(self, depth: int, active_agrees: bool, agrees: bool) -> None:
        """Inactive ramp `depth` and the active one, evaluated on the same state after a checked token."""

    def wants_shadow(self) -> bool:
        return False

    def on_draft_step(self, depth: int, num_tokens: int, ms: float) -> None:
        """One draft step's time."""

    def on_step(self, ms: float) -> None:
        """Everything of an engine step but drafting, whether it read prompts or not."""

    def on_decode_step(self, num_requests: int, num_tokens: int, ms: float) -> None:
        """Everything of an engine step but drafting: a verification pass of `num_tokens`, none of a prompt."""

    def status(self) -> dict[str, object]:
        """Plain values for the status page."""
        return {}

    def state(self) -> dict[str, object]:
        """What it has learned, as JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up `state()` again; raises KeyError, TypeError or ValueError if it is not one."""


def draft_steps_within(max_batch_tokens: int, max_exits: int, num_requests: int) -> int:
    """Draft steps with which the next verification pass stays within `max_batch_tokens`, a row per request and exit."""
    return max(0, min(max_exits, max_batch_tokens // max(num_requests, 1) - 1))
