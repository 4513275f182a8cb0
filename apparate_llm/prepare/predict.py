"""What measured agreement and measured costs promise: time per output token with exits / without."""

import numpy as np

MAX_EXITS = 4


def completion_cost(completion_ms: dict[str, float], rows: float) -> float:
    """ms of a pass over `rows` rows: between measured batch sizes linear, beyond them by the last slope.

    More rows never cost less: where a larger batch measured faster, the smaller one was disturbed.
    """
    sizes = np.array(sorted(map(int, completion_ms)), dtype=float)
    costs = np.array([completion_ms[str(int(size))] for size in sizes])
    costs = np.minimum.accumulate(costs[::-1])[::-1]
    if rows <= sizes[-1] or len(sizes) < 2:
        return float(np.interp(rows, sizes, costs))
    slope = max(0.0, (costs[-1] - costs[-2]) / (sizes[-1] - sizes[-2]))
    return float(costs[-1] + slope * (rows - sizes[-1]))


def tpt_ratio(
    agreement: list[float | None], completion_ms: dict[str, float], round_ms: dict[str, float], batch: int
) -> tuple[float, int]:
    """(best predicted TPT ratio, exits per cycle it takes). Rounds are run while the ramp agrees; a ratio of 1 with no
    exits is always to be had."""
    plain = completion_cost(completion_ms, batch)
    best = (1.0, 0)
    tokens, reach, rounds = 1.0, 1.0, 0.0
    for exits, agrees in enumerate(agreement[:MAX_EXITS], 1):
        rounds += reach
        reach *= agrees or 0.0  # None: no row got that far
        tokens += reach
        cycle = completion_cost(completion_ms, batch * (1 + rounds)) + rounds * round_ms[str(batch)]
        best = min(best, (cycle / plain / tokens, exits))
    return best
