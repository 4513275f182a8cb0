"""From the blocks on disk to `Results`: figures of every system under every load, ratios, quality."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from apparate_llm.eval.client import GREEDY, Completion, Sampling
from apparate_llm.eval.code_check import code_passes
from apparate_llm.eval.intervals import (
    Sums,
    Values,
    mean_interval,
    mean_ratio,
    p99_interval,
    p99_ratio,
    ratio_interval,
    sums_of,
)
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.quality import final_number, first_difference, is_maths, rouge_l
from apparate_llm.eval.schema import Distribution, Exits, Quality, Ratio, Run, TimelinePoint
from apparate_llm.eval.statistics import (
    distribution,
    goodput_frac,
    output_tokens,
    ratio_of,
    shared_chunk_frac,
    tokens_per_s,
)
from apparate_llm.eval.store import Block
from apparate_llm.eval.systems import BASELINE, OFF, PLAIN, SHARES, System
from apparate_llm.eval.workloads import Load
from apparate_llm.naming import model_name


@dataclass(slots=True)
class SystemUnderLoad:
    """All blocks of one system under one load, in the order of repeats and prompts."""

    system: System
    load: Load
    blocks: list[Block]

    @property
    def completions(self) -> list[Completion]:
        return [done for block in self.blocks for done in block.completions]

    def values(self, name: str) -> list[float | None]:
        """Of every completion."""
        return [getattr(done, name) for done in self.completions]

    def by_unit(self, name: str) -> Values:
        """What is known of the completions of each block."""
        return {
            (block.key.repeat, block.key.block): [
                value for done in block.completions if (value := getattr(done, name)) is not None
            ]
            for block in self.blocks
        }

    def distribution(self, name: str) -> Distribution:
        return distribution(self.values(name), mean_interval(sums_of(self.by_unit(name))))

    @property
    def tokens_by_unit(self) -> Sums:
        """Output tokens and seconds of each block."""
        return {
            (block.key.repeat, block.key.block): (float(block.tokens_in_time), block.wall_s) for block in self.blocks
        }

    @property
    def wall_s(self) -> float:
        return sum(block.wall_s for block in self.blocks)

    def total(self, name: str) -> float | None:
        """Of a count of exits; None for a system without."""
        values: list[float] = [block.counts[name] for block in self.blocks if block.counts is not None]
        return sum(values) if values else None

    @property
    def served_tokens(self) -> int:
        return sum(block.served_tokens for block in self.blocks)

    def per_token(self, seconds_or_joules: Sequence[float | None]) -> float | None:
        tokens = self.served_tokens
        known = [value for value in seconds_or_joules if value is not None]
        return sum(known) / tokens if tokens and len(known) == len(self.blocks) else None


@dataclass(frozen=True, slots=True)
class Summary:
    """What the figures are made from, besides the blocks."""

    model: Path
    num_layers: int
    prompts: list[Prompt]
    phases: tuple[tuple[str, int], ...]  # (name, number of its first prompt) of a workload that changes
    slo_ms: dict[str, float]
    sampling: Sampling = GREEDY
    baseline: str = BASELINE  # whose answers the others' are held against


def cells_of(blocks: Sequence[Block], systems: list[System], loads: list[Load]) -> list[SystemUnderLoad]:
    by_key: dict[tuple[int, str], list[Block]] = defaultdict(list)
    for block in blocks:
        by_key[block.key.load, block.key.system].append(block)
    return [
        SystemUnderLoad(system, load, by_key[number, system.name])
        for number, load in enumerate(loads)
        for system in systems
        if (number, system.name) in by_key
    ]


def runs_of(cells: list[SystemUnderLoad], summary: Summary) -> list[Run]:
    """Texts that are drawn at random are not held against others."""
    runs, sampled = [], summary.sampling.temperature > 0
    for cell in cells:
        base = _of_system(summary.baseline, cell, cells)
        quality = None
        if base is not None:
            prompts = summary.prompts
            if cell.load.fixed_length:  # an answer that is made to go on does not end with what it came to
                prompts = [Prompt(prompt.messages) for prompt in prompts]
            alone = base is cell or sampled
            quality = quality_of(cell.completions, [] if alone else base.completions, prompts)
        first = next(other for other in cells if other.system is cell.system)
        comparable = first is not cell and first.load.fixed_length == cell.load.fixed_length
        same = {
            "same_as_off_frac": None if sampled else _same_frac(cell, _of_system(OFF, cell, cells)),
            "same_as_first_load_frac": None if sampled else _same_frac(cell, first if comparable else None),
        }
        runs.append(_run(cell, summary, quality).model_copy(update=same))
    return runs


def _of_system(name: str, cell: SystemUnderLoad, cells: list[SystemUnderLoad]) -> SystemUnderLoad | None:
    """Under the same load."""
    return next((other for other in cells if other.system.name == name and other.load is cell.load), None)


def _same_frac(cell: SystemUnderLoad, other: SystemUnderLoad | None) -> float | None:
    """Of its answers, those with the very text of the other's to the same prompt."""
    if other is None or other is cell:
        return None
    wanted = {done.prompt_index: done.text for done in other.completions if not done.error}
    answers = [done for done in cell.completions if not done.error and done.prompt_index in wanted]
    return _mean([done.text == wanted[done.prompt_index] for done in answers])


