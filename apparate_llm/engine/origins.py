"""Where each token of one answer came from, for a request that asks to be told."""

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from apparate_llm.core import Exit

REPORT_KEY = "apparate_report_key"  # in a request's `vllm_xargs`, put there by the API: what the report is asked by
MAX_UNCLAIMED = 1024  # answers whose client left before the report was asked for


class Origin(StrEnum):
    CHECKED = "checked"  # the full model's own token
    HELD = "held"  # an exit that waited for the full model and was right
    HELD_DIVERGED = "held_diverged"  # emitted although the full model disagreed
    RELEASED = "released"  # left before its remaining layers ran, and was right
    RELEASED_DIVERGED = "released_diverged"
    UNVERIFIED = "unverified"  # released, and the answer ended before its verdict


@dataclass(slots=True)
class Trace:
    """Of one request, in the order its tokens were emitted."""

    key: str
    origins: list[Origin] = field(default_factory=list)
    exits_by_depth: dict[int, int] = field(default_factory=dict)
    _accepted: list[Exit] = field(default_factory=list)  # by the pass under way
    _due: dict[int, int] = field(default_factory=dict)  # position of a released exit -> its index in `origins`

    def accepted(self, held: list[Exit]) -> None:
        self._accepted = held

    def emitted(self, num_tokens: int) -> None:
        """Of the accepted exits and the full model's own token after them, the first `num_tokens`."""
        for exit_ in self._accepted[:num_tokens]:
            self._add(exit_, Origin.HELD_DIVERGED if exit_.diverged else Origin.HELD)
        if num_tokens > len(self._accepted):
            self.origins.append(Origin.CHECKED)
        self._accepted = []

    def released(self, exits: list[Exit]) -> None:
        for exit_ in exits:
            self._due[exit_.position] = len(self.origins)
            self._add(exit_, Origin.UNVERIFIED)

    def verified(self, exit_: Exit, agrees: bool) -> None:
        self.origins[self._due.pop(exit_.position)] = Origin.RELEASED if agrees else Origin.RELEASED_DIVERGED

    def _add(self, exit_: Exit, origin: Origin) -> None:
        self.origins.append(origin)
        self.exits_by_depth[exit_.depth] = self.exits_by_depth.get(exit_.depth, 0) + 1


@dataclass(slots=True)
class Reports:
    """Of answers that ended, until they are asked for."""

    _ended: OrderedDict[tuple[str, str], dict[str, Any]] = field(default_factory=OrderedDict)  # by key and request id

    def keep(self, request_id: str, trace: Trace, tpt_ms: float | None) -> None:
        self._ended[trace.key, request_id] = {
            "origins": [origin.value for origin in trace.origins],
            "exits_by_depth": dict(trace.exits_by_depth),
            "tpt_ms": tpt_ms,
        }
        while len(self._ended) > MAX_UNCLAIMED:
            self._ended.popitem(last=False)

    def take(self, key: str) -> dict[str, dict[str, Any]]:
        """Request id -> report, of all answers that this key was given for."""
        found = [own for own in self._ended if own[0] == key]
        return {own[1]: self._ended.pop(own) for own in found}
