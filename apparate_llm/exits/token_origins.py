"""Where each token of one answer came from, for a request that asks to be told."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypedDict

from apparate_llm.core import Exit

REPORT_KEY = "apparate_report_key"  # in a request's `vllm_xargs`, put there by the API: what the report is asked by
MAX_UNCLAIMED = 1024  # answers whose client left before the report was asked for


class Origin(StrEnum):
    CHECKED = "checked"  # the full model's own token
    HELD = "held"  # an exit that waited for the full model and was right
    HELD_DIVERGENCE = "held_divergence"  # emitted although the full model disagreed
    RELEASED = "released"  # left before its remaining layers ran, and was right
    RELEASED_DIVERGENCE = "released_divergence"
    UNVERIFIED = "unverified"  # released, and the answer ended before its verdict


@dataclass(slots=True)
class Trace:
    """Of one request, in the order its tokens were emitted."""

    key: str
    origins: list[Origin] = field(default_factory=list)
    depths: list[int | None] = field(default_factory=list)  # of each token; None: the full model's own
    _accepted: list[Exit] = field(default_factory=list)  # by the pass under way
    _due: dict[int, int] = field(default_factory=dict)  # position of a released exit -> its index in `origins`

    def accepted(self, held: list[Exit]) -> None:
        self._accepted = held

    def emitted(self, num_tokens: int) -> None:
        """Of the accepted exits and the full model's own token after them, the first `num_tokens`."""
        for exit_ in self._accepted[:num_tokens]:
            self._add(Origin.HELD_DIVERGENCE if exit_.is_divergence else Origin.HELD, exit_.depth)
        for _ in range(num_tokens - len(self._accepted)):  # one; more where drafts were of exits that were dropped
            self._add(Origin.CHECKED, None)
        self._accepted = []

    def align(self, num_tokens: int) -> None:
        """After a failure: as many as were emitted, and none that waits for a verdict."""
        self.emitted(0)
        del self.origins[num_tokens:], self.depths[num_tokens:]
        while len(self.origins) < num_tokens:
            self._add(Origin.CHECKED, None)
        self._due.clear()

    def released(self, exits: list[Exit]) -> None:
        for exit_ in exits:
            self._due[exit_.position] = len(self.origins)
            self._add(Origin.UNVERIFIED, exit_.depth)

    def verified(self, exit_: Exit, agrees: bool) -> None:
        self.origins[self._due.pop(exit_.position)] = Origin.RELEASED if agrees else Origin.RELEASED_DIVERGENCE

    def _add(self, origin: Origin, depth: int | None) -> None:
        self.origins.append(origin)
        self.depths.append(depth)


class TokenReport(TypedDict):
    """Of one request that ended."""

    origins: list[str]  # of each token, as `Origin` has them
    depths: list[int | None]
    tpt_ms: float | None


def trace_of(extra_args: Mapping[str, object] | None) -> Trace | None:
    """For a request that asks for a report; None where its key is none that the API gave, so that nobody will ask."""
    key = (extra_args or {}).get(REPORT_KEY)
    return Trace(key) if isinstance(key, str) and key else None


@dataclass(slots=True)
class Reports:
    """Of answers that ended, until they are asked for."""

    _ended: OrderedDict[str, dict[str, TokenReport]] = field(default_factory=OrderedDict)  # by key, by request id
    _num_kept: int = 0

    def keep(self, request_id: str, trace: Trace, tpt_ms: float | None) -> None:
        own = self._ended.setdefault(trace.key, {})
        self._num_kept += request_id not in own
        own[request_id] = {
            "origins": [origin.value for origin in trace.origins],
            "depths": list(trace.depths),
            "tpt_ms": tpt_ms,
        }
        while self._num_kept > MAX_UNCLAIMED:
            self._num_kept -= len(self._ended.popitem(last=False)[1])

    def take(self, key: str) -> dict[str, TokenReport]:
        """Request id -> report, of all answers that this key was given for."""
        reports = self._ended.pop(key, {})
        self._num_kept -= len(reports)
        return reports
