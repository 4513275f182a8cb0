"""What is asked of a server and when: closed loops of clients, or arrivals by time."""

import csv
import itertools
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np

from apparate_llm.eval.client import PlannedRequest, Uncounted
from apparate_llm.eval.prompts import NUM_HELD_OUT, Prompt

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")  # as in Azure's LLM inference traces
MOST_TOKENS = 10**9  # of a prompt or an answer in a trace: more is as much
CHARACTERS_PER_TOKEN = 4  # rough; only to pick a prompt of about the traced length
SHORTEST_FRAC = 0.25  # of the longest answer, where lengths vary
SLICE_S = 20.0  # of arrivals, after which the next system has its turn
LEAD_IN_S = 10.0  # of arrivals before those that count: longer than an answer, so that as many are under way as later

# Answers end by themselves or at the longest length, always at that, or by themselves or at varied output lengths.
Length = Literal["free", "fixed", "varied"]


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    blocks: tuple[tuple[PlannedRequest, ...], ...]  # the systems are interleaved block by block
    concurrency: int | None = None  # clients of a closed loop; None: every request at its own time
    fixed_length: bool = False
    uncounted: tuple[Uncounted, ...] = ()  # around each block; prompts from `num_prompts` on are the held-out ones


def closed(num_prompts: int, concurrency: int, *, max_tokens: int, length: Length, seed: int = 0) -> Load:
    """`concurrency` clients, each sending its next request when it has its answer.

    None of them is idle while requests that count are under way. All but the first begin with an answer that does not
    count, each a little longer than the one before, so that they are not synchronised. They go on asking what the
    block has asked until the last that counts has ended.
    """
    asks = [PlannedRequest(index, most) for index, most in enumerate(lengths_of(num_prompts, max_tokens, length, seed))]
    size = block_size(concurrency)
    blocks = tuple(tuple(asks[start : start + size]) for start in range(0, num_prompts, size))
    held_out = tuple(PlannedRequest(num_prompts + index, max_tokens) for index in range(NUM_HELD_OUT))
    uncounted = tuple(
        Uncounted(_out_of_step(before, concurrency), block)
        for before, block in zip((held_out, *blocks), blocks, strict=False)
    )
    name = _name(f"{concurrency} client{'s' * (concurrency > 1)}", length)
    return Load(name, blocks, concurrency, length == "fixed", uncounted)


def block_size(concurrency: int) -> int:
    """Small, as blocks are what intervals are over, and systems are interleaved closely."""
    return max(2, concurrency)


def _out_of_step(asks: tuple[PlannedRequest, ...], concurrency: int) -> tuple[PlannedRequest, ...]:
    """Of each client but the first: what was asked before, cut off after its share of the longest answer."""
    few = [asks[client % len(asks)] for client in range(1, concurrency)]
    return tuple(
        ask._replace(max_tokens=math.ceil(ask.max_tokens * client / concurrency)) for client, ask in enumerate(few, 1)
    )


def poisson(
    num_prompts: int, rate_per_s: float, *, max_tokens: int, length: Length, seed: int, slice_s: float = SLICE_S
) -> Load:
    """Arrivals without memory, the same ones for every system."""
    gaps = np.random.default_rng(seed).exponential(1 / rate_per_s, num_prompts)
    arrivals, lengths = np.cumsum(gaps) - gaps[0], lengths_of(num_prompts, max_tokens, length, seed)
    asks = [PlannedRequest(i, most, float(at_s)) for i, (at_s, most) in enumerate(zip(arrivals, lengths, strict=True))]
    blocks, uncounted = _sliced(asks, slice_s, num_prompts)
    return Load(_name(f"{rate_per_s:g} requests/s", length), blocks, None, length == "fixed", uncounted)


