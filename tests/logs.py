"""Made-up feedback: steps whose exits agree as often as their confidence says, or not."""

import random
from collections.abc import Callable, Iterator

from apparate_llm.controller.feedback import LoggedExit, LoggedStep

PASS_MS, DRAFT_STEP_MS = 20.0, 1.0


def steps(
    count: int,
    *,
    seed: int = 0,
    draft_steps: int = 3,
    requests: int = 1,
    length: int = 60,
    row_ms: float = 0.3,
    agrees: Callable[[float, int, random.Random], bool] = lambda confidence, step, rng: rng.random() < confidence,
) -> Iterator[LoggedStep]:
    """`requests` at a time of `length` steps each, all with all draft steps; agrees(confidence, step, rng)."""
    rng = random.Random(seed)
    for number in range(count):
        exits = []
        for request in range(requests):
            for draft_step in range(draft_steps):
                confidence = rng.random() ** 0.4
                ok = agrees(confidence, number, rng)
                regret = 0.0 if ok else rng.expovariate(1.0)
                exits.append(
                    LoggedExit(number // length * requests + request, 0, draft_step, confidence, 1, ok, regret)
                )
        rows = requests * (1 + number % (draft_steps + 1))  # passes of all sizes, so that their costs are known
        yield LoggedStep(requests, rows, PASS_MS + row_ms * rows, [(requests, DRAFT_STEP_MS)] * draft_steps, exits)
