"""Memory and disk that a preparation needs, said before it begins, and what is done with less."""

import contextlib
import ctypes
import gc
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from apparate_llm.host.dtype import DEFAULT_KV_CACHE_BYTES, element_size
from apparate_llm.machine import available_memory_bytes
from apparate_llm.models.quantised_heads import has_fast_int8
from apparate_llm.prepare.engine import MAX_NUM_BATCHED_TOKENS, context_length, kv_bytes_per_token
from apparate_llm.prepare.plan import Plan, Run
from apparate_llm.prepare.profile import KV_CACHE_TOKENS
from apparate_llm.prepare.rows import bytes_per_row
from apparate_llm.prepare.train import BATCH_ROWS
from apparate_llm.progress import time_span
from apparate_llm.ramps.checkpoint import BaseModelInfo

JOINED = re.compile(r"\b(?:([qkv])|gate|up)_proj\b")
TABLES = ("embed_tokens.weight", "lm_head.weight", "tok_embeddings.weight", "output.weight")
MAX_ANSWER_TOKENS = 256
MOST_SLOTS, FEWEST_SLOTS = 128, 8  # conversations at once
MOST_KV_BYTES = 2 << 30
TOKENS_PER_SLOT = 512  # of the KV cache, for a prompt and its answer
TYPICAL_ANSWER_TOKENS = 150
PROCESS_BYTES = 700 << 20  # Python, torch, vLLM
ROWS_UNDER_WAY = 96  # of a slot: what is not in the store yet
SCORE_COPIES = 12  # of all slots' scores in float32, while tokens are drawn and the best ones kept
KEPT_COPIES = 40  # of those that glibc keeps when they are freed, with rows between them
KEPT_BYTES = 32 << 20  # larger ones, of whatever kind, it gives back at once
NUM_SERVERS = 2  # beside each other, to verify
STEPS_IN_MEMORY = 3  # draft steps of a training batch
SPARE_FRAC = 0.1  # of free memory and disk stays free
SPARE_DISK_BYTES = 256 << 20
LEAST_S, LEAST_S_PER_GB = 150.0, 70.0  # of a preparation: starts, and a few steps of each stage
FEWEST_CONTEXT = 64  # tokens of a conversation


