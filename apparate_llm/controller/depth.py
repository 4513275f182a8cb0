"""Which of the ramps is in use."""

from collections.abc import Callable
from dataclasses import dataclass, field

LEAST_SAMPLES = 64
MEMORY = 1 / 128
CHECK_EVERY = 64  # steps
HYSTERESIS = 1.05  # a ramp must promise this much more than the active one


@dataclass(slots=True)
class Shadow:
    """An inactive ramp beside the active one on the same states: moving averages of their agreement."""

    agreement: float = 0.0
    active_agreement: float = 0.0
    num_samples: int = 0

    def observe(self, active_agrees: bool, agrees: bool) -> None:
        self.num_samples += 1
        memory = max(MEMORY, 1.0 / self.num_samples)
        self.agreement += memory * (agrees - self.agreement)
        self.active_agreement += memory * (active_agrees - self.active_agreement)


@dataclass(slots=True)
class DepthChoice:
    active: int
    shadows: dict[int, Shadow] = field(default_factory=dict)
    steps: int = 0

    def observe(self, depth: int, active_agrees: bool, agrees: bool) -> None:
        assert depth != self.active, f"depth {depth} is active, it needs no shadow"
        self.shadows.setdefault(depth, Shadow()).observe(active_agrees, agrees)

    def relative(self, depth: int, agreement: float) -> float:
        """What the active ramp's `agreement` would be at `depth`, by the two ramps' agreement on the same states."""
        shadow = self.shadows.get(depth)
        if depth == self.active or shadow is None or shadow.active_agreement <= 0.0:
            return agreement
        return min(1.0, agreement * shadow.agreement / shadow.active_agreement)

    def choose(self, rate_of: Callable[[int], float]) -> int:
        """The depth to use from now on; `rate_of` says what a depth promises in tokens per ms."""
        self.steps += 1
        if self.steps % CHECK_EVERY:
            return self.active
        known = [depth for depth, shadow in self.shadows.items() if shadow.num_samples >= LEAST_SAMPLES]
        if known:
            best = max(known, key=rate_of)
            if rate_of(best) > HYSTERESIS * rate_of(self.active):
                self.active = best
                self.shadows.clear()  # measured beside the ramp that was active until now
        return self.active
