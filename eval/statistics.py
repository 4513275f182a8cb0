"""From raw completions to the figures of the schema."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from apparate_llm.eval.client import Completion
from apparate_llm.eval.schema import Distribution

RESAMPLES = 2000
SEED = 0
Samples = NDArray[np.float64]
Statistic = Callable[[Samples], Samples]


def distribution(values: Sequence[float | None], *, interval: bool = False) -> Distribution:
    """interval: with a bootstrap interval of the mean, over the values as given."""
    known = [value for value in values if value is not None]
    if not known:
        return Distribution(mean=None, p50=None, p95=None, p99=None)
    p50, p95, p99 = np.percentile(known, [50, 95, 99])
    bounds = None
    if interval and len(known) > 1:
        bounds = bootstrap(np.array([known]), lambda sample: sample[0].mean(-1))
    return Distribution(mean=float(np.mean(known)), p50=float(p50), p95=float(p95), p99=float(p99), mean_ci95=bounds)


def bootstrap(columns: Samples, statistic: Statistic) -> tuple[float, float]:
    """95 % percentile interval over paired samples [variables, n]; statistic: of [variables, resamples, n]."""
    n = columns.shape[1]
    drawn = np.random.default_rng(SEED).integers(0, n, (RESAMPLES, n))
    low, high = np.percentile(statistic(columns[:, drawn]), [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(ours: list[Completion], baseline: list[Completion]) -> tuple[float, float] | None:
    """95 % interval of the ratio of mean TPTs over prompts that both answered, each with its mean over repeats."""
    mine, theirs = tpt_by_prompt(ours), tpt_by_prompt(baseline)
    both = sorted(mine.keys() & theirs.keys())
    if len(both) < 2:
        return None
    columns = np.array([[mine[index] for index in both], [theirs[index] for index in both]])
    return bootstrap(columns, lambda sample: sample[0].mean(-1) / sample[1].mean(-1))


def apart_interval(
    ours: Sequence[float | None], baseline: Sequence[float | None], statistic: Statistic
) -> tuple[float, float] | None:
    """95 % interval of the ratio of a statistic of two samples, each drawn from anew by itself.
    statistic: of [resamples, n], over the last axis."""
    known = [np.array([value for value in values if value is not None]) for values in (ours, baseline)]
    if min(map(len, known)) < 2:
        return None
    drawn = np.random.default_rng(SEED)
    above, below = (statistic(sample[drawn.integers(0, len(sample), (RESAMPLES, len(sample)))]) for sample in known)
    low, high = np.percentile(above / below, [2.5, 97.5])
    return float(low), float(high)


def mean_of(values: Samples) -> Samples:
    means: Samples = np.mean(values, axis=-1)
    return means


def p99_of(values: Samples) -> Samples:
    highest: Samples = np.percentile(values, 99, axis=-1)
    return highest


def tpt_by_prompt(completions: list[Completion]) -> dict[int, float]:
    found: dict[int, list[float]] = defaultdict(list)
    for done in completions:
        if (tpt_ms := done.tpt_ms) is not None:
            found[done.prompt_index].append(tpt_ms)
    return {index: float(np.mean(values)) for index, values in found.items()}


def shared_chunk_frac(completions: list[Completion]) -> float | None:
    """Share of tokens that came in one chunk with an earlier one; None where no server said how many came."""
    tokens = chunks = 0
    for done in completions:
        if not done.error and done.output_tokens and done.chunks and done.chunks[-1].tokens is not None:
            tokens += done.output_tokens
            chunks += len(done.chunks)
    return (tokens - chunks) / tokens if tokens else None


def tokens_per_s(completions: list[Completion], wall_s: float) -> float | None:
    tokens = output_tokens(completions)
    return tokens / wall_s if tokens and wall_s > 0 else None


def output_tokens(completions: list[Completion]) -> int:
    return sum(done.output_tokens or 0 for done in completions if not done.error)


def goodput_frac(completions: list[Completion], slo_ms: dict[str, float]) -> float | None:
    """Share of all requests, failed ones included, that met every objective (`ttft`, `tpt`, `e2e`, in ms). An answer
    of a single token meets any `tpt`."""
    if not slo_ms or not completions:
        return None
    return sum(_meets(done, slo_ms) for done in completions) / len(completions)


def _meets(done: Completion, slo_ms: dict[str, float]) -> bool:
    if done.error:
        return False
    found = {"ttft": done.ttft_ms, "tpt": done.tpt_ms or 0.0, "e2e": done.e2e_ms}
    return all((value := found[name]) is not None and value <= most for name, most in slo_ms.items())


def ratio_of(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
