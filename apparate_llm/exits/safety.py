"""Whether exits are on: after a failure of ours serving goes on without them, and they come back after a pause."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger("vllm.apparate")
FIRST_PAUSE_S = 30.0  # twice as long after each further failure within an hour
MOST_RETURNS = 6  # within an hour, by themselves
HOUR_S = 3600.0


@dataclass(slots=True)
class Safety:
    """Times are of the engine's clock, which is the same on all ranks."""

    num_failures: int = 0
    num_returns: int = 0
    part: str | None = None  # that failed last
    error: str | None = None  # its type
    returns_s: float | None = None  # when exits come back by themselves; None: they are on
    _failed_s: deque[float] = field(default_factory=deque)  # within the last hour
    _returned_s: deque[float] = field(default_factory=deque)  # by themselves, within the last hour

    @property
    def is_off(self) -> bool:
        return self.returns_s is not None

    def failed(self, part: str, error: BaseException, now_s: float) -> None:
        was_off = self.is_off
        self.num_failures += 1
        self.part, self.error = part, type(error).__name__
        self._forget_old(now_s)
        self._failed_s.append(now_s)
        pause_s = min(HOUR_S, FIRST_PAUSE_S * 2 ** (len(self._failed_s) - 1))
        self.returns_s = now_s + pause_s
        if len(self._returned_s) >= MOST_RETURNS:
            self.returns_s = max(self.returns_s, self._returned_s[0] + HOUR_S)
        number = self.num_failures
        if not was_off or number & (number - 1) == 0:  # what fails in every step fills no disk
            logger.error(
                "Early exits failed (%s) and are off for %.0f s, or until they are configured; serving continues as "
                "plain vLLM",
                part,
                self.returns_s - now_s,
                exc_info=error,
            )

    def is_due(self, now_s: float) -> bool:
        return self.returns_s is not None and now_s >= self.returns_s

    def returned(self, now_s: float, *, by_hand: bool) -> None:
        self.returns_s = None
        self.num_returns += 1
        if not by_hand:
            self._returned_s.append(now_s)
        logger.warning("Early exits are on again, after failure %d", self.num_failures)

    @property
    def trusts_policy(self) -> bool:
        """Whether what the policy had learned may be taken up again: a second failure may be its fault."""
        return len(self._failed_s) <= 1

    def status(self, now_s: float) -> dict[str, object] | None:
        """What is wrong; None while exits are on."""
        if self.returns_s is None:
            return None
        return {"part": self.part, "error": self.error, "returns_in_s": round(max(0.0, self.returns_s - now_s), 1)}

    def _forget_old(self, now_s: float) -> None:
        for times in (self._failed_s, self._returned_s):
            while times and times[0] <= now_s - HOUR_S:
                times.popleft()


class Asides:
    """Runs what is no part of exits (logs, files, histograms): if it fails, exits go on, and a warning says so at the
    first time, the second, the fourth, ..."""

    def __init__(self) -> None:
        self.num_failures = 0

    def run(self, part: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self.num_failures += 1
            if self.num_failures & (self.num_failures - 1) == 0:
                logger.warning("%s failed, early exits go on: %s: %s", part, type(error).__name__, error)
