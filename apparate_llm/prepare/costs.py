"""Costs that `profile` measured, as the simulation asks for them; and drawn anew by how far they may be off."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from apparate_llm.prepare.records import Profiled

Curve = tuple[np.ndarray, np.ndarray]  # places, ms


def curve(measured: Mapping[str, float]) -> Curve:
    """More never costs less: where a larger batch measured faster, the smaller one was disturbed."""
    places = sorted(map(int, measured))
    ms = np.array([measured[str(place)] for place in places], dtype=float)
    return np.array(places, dtype=float), np.minimum.accumulate(ms[::-1])[::-1]


def at(measured: Curve, place: float) -> float:
    """ms: between measured places linear, beyond them by the last slope."""
    places, ms = measured
    if place <= places[-1] or len(places) < 2:
        return float(np.interp(place, places, ms))
    slope = max(0.0, (ms[-1] - ms[-2]) / (places[-1] - places[-2]))
    return float(ms[-1] + slope * (place - places[-1]))


@dataclass(slots=True)
class ProfiledCosts:
    """Of one depth. Those of a pass are kept by number of requests and rows, as a server asks for few of them often."""

    passes: dict[int, Curve]  # requests -> over rows
    prompts: Curve  # over tokens: what a step takes that reads a prompt
    draft_steps: Curve  # over rows
    plain_frac: float  # how much longer plain vLLM's pass takes
    _passes: dict[tuple[int, int], float]

    @classmethod
    def of(cls, profiled: Profiled, depth: int, rng: np.random.Generator | None = None) -> "ProfiledCosts":
        """rng: each median is drawn from where it may as well lie."""
        error_frac = profiled.get("error_frac", {})

        def drawn(measured: Mapping[str, float], kind: str) -> Mapping[str, float]:
            if rng is None:
                return measured
            sd = error_frac.get(kind, 0.0) / 2
            return {place: ms * float(np.exp(sd * rng.standard_normal())) for place, ms in measured.items()}

        verified = drawn(profiled["verify_ms"], "verify")
        passes = {}
        for size, ms in verified.items():
            held = drawn(profiled.get("pass_ms", {}).get(size, {}), "pass")
            passes[int(size)] = curve({size: ms, **held})
        return cls(
            passes=dict(sorted(passes.items())),
            prompts=curve(drawn(profiled.get("prompt_ms") or _guessed_prompts(verified), "prompt")),
            draft_steps=curve(drawn(profiled["draft_step_ms"][str(depth)], "draft_step")),
            plain_frac=profiled.get("plain_frac", 1.0),
            _passes={},
        )

    def plain(self) -> "ProfiledCosts":
        """Of plain vLLM."""
        passes = {size: (places, ms * self.plain_frac) for size, (places, ms) in self.passes.items()}
        return replace(self, passes=passes, _passes={})

    def pass_ms(self, requests: int, rows: int, prompt_tokens: int) -> float:
        decoding = self._decoding_ms(requests, rows) if requests else 0.0
        if not prompt_tokens:
            return decoding
        reading = at(self.prompts, prompt_tokens)
        # The weights are read once for both.
        return max(reading, decoding + reading - self._decoding_ms(1, 1)) if requests else reading

    def draft_step_ms(self, rows: int) -> float:
        return at(self.draft_steps, rows)

    def _decoding_ms(self, requests: int, rows: int) -> float:
        ms = self._passes.get((requests, rows))
        if ms is None:
            ms = self._passes[requests, rows] = self._interpolated_ms(requests, rows)
        return ms

    def _interpolated_ms(self, requests: int, rows: int) -> float:
        """Between the measured numbers of requests, with as many rows for each."""
        sizes, per_request = list(self.passes), rows / requests
        known = [at(self.passes[size], size * per_request) for size in sizes]
        return at((np.array(sizes, dtype=float), np.maximum.accumulate(known)), requests)


def _guessed_prompts(verify_ms: Mapping[str, float]) -> Mapping[str, float]:
    """Where no prompt was measured: a row of a prompt costs what a request's does."""
    return verify_ms
