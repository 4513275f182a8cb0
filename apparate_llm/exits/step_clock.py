"""Times of the engine's steps. With tensor parallelism rank 0's clock is everybody's, so that all decide alike."""

from time import monotonic, process_time
from typing import NamedTuple

from apparate_llm.controller.policy import Policy
from apparate_llm.exits.ranks import Ranks

STOPPED_S = 0.5  # of a step, from which it may be one in which the process was stopped
RAN_FRAC = 0.25  # of a step that the process had a CPU, below which it was


class Took(NamedTuple):
    num_requests: int
    num_tokens: int  # of the verification pass: one per request and exit
    verify_ms: float  # everything of the step but drafting


class StepClock:
    """A step lasts from the end of one step's drafting to the end of the next one's."""

    def __init__(self, peers: Ranks) -> None:
        self.peers = peers
        self.now_s = monotonic()  # when the last verification pass was sampled
        self.last: Took | None = None  # None where the step was no plain decode step, or `pass_ms` is
        self.pass_ms: float | None = None  # of any step, None where the engine had idled or been stopped
        self._began_s: float | None = None
        self._began_cpu_s = 0.0
        self._scheduled = (0, 0)
        self._is_decode = False

    def scheduled(self, *, num_requests: int, num_tokens: int, num_decode_tokens: int) -> None:
        """num_decode_tokens: what `num_tokens` would be if no prompt were being read."""
        self._scheduled = (num_requests, num_tokens)
        self._is_decode = num_tokens == num_decode_tokens

    def completed(self) -> None:
        now_s = monotonic()
        took_s = now_s - self._began_s if self._began_s is not None else -1.0
        if took_s > STOPPED_S and process_time() - self._began_cpu_s < RAN_FRAC * took_s:
            took_s = -1.0  # frozen, or without a CPU: says nothing of what steps cost
        self.now_s, took_s = self.peers.share_floats([now_s, took_s])
        self.pass_ms = took_s * 1e3 if took_s >= 0 else None
        self.last = Took(*self._scheduled, took_s * 1e3) if took_s >= 0 and self._is_decode else None

    def tell(self, policy: Policy) -> None:
        """What the last step took."""
        if self.pass_ms is not None:
            policy.on_step(self.pass_ms)
        if self.last is not None:
            policy.on_decode_step(*self.last)

    def start(self) -> None:
        self._began_s, self._began_cpu_s = monotonic(), process_time()

    def stop(self) -> None:
        """The engine idles: the time until the next step is nobody's."""
        self._began_s = None

    def shared_times(self, spent: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """Rank 0's times of a step's drafting."""
        times = self.peers.share_floats([ms for _, ms in spent])
        return [(num_tokens, ms) for (num_tokens, _), ms in zip(spent, times, strict=True)]
