"""Made-up feedback: cycles whose exits agree as often as their confidence says, or not."""

import random
from collections.abc import Callable, Iterator

from apparate_llm.controller.feedback import Cycle, LoggedExit

PASS_MS, ROUND_MS = 20.0, 1.0


def cycles(
    count: int,
    *,
    seed: int = 0,
    rounds: int = 3,
    requests: int = 1,
    length: int = 60,
    row_ms: float = 0.3,
    agrees: Callable[[float, int, random.Random], bool] = lambda confidence, cycle, rng: rng.random() < confidence,
) -> Iterator[Cycle]:
    """`requests` at a time of `length` cycles each, every cycle with all its rounds; agrees(confidence, cycle, rng)."""
    rng = random.Random(seed)
    for number in range(count):
        exits = []
        for request in range(requests):
            for round_number in range(rounds):
                confidence = rng.random() ** 0.4
                ok = agrees(confidence, number, rng)
                regret = 0.0 if ok else rng.expovariate(1.0)
                exits.append(
                    LoggedExit(number // length * requests + request, 0, round_number, confidence, 1, ok, regret)
                )
        rows = requests * (1 + number % (rounds + 1))  # passes of all sizes, so that their costs are known
        yield Cycle(requests, rows, PASS_MS + row_ms * rows, [(requests, ROUND_MS)] * rounds, exits)