@dataclass(frozen=True, slots=True)
class SynthesisLimits:
    """What the synthesis may take."""

    slots: int
    kv_cache_bytes: int
    disk_is_full: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model, in bytes unless said otherwise."""

    layers: int
    table: int  # embedding or head
    tables: int  # that the model has in memory: 1 where the head is the embedding
    kv_per_token: int
    vocab: int  # tokens
    hidden: int
    intermediate: int
    value: int  # that is computed with
    twice: int  # of the layers, what stays with malloc once it is packed

    @classmethod
    def of(cls, model: Path, base: BaseModelInfo) -> "Sizes":
        config, value = json.loads((model / "config.json").read_text()), element_size(model)
        layers = [number * value for number in _layer_parameters(model)]
        return cls(
            value=value,
            layers=sum(layers),
            twice=sum(size for size in layers if size < KEPT_BYTES),
            table=base.vocab_size * base.hidden_size * value,
            tables=1 if config.get("tie_word_embeddings", False) else 2,
            kv_per_token=kv_bytes_per_token(model),
            vocab=base.vocab_size,
            hidden=base.hidden_size,
            intermediate=config.get("intermediate_size") or 4 * base.hidden_size,
        )


def _layer_parameters(model: Path) -> list[int]:
    """Of each tensor in vLLM, which joins some of them: all but embedding and head."""
    from safetensors import safe_open

    from apparate_llm.ramps.fingerprint import weight_files

    numbers: dict[str, int] = {}
    for file in weight_files(model):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if not name.endswith(TABLES)]  # noqa: SIM118 - it is no mapping
            for name in names:
                joined = JOINED.sub(_joined_name, name)
                numbers[joined] = numbers.get(joined, 0) + math.prod(tensors.get_slice(name).get_shape())
    return [*numbers.values()]


def _joined_name(match: re.Match[str]) -> str:
    return "qkv" if match[1] else "gate_up"


def answer_limit(context: int) -> int:
    return min(MAX_ANSWER_TOKENS, context // 2)


def kv_cache_bytes(sizes: Sizes, slots: int, context: int) -> int:
    """For all slots, and for one conversation as long as the context at least."""
    return min(
        max(MOST_KV_BYTES, context * sizes.kv_per_token), max(slots * TOKENS_PER_SLOT, context) * sizes.kv_per_token
    )


def synthesis_bytes(plan: Plan, sizes: Sizes, slots: int) -> int:
    """Peak of the process while the model writes."""
    batch = MAX_NUM_BATCHED_TOKENS * (4 * sizes.hidden + 2 * sizes.intermediate) * sizes.value
    scores = slots * sizes.vocab * 4
    copies = KEPT_COPIES if scores < KEPT_BYTES else SCORE_COPIES
    row = bytes_per_row(sizes.hidden, len(plan.states), sizes.value)
    kv = kv_cache_bytes(sizes, slots, context_length(plan.model))
    return PROCESS_BYTES + loaded_bytes(sizes) + kv + batch + copies * scores + slots * ROWS_UNDER_WAY * row


def loaded_bytes(sizes: Sizes) -> int:
    """Weights in vLLM. On a CPU it packs what it multiplies with. What was loaded goes, but for the embedding, and for
    what malloc keeps of small tensors."""
    return sizes.layers + sizes.twice + (sizes.tables + 1) * sizes.table


def screened_bytes(sizes: Sizes) -> int:
    """The int8 copy of the head in an engine that serves exits (models/screened_head.py). The synthesis has none: its
    engine runs vLLM's own worker."""
    return sizes.table // sizes.value if has_fast_int8() else 0


def profile_bytes(sizes: Sizes) -> int:
    """Peak of this process and the one that measures costs."""
    served = loaded_bytes(sizes) + screened_bytes(sizes) + KV_CACHE_TOKENS * sizes.kv_per_token
    return 2 * PROCESS_BYTES + sizes.tables * sizes.table + served


