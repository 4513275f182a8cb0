"""From raw completions to the figures of the schema."""

import numpy as np
from apparate_llm.eval.client import Completion
from apparate_llm.eval.schema import Distribution, Ratio, Run


def distribution(values: list[float | None]) -> Distribution:
    known = [value for value in values if value is not None]
    if not known:
        return Distribution(mean=None, p50=None, p95=None, p99=None)
    p50, p95, p99 = np.percentile(known, [50, 95, 99])
    return Distribution(mean=float(np.mean(known)), p50=float(p50), p95=float(p95), p99=float(p99))


def identical_frac(ours: list[Completion], baseline: list[Completion]) -> float | None:
    """Share of answers with the baseline's very text, over prompts that both answered."""
    wanted = {done.prompt_index: done.text for done in baseline if not done.error}
    same = [done.text == wanted[done.prompt_index] for done in ours if not done.error and done.prompt_index in wanted]
    return float(np.mean(same)) if same else None


def tokens_per_s(completions: list[Completion], wall_s: float) -> float | None:
    tokens = sum(done.output_tokens or 0 for done in completions if not done.error)
    return tokens / wall_s if tokens and wall_s > 0 else None


def ratio_of(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def ratio(ours: Run, baseline: Run, by_repeat: list[float]) -> Ratio:
    return Ratio(
        system=ours.system,
        baseline=baseline.system,
        concurrency=ours.concurrency,
        tpt_mean=ratio_of(ours.tpt_ms.mean, baseline.tpt_ms.mean),
        tpt_p99=ratio_of(ours.tpt_ms.p99, baseline.tpt_ms.p99),
        throughput=ratio_of(ours.output_tokens_per_s, baseline.output_tokens_per_s),
        tpt_mean_by_repeat=by_repeat,
    )