def _sliced(
    asks: list[PlannedRequest], slice_s: float, num_prompts: int
) -> tuple[tuple[tuple[PlannedRequest, ...], ...], tuple[Uncounted, ...]]:
    """Arrivals in slices of time, each a block, with times from its lead-in on: what arrived in the seconds before,
    and does not count. Before the first slice held-out prompts arrive as those of the first seconds do. After a slice
    its arrivals come again, every `slice_s` seconds, until the last that counts has ended."""
    first = [ask for ask in asks if ask.arrival_s < LEAD_IN_S]
    earlier = [
        PlannedRequest(num_prompts + number % NUM_HELD_OUT, ask.max_tokens, ask.arrival_s - LEAD_IN_S)
        for number, ask in enumerate(first)
    ]
    blocks, uncounted = [], []
    for number, group in itertools.groupby(asks, key=lambda ask: int(ask.arrival_s / slice_s)):
        began_s = number * slice_s - LEAD_IN_S
        counted = tuple(_later(ask, -began_s) for ask in group)
        lead_in = [ask for ask in (*earlier, *asks) if began_s <= ask.arrival_s < began_s + LEAD_IN_S]
        blocks.append(counted)
        uncounted.append(Uncounted(tuple(_later(ask, -began_s) for ask in lead_in), counted, slice_s))
    return tuple(blocks), tuple(uncounted)


def _later(ask: PlannedRequest, seconds: float) -> PlannedRequest:
    return ask._replace(at_s=ask.arrival_s + seconds)


def lengths_of(num_prompts: int, max_tokens: int, length: Length, seed: int) -> list[int]:
    """Longest answer to each prompt, the same ones for every system.

    Clients that begin together and whose answers are cut off at one length are synchronised, all prompts at once and
    then all tokens, for as long as a server gives every answer a token a step. A server that does not is then compared
    with an order that no real clients keep. Varied lengths, uniform from a quarter of the longest, break it for both.
    """
    if length != "varied":
        return [max_tokens] * num_prompts
    shortest = math.ceil(SHORTEST_FRAC * max_tokens)
    drawn = np.random.default_rng(seed).integers(shortest, max_tokens, num_prompts, endpoint=True)
    return [int(number) for number in drawn]


def _name(load: str, length: Length) -> str:
    return f"{load}, varied lengths" if length == "varied" else load


def traced(
    path: Path, prompts: list[Prompt], *, scale: float, num_requests: int, max_tokens: int, slice_s: float = SLICE_S
) -> Load:
    """Arrivals and answer lengths of a trace, its times multiplied by `scale`; each request takes the prompt whose
    length is nearest to the traced one, and is made to answer with the traced number of tokens, at most `max_tokens`.

    Raises ValueError naming the file and line of what is wrong.
    """
    lengths = np.array([max(len(prompt.asked), 1) / CHARACTERS_PER_TOKEN for prompt in prompts])
    used = np.zeros(len(prompts))
    asks: list[PlannedRequest] = []
    first: datetime | None = None
    for number, (at, context, generated) in enumerate(_trace_rows(path, num_requests), 2):
        first = first or at
        if (at.tzinfo is None) != (first.tzinfo is None):
            raise ValueError(f"{path}:{number}: a time zone in some lines and none in others")
        at_s = (at - first).total_seconds() * scale
        if asks and at_s < (asks[-1].at_s or 0.0):
            raise ValueError(f"{path}:{number}: arrivals must be in order of time")
        # A prompt that was used already must be that much nearer, so that few are asked twice.
        index = int(np.argmin(np.abs(np.log(lengths / max(context, 1))) + used))
        used[index] += 1.0
        asks.append(PlannedRequest(index, min(max(generated, 1), max_tokens), at_s))
    blocks, uncounted = _sliced(asks, slice_s, len(prompts))
    return Load(f"{path.stem}, time x {scale:g}", blocks, None, True, uncounted)


def _trace_rows(path: Path, num_requests: int) -> list[tuple[datetime, int, int]]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{path}: not a trace: columns {', '.join(TRACE_COLUMNS)} wanted, no {missing[0]}")
            rows: list[tuple[datetime, int, int]] = []
            for number, row in enumerate(reader, 2):
                if len(rows) == num_requests:
                    break
                try:
                    # Python reads six digits of a second, the traces have seven.
                    at = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
                    context, generated = (min(int(row[name]), MOST_TOKENS) for name in TRACE_COLUMNS[1:])
                    rows.append((at, context, generated))
                except (ValueError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read trace {path}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no requests in this trace")
    return rows
