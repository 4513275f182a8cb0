"""What the adaptive policy does at one load, and what it has seen there."""

import math
from dataclasses import dataclass, field

from apparate_llm.controller.costs import ROWS

PLAN_STEPS = 8  # a plan is kept for so many steps
PLAIN_STEPS = frozenset({4, 8, 16, 32, 64})  # steps without exits, so that plain passes are measured, then every
PLAIN_EVERY = 256
TRIED_EVERY = 16  # plans without prompt lookup, as it does not pay, until one has it, so that a change is noticed
FIRST_PROBE = 4  # steps until a single draft step where exits do not pay any more, then twice as many each time, up to
PROBE_EVERY = 64  # at least
FIRST_PROBES_COST_FRAC = 0.1  # of the time that the first of them may take
PROBE_COST_FRAC = 0.01  # that later ones may


@dataclass(slots=True)
class LookedUp:
    """What prompt lookup gave the requests of one step, all together."""

    num_requests: int = 0
    tokens: float = 0.0  # expected
    rows: int = 0


@dataclass(slots=True)
class LookupStatistics:
    """Moving averages over steps in which exits may be looked up, per request; at first what makes it try."""

    tokens: float = 0.3  # expected
    rows: float = 0.3
    memory: float = 1 / 64

    def observe(self, looked_up: LookedUp) -> None:
        self.tokens += self.memory * (looked_up.tokens / looked_up.num_requests - self.tokens)
        self.rows += self.memory * (looked_up.rows / looked_up.num_requests - self.rows)


@dataclass(slots=True)
class LoadPlan:
    """Of all numbers of requests that share it, see `load_of`."""

    num_draft_steps: int = 0
    min_tokens_per_ms: float = 0.0  # that an exit must bring
    looks_up: bool = True
    lookup: LookupStatistics = field(default_factory=LookupStatistics)
    _age: int = PLAN_STEPS  # steps since it was made: none was yet
    _steps: int = 0  # at this load
    _worthless: int = 0  # plans since exits last paid
    _since_probe: int = 0  # steps
    _probe_after: float = FIRST_PROBE  # steps

    def next_step(self) -> bool:
        """Count a step; whether the plan must be made anew for it."""
        self._steps += 1
        is_old = self._age >= PLAN_STEPS
        self._age = 1 if is_old else self._age + 1
        return is_old

    def renew(self, num_draft_steps: int, min_tokens_per_ms: float, *, pays: bool) -> None:
        """num_draft_steps: the best number of them, taken where exits pay."""
        self._worthless = 0 if pays else self._worthless + 1
        self.num_draft_steps = num_draft_steps if pays else 0
        self.min_tokens_per_ms = min_tokens_per_ms
        self.looks_up = self._worthless % TRIED_EVERY == 0

    def grow_old(self) -> None:
        """The next step makes it anew."""
        self._age = PLAN_STEPS

    @property
    def is_plain_step(self) -> bool:
        """Whether the step goes without exits, to see what it takes."""
        return self._steps in PLAIN_STEPS or self._steps % PLAIN_EVERY == 0

    def draft_steps_pay(self) -> None:
        self._probe_after = FIRST_PROBE

    def is_probed(self, extra_frac: float) -> bool:
        """Whether a single draft step is run where none pays, so that a change is noticed; soon after they did, as a
        slow one or two may have made them look expensive. extra_frac: what it takes, of a step without."""
        self._since_probe += 1
        most = max(PROBE_EVERY, extra_frac / PROBE_COST_FRAC)
        after = max(self._probe_after, extra_frac / FIRST_PROBES_COST_FRAC)
        if self._since_probe < min(after, most):
            return False
        self._since_probe = 0
        self._probe_after = min(2 * after, most)
        return True


def load_of(num_requests: int) -> int:
    """The largest number of requests that shares this one's plan."""
    return next((rows for rows in ROWS if rows >= num_requests), math.ceil(num_requests / ROWS[-1]) * ROWS[-1])