def _run(cell: SystemUnderLoad, summary: Summary, quality: Quality | None) -> Run:
    completions, load, blocks = cell.completions, cell.load, cell.blocks
    good = goodput_frac(completions, summary.slo_ms)
    tokens, served = output_tokens(completions), cell.served_tokens
    rate = tokens_per_s(sum(block.tokens_in_time for block in blocks), cell.wall_s)
    regret = cell.total("regret_nats")
    peaks = [block.peak_memory_gib for block in blocks if block.peak_memory_gib is not None]
    return Run(
        system=cell.system.name,
        model=model_name(summary.model),
        load=load.name,
        concurrency=load.concurrency,
        fixed_length=load.fixed_length,
        requests=len(completions),
        failed=sum(done.error is not None for done in completions),
        output_tokens=tokens,
        served_tokens=served if any(block.uncounted for block in blocks) else None,
        wall_s=cell.wall_s,
        tpt_ms=cell.distribution("tpt_ms"),
        ttft_ms=cell.distribution("ttft_ms"),
        gap_ms=distribution([gap for done in completions for gap in done.gaps_ms]),
        e2e_ms=cell.distribution("e2e_ms"),
        shared_chunk_frac=shared_chunk_frac(completions),
        output_tokens_per_s=rate,
        goodput_frac=good,
        within_target_frac=_within_target_frac(cell),
        goodput_per_s=None if good is None or rate is None or not tokens else good * rate * len(completions) / tokens,
        cpu_s_per_token=cell.per_token([block.cpu_s for block in blocks]),
        energy_j_per_token=cell.per_token([block.energy_j for block in blocks]),
        blocks_per_token=_blocks_per_token(cell, summary.num_layers),
        peak_memory_gib=max(peaks) if peaks else None,
        exits=_exits(cell),
        divergences=cell.total("divergences"),
        identical_frac=quality.identical_frac if quality else None,
        regret_nats_per_token=None if regret is None or not served else regret / served,
        quality=quality,
        timeline=_timeline(cell, summary),
    )


def _within_target_frac(cell: SystemUnderLoad) -> float | None:
    target_ms = cell.system.tpt_target_ms
    return None if target_ms is None else _mean([ms <= target_ms for ms in cell.values("tpt_ms") if ms is not None])


def _exits(cell: SystemUnderLoad) -> Exits | None:
    if cell.total("held") is None:
        return None
    by_depth: dict[str, int] = defaultdict(int)
    for block in cell.blocks:
        for depth, number in (block.counts or {}).get("exits_by_depth", {}).items():
            by_depth[depth] += number
    names = ("held", "accepted", "released", "unverified")
    return Exits(**{name: cell.total(name) for name in names}, by_depth=dict(by_depth))


def _blocks_per_token(cell: SystemUnderLoad, num_layers: int) -> float | None:
    """Of a system whose passes we know: plain vLLM's run all blocks once a token; held exits that fail cost a row more,
    draft steps their shallow blocks."""
    if cell.system.name in PLAIN:
        return float(num_layers)
    emitted, held, accepted, blocks = map(cell.total, ("emitted", "held", "accepted", "shallow_blocks"))
    if not emitted or held is None or accepted is None or blocks is None:
        return None
    return ((emitted + held - accepted) * num_layers + blocks) / emitted


def _timeline(cell: SystemUnderLoad, summary: Summary) -> list[TimelinePoint]:
    """Block after block. Closed loops only keep the order of the prompts, so only they show phases."""
    timeline = []
    tokens = divergences = at_worst = 0
    for block in cell.blocks:
        block_tokens = block.served_tokens
        tokens += block_tokens
        in_block = None if block.counts is None else block.counts["divergences"]
        divergences += in_block or 0
        at_worst += (in_block or 0) + (block.counts or {}).get("unverified", 0)
        first = min((done.prompt_index for done in block.completions), default=0)
        phase = next((name for name, start in reversed(summary.phases) if first >= start), "")
        timeline.append(
            TimelinePoint(
                phase=phase,
                output_tokens=tokens,
                divergence_frac=None if in_block is None or not tokens else divergences / tokens,
                block_divergence_frac=None if in_block is None or not block_tokens else in_block / block_tokens,
                divergences_at_worst_frac=None if in_block is None or not tokens else at_worst / tokens,
                tpt_ms=distribution([done.tpt_ms for done in block.completions]).mean,
            )
        )
    return timeline