def verification_bytes(sizes: Sizes) -> int:
    """Peak of this process and of the two servers that `--verify` starts: an API and an engine each, one with exits."""
    kv = min(DEFAULT_KV_CACHE_BYTES, available_memory_bytes() // (4 * NUM_SERVERS))
    return PROCESS_BYTES + NUM_SERVERS * (2 * PROCESS_BYTES + loaded_bytes(sizes) + kv) + screened_bytes(sizes)


def head_parameters(plan: Plan, sizes: Sizes) -> int:
    """Of one ramp that are trained."""
    hidden = sizes.hidden
    return (4 + len(plan.aux_layers)) * hidden**2 + 3 * hidden * plan.intermediate_size


def training_bytes(plan: Plan, sizes: Sizes) -> int:
    """Peak of the process while it trains: weights, gradient, two moments, the best ones, a copy to measure with, and
    a batch; rows stay on disk."""
    parameters = head_parameters(plan, sizes)
    scores = STEPS_IN_MEMORY * BATCH_ROWS * plan.ramp_vocab * 3 * sizes.value
    widened = sizes.table if sizes.value > 2 else 0  # the embedding, as rows are
    return (
        PROCESS_BYTES
        + sizes.tables * sizes.table
        + widened
        + parameters * (5 * 4 + sizes.value)
        + plan.ramp_vocab * sizes.hidden * (4 + sizes.value)
        + scores
    )


def disk_bytes(plan: Plan, base: BaseModelInfo, tokens: float) -> int:
    """Expected size of `out/work` with `tokens` answer tokens: rows, and a checkpoint of each depth's training."""
    sizes = Sizes.of(plan.model, base)
    rows = tokens * (1 + 1 / TYPICAL_ANSWER_TOKENS)
    text = tokens * 4 * 2
    checkpoints = len(plan.depths) * (head_parameters(plan, sizes) * 4 * 5 + rows * 8)  # order of the rows
    return int(rows * bytes_per_row(sizes.hidden, len(plan.states), sizes.value) + text + checkpoints)


def synthesis_limits(run: Run) -> SynthesisLimits:
    """As many conversations at once as memory is free for; raises ValueError if there is not enough for a few."""
    sizes, free = Sizes.of(run.plan.model, run.base), available_memory_bytes() * (1 - SPARE_FRAC)
    slots = MOST_SLOTS
    while slots > FEWEST_SLOTS and synthesis_bytes(run.plan, sizes, slots) > free:
        slots //= 2
    _check_memory(synthesis_bytes(run.plan, sizes, slots))
    context = context_length(run.plan.model)
    return SynthesisLimits(slots, kv_cache_bytes(sizes, slots, context), lambda: disk_left(run) <= 0)


def disk_left(run: Run) -> int:
    """Bytes for more rows: what training still has to write, and some to spare, stays free."""
    sizes = Sizes.of(run.plan.model, run.base)
    training = len(run.plan.depths) * (head_parameters(run.plan, sizes) * 4 * 7 + run.store.counts["rows"] * 8)
    return shutil.disk_usage(run.plan.out).free - training - SPARE_DISK_BYTES


def say_needs(run: Run) -> None:
    """Raises ValueError if memory or disk cannot do, or the model's context."""
    plan, sizes = run.plan, Sizes.of(run.plan.model, run.base)
    if (context := context_length(plan.model)) < FEWEST_CONTEXT:
        raise ValueError(f"the model's context of {context} tokens is too short, {FEWEST_CONTEXT} are needed")
    limits = synthesis_limits(run)
    peak = max(synthesis_bytes(plan, sizes, limits.slots), training_bytes(plan, sizes), profile_bytes(sizes))
    if plan.verify:
        peak = max(peak, verification_bytes(sizes))
    _check_memory(peak)
    run.say(f"peak memory about {gib(peak)}; {gib(available_memory_bytes())} are free")
    _say_time(run, sizes)
    if plan.tokens is not None:
        need, work = disk_bytes(plan, run.base, plan.tokens), plan.out / "work"
        run.say(f"{plan.tokens:,} answer tokens need {gib(need)} of disk in {work}")
        free = shutil.disk_usage(plan.out).free + run.store.size()
        if need > free:
            raise ValueError(f"not enough disk space in {plan.out}: {gib(need)} needed, {gib(free)} free")
        return
    least = disk_bytes(plan, run.base, 0)
    million = disk_bytes(plan, run.base, 1_000_000) - least
    left = disk_left(run)
    if left <= 0 and not run.store.counts["rows"]:
        raise ValueError(
            f"not enough disk space in {plan.out}: {gib(shutil.disk_usage(plan.out).free)} free, at least "
            f"{gib(shutil.disk_usage(plan.out).free - left)} needed"
        )
    run.say(
        f"each million answer tokens needs {gib(million)} of disk in {plan.out / 'work'}; there is room for "
        f"{max(0.0, left / million):.1f} million"
    )


def _say_time(run: Run, sizes: Sizes) -> None:
    """Where a budget cannot be kept."""
    least_s = LEAST_S + LEAST_S_PER_GB * (sizes.layers + sizes.tables * sizes.table) / 1e9
    budget_s = run.plan.time_budget_s
    if budget_s is not None and budget_s < least_s and not run.store.counts["rows"]:
        run.say(
            f"a time budget of {time_span(budget_s)} is short for this model: about {time_span(least_s)} will be needed"
        )


def _check_memory(need: int) -> None:
    if need > (free := available_memory_bytes()):
        raise ValueError(f"not enough memory: about {gib(need)} needed, {gib(free)} free")


def give_back_memory() -> None:
    """What is not in use any more: of an engine, which what listens in on it refers to and is referred to by, and of a
    training."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library of another kind
        ctypes.CDLL(None).malloc_trim(0)


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
