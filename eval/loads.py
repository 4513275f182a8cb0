"""What is asked of a server and when: closed loops of clients, or arrivals by time."""

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from apparate_llm.eval.client import Ask
from apparate_llm.eval.prompts import Prompt

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")  # as in Azure's LLM inference traces
CHARACTERS_PER_TOKEN = 4  # rough; only to pick a prompt of about the traced length


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    blocks: tuple[tuple[Ask, ...], ...]  # the systems take turns block by block
    concurrency: int | None = None  # clients of a closed loop; None: every request at its own time
    fixed_length: bool = False


def closed(num_prompts: int, concurrency: int, *, max_tokens: int, fixed_length: bool) -> Load:
    """`concurrency` clients, each sending its next request when it has its answer."""
    asks = [Ask(index, max_tokens) for index in range(num_prompts)]
    size = block_size(concurrency)
    blocks = tuple(tuple(asks[start : start + size]) for start in range(0, num_prompts, size))
    return Load(f"{concurrency} client{'s' * (concurrency > 1)}", blocks, concurrency, fixed_length)


def block_size(concurrency: int) -> int:
    """Short enough to interleave closely, long enough to keep all clients busy most of the time."""
    return max(4, 2 * concurrency)


def poisson(num_prompts: int, rate_per_s: float, *, max_tokens: int, fixed_length: bool, seed: int) -> Load:
    """Arrivals without memory, the same ones for every system."""
    gaps = np.random.default_rng(seed).exponential(1 / rate_per_s, num_prompts)
    asks = tuple(Ask(index, max_tokens, float(at_s)) for index, at_s in enumerate(np.cumsum(gaps) - gaps[0]))
    return Load(f"{rate_per_s:g} requests/s", (asks,), None, fixed_length)


def traced(path: Path, prompts: list[Prompt], *, scale: float, num_requests: int, max_tokens: int) -> Load:
    """Arrivals and answer lengths of a trace, its times multiplied by `scale`; each request takes the prompt whose
    length is nearest to the traced one, and is made to answer with the traced number of tokens, at most `max_tokens`.

    Raises ValueError naming the file and line of what is wrong.
    """
    lengths = np.array([len(prompt.messages[-1]["content"]) / CHARACTERS_PER_TOKEN for prompt in prompts])
    used = np.zeros(len(prompts))
    asks: list[Ask] = []
    first: datetime | None = None
    for number, (at, context, generated) in enumerate(_trace_rows(path, num_requests), 2):
        first = first or at
        at_s = (at - first).total_seconds() * scale
        if asks and at_s < (asks[-1].at_s or 0.0):
            raise ValueError(f"{path}:{number}: arrivals must be in order of time")
        # A prompt that was used already must be that much nearer, so that few are asked twice.
        index = int(np.argmin(np.abs(np.log(lengths / max(context, 1))) + used))
        used[index] += 1.0
        asks.append(Ask(index, min(max(generated, 1), max_tokens), at_s))
    return Load(f"{path.stem}, time x {scale:g}", (tuple(asks),), None, fixed_length=True)


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
                    rows.append((at, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
                except (ValueError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read trace {path}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no requests in this trace")
    return rows