def quality_of(ours: list[Completion], baseline: list[Completion], prompts: list[Prompt]) -> Quality:
    """Over answers without an error, the baseline's to the same prompt beside them."""
    wanted = {done.prompt_index: done for done in baseline if not done.error}
    answers = [done for done in ours if not done.error]
    pairs = [(done, wanted[done.prompt_index]) for done in answers if done.prompt_index in wanted]
    asked = [(done.text, prompts[done.prompt_index]) for done in answers]
    maths = [(text, prompt.reference) for text, prompt in asked if is_maths(prompt.category)]
    same_number = [
        final_number(a.text) == final_number(b.text) for a, b in pairs if is_maths(prompts[a.prompt_index].category)
    ]
    positions = [
        before
        for a, b in pairs
        if (at := first_difference(a.text, b.text)) is not None and (before := a.tokens_before(at)) is not None
    ]
    return Quality(
        identical_frac=_mean([a.text == b.text for a, b in pairs]),
        first_difference_tokens=float(median(positions)) if positions else None,
        rouge_l_baseline=_mean([1.0 if a.text == b.text else rouge_l(a.text, b.text) for a, b in pairs]),
        rouge_l_reference=_mean(
            [
                rouge_l(text, prompt.reference)
                for text, prompt in asked
                if prompt.reference and not prompt.tests and not is_maths(prompt.category)
            ]
        ),
        same_number_frac=_mean(same_number),
        right_number_frac=_mean([final_number(text) == final_number(right) for text, right in maths if right]),
        code_passed_frac=_mean([code_passes(text, prompt.tests) for text, prompt in asked if prompt.tests]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def ratios_of(cells: list[SystemUnderLoad], runs: list[Run], baselines: Sequence[str] = (BASELINE,)) -> list[Ratio]:
    """Every system against each baseline under the same load, all against the first one at the front."""
    run_of = {id(cell): run for cell, run in zip(cells, runs, strict=True)}
    pairs = [(cell, _of_system(baseline, cell, cells)) for baseline in baselines for cell in cells]
    return [
        _ratio(cell, run_of[id(cell)], base, run_of[id(base)])
        for cell, base in pairs
        if base is not None and base is not cell
    ]


def steps_of(cells: list[SystemUnderLoad], runs: list[Run]) -> list[Ratio]:
    """Each system that has one more part of a gain against the one before it, under the same load."""
    steps = []
    for load in dict.fromkeys(cell.load for cell in cells):
        measured = {cell.system.name: i for i, cell in enumerate(cells) if cell.load is load}
        rungs = [measured[name] for name in SHARES if name in measured]
        steps += [_ratio(cells[i], runs[i], cells[before], runs[before]) for before, i in pairwise(rungs)]
    return steps


def _ratio(cell: SystemUnderLoad, run: Run, base: SystemUnderLoad, base_run: Run) -> Ratio:
    """Over the blocks that both have: one that ends early is not held against prompts it was not asked."""
    pairs = zip(_tpt_by_repeat(cell), _tpt_by_repeat(base), strict=False)
    (tpt, ttft), (base_tpt, base_ttft) = (
        [side.by_unit(name) for name in ("tpt_ms", "ttft_ms")] for side in (cell, base)
    )
    return Ratio(
        system=run.system,
        baseline=base_run.system,
        load=run.load,
        concurrency=run.concurrency,
        fixed_length=run.fixed_length,
        units=len(tpt.keys() & base_tpt.keys()),
        tpt_mean=mean_ratio(sums_of(tpt), sums_of(base_tpt)),
        tpt_mean_ci95=ratio_interval(sums_of(tpt), sums_of(base_tpt)),
        tpt_p99=p99_ratio(tpt, base_tpt),
        tpt_p99_ci95=p99_interval(tpt, base_tpt),
        ttft_mean=mean_ratio(sums_of(ttft), sums_of(base_ttft)),
        ttft_mean_ci95=ratio_interval(sums_of(ttft), sums_of(base_ttft)),
        ttft_p99=p99_ratio(ttft, base_ttft),
        ttft_p99_ci95=p99_interval(ttft, base_ttft),
        throughput=mean_ratio(cell.tokens_by_unit, base.tokens_by_unit),
        throughput_ci95=ratio_interval(cell.tokens_by_unit, base.tokens_by_unit),
        tpt_mean_by_repeat=[value for a, b in pairs if (value := ratio_of(a, b)) is not None],
    )


def _tpt_by_repeat(cell: SystemUnderLoad) -> list[float | None]:
    by_repeat: dict[int, list[float | None]] = defaultdict(list)
    for block in cell.blocks:
        by_repeat[block.key.repeat] += [done.tpt_ms for done in block.completions]
    return [distribution(by_repeat[repeat]).mean for repeat in sorted(by_repeat)]


def prompt_notes(cells: list[SystemUnderLoad], baseline: str) -> list[str]:
    """Of systems for which the same messages are another number of prompt tokens than for the baseline."""
    surplus: dict[str, list[int]] = defaultdict(list)
    for cell in cells:
        base = _of_system(baseline, cell, cells)
        if base is not None and base is not cell:
            theirs = {done.prompt_index: done.prompt_tokens for done in base.completions}
            for done in cell.completions:
                if done.prompt_tokens is not None and (known := theirs.get(done.prompt_index)) is not None:
                    surplus[cell.system.name].append(done.prompt_tokens - known)
    return [
        f"{name} reads other prompts than {baseline}, by {np.mean(more):+.1f} tokens on average: its chat template or "
        "its tokenizer is another one."
        for name, more in surplus.items()
        if any(more)
    ]
