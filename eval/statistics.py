"""From raw completions to the figures of the schema."""

from collections.abc import Sequence

import numpy as np

from apparate_llm.eval.client import Completion
from apparate_llm.eval.intervals import Interval
from apparate_llm.eval.schema import Distribution


def distribution(values: Sequence[float | None], mean_ci95: Interval | None = None) -> Distribution:
    known = [value for value in values if value is not None]
    if not known:
        return Distribution(mean=None, p50=None, p95=None, p99=None)
    p50, p95, p99 = np.percentile(known, [50, 95, 99])
    return Distribution(mean=float(np.mean(known)), p50=float(p50), p95=float(p95), p99=float(p99), mean_ci95=mean_ci95)


def shared_chunk_frac(completions: list[Completion]) -> float | None:
    """Share of tokens that came in one chunk with an earlier one; None where no server said how many came."""
    tokens = chunks = 0
    for done in completions:
        if not done.error and done.output_tokens and done.chunks and done.chunks[-1].tokens is not None:
            tokens += done.output_tokens
            chunks += len(done.chunks)
    return (tokens - chunks) / tokens if tokens else None


def tokens_per_s(tokens: int, wall_s: float) -> float | None:
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
    times_ms = {"ttft": done.ttft_ms, "tpt": done.tpt_ms or 0.0, "e2e": done.e2e_ms}
    return all((value := times_ms[name]) is not None and value <= most for name, most in slo_ms.items())


def ratio_of(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
