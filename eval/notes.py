"""What a reader should know before believing the figures."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from apparate_llm.eval.client import Sampling
from apparate_llm.eval.intervals import FEWEST
from apparate_llm.eval.prompt_lengths import length_of
from apparate_llm.eval.schema import Run
from apparate_llm.eval.store import Block
from apparate_llm.eval.systems import System
from apparate_llm.eval.workloads import Load

NOISY_RATIO = 1.25  # 90th over 10th percentile of the probe
NOISY_STOLEN_FRAC = 0.02


def notes_of(blocks: Sequence[Block], systems: list[System], loads: list[Load]) -> list[str]:
    notes = []
    if probes := [block.probe_ms for block in blocks]:
        low, high = np.percentile(probes, [10, 90])
        if high > NOISY_RATIO * low:
            notes.append(
                f"The machine was uneven: reading 64 MiB took {low:.1f} to {high:.1f} ms (10th to 90th percentile over "
                "the blocks). Ratios are of blocks side by side; absolute figures are worth less."
            )
        stolen = float(np.mean([block.stolen_frac for block in blocks]))
        if stolen > NOISY_STOLEN_FRAC:
            notes.append(f"{100 * stolen:.0f} % of the processor time was taken by other machines on the same host.")
    for system in systems:
        if system.max_concurrency is not None and any(load.concurrency != system.max_concurrency for load in loads):
            notes.append(
                f"{system.name} works on one request at a time: it is measured with one client, or not at all."
            )
    measured = {block.key.system for block in blocks}
    notes += cache_notes([system for system in systems if system.name in measured])
    if few := _too_few(blocks, loads):
        notes.append(
            f"No interval under {', '.join(few)}: it takes {FEWEST} blocks of either system, passes (--repeat) "
            "included, and two with different prompts."
        )
    failed = sum(done.error is not None for block in blocks for done in block.completions)
    if failed:
        notes.append(f"{failed} requests failed; they have no times and count as missed in goodput.")
    return notes


def dtype_notes(settings: Mapping[str, object]) -> list[str]:
    """Where servers have another one than vLLM takes by itself."""
    if "dtype" not in settings:
        return []
    return [
        f"Servers started here compute in {settings['dtype']}, as this CPU has no AVX-512. By itself vLLM takes 16 "
        "bits: with one client its tokens are faster then, first tokens and several clients slower."
    ]


def sampling_notes(sampling: Sampling) -> list[str]:
    if not sampling.temperature:
        return []
    notes = [f"Answers were drawn at temperature {sampling.temperature:g}: texts are not held against each other."]
    if sampling.seed is not None:
        notes.append("Requests had a seed, with which no exits are taken: so the same answers can be had again.")
    return notes


def cache_notes(systems: Sequence[System]) -> list[str]:
    warm = [system.name for system in systems if system.prefix_cache == "warm"]
    if not warm:
        return []
    return [
        f"Prefix caches of {', '.join(warm)} may be warm: these servers do not say that they are vLLM's, so their "
        "requests have no cache_salt, and a prompt that was asked before may not be computed again."
    ]


def _too_few(blocks: Sequence[Block], loads: list[Load]) -> list[str]:
    """Loads without intervals, with their blocks, of the system that has fewest."""
    short = []
    for number, load in enumerate(loads):
        of_systems: dict[str, list[int]] = defaultdict(list)
        for block in blocks:
            if block.key.load == number:
                of_systems[block.key.system].append(block.key.block)
        fewest = min(of_systems.values(), key=len, default=[])
        if 0 < len(fewest) < FEWEST:
            short.append(f"{load.name} ({len(fewest)} block{'s' * (len(fewest) > 1)})")
        elif fewest and len(set(fewest)) == 1:
            short.append(f"{load.name} (one block, {len(fewest)} times)")
    return short


def saturation_notes(runs: list[Run]) -> list[str]:
    """Whether the loads went up to where a system serves no more tokens per second; prompts of each length by
    themselves."""
    by_length: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if not run.fixed_length:
            by_length[run.system, length_of(run.load)].append(run)
    notes = []
    for (system, length), some in by_length.items():
        points = sorted(
            (run.concurrency, run.output_tokens_per_s)
            for run in some
            if run.concurrency is not None and run.output_tokens_per_s
        )
        if len(points) < 2:
            continue
        best_at, best = max(points, key=lambda item: item[1])
        rising = best_at == points[-1][0] and best > 1.1 * points[-2][1]
        ending = "still rising there" if rising else "saturated"
        loads = f"{best_at} clients{f', {length}' if length else ''}"
        notes.append(f"{system}: at most {best:.1f} output tokens/s, with {loads} ({ending}).")
    return notes
