"""Who waits for a first token, as the adaptive policy knows it."""

from dataclasses import dataclass

WAITED_STEPS = 4.0  # for a first token: two, of which the second reads prompts, so that it takes longer than the mean
JOINED_MEMORY = 1 / 64  # of the moving average of requests that join per step


@dataclass(slots=True)
class Waiting:
    _joined: int = 0  # since the last step
    _joined_per_step: float = 0.0

    def join(self) -> None:
        self._joined += 1

    def next_step(self) -> None:
        self._joined_per_step += JOINED_MEMORY * (self._joined - self._joined_per_step)
        self._joined = 0

    @property
    def num_requests(self) -> float:
        """On average over the last steps."""
        return WAITED_STEPS * self._joined_per_step
