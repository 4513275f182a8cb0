"""Times that were measured, turn by turn: what they say, and how far it may be off."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from apparate_llm.files import write_atomically
from apparate_llm.prepare.records import Profiled

Key = tuple[Any, ...]  # what was timed, and with what numbers
Turns = dict[Key, list[list[float]]]  # ms
KEYS = {"plain": 1, "verify": 1, "pass": 2, "prompt": 1, "draft_step": 2}  # what was timed -> how many numbers
WARM_UP, FEWEST_STEPS = 2, 4
UNKNOWN_ERROR_FRAC = 0.1  # where there was one turn only
KNOWN_FRAC = 0.05  # two turns that agree so well are enough: simulations are off by as much


class Kept(NamedTuple):
    """What earlier starts measured, and for how long."""

    turns: Turns
    spent_s: float
    num_sizes: int | None = None  # the first ones, that there is time for; None: all


def kept_in(file: Path) -> Kept:
    """Raises ValueError for a damaged file."""
    if not file.is_file():
        return Kept({}, 0.0)
    try:
        kept = json.loads(file.read_bytes())
        turns = {_key(key): [_times(spent_ms) for spent_ms in turns] for key, turns in kept["turns"]}
        if not all(turns.values()):
            raise ValueError("a key without a turn")
        num_sizes = kept.get("num_sizes")
        if num_sizes is not None and (type(num_sizes) is not int or num_sizes < 1):
            raise ValueError(f"num_sizes must be a number of sizes, got {num_sizes!r}")
        return Kept(turns, float(kept["spent_s"]), num_sizes)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise ValueError(f"damaged {file}: {error!r}; delete it, and costs are measured anew") from None


def _key(key: list[object]) -> Key:
    kind, *numbers = key
    if not isinstance(kind, str) or KEYS.get(kind) != len(numbers) or not all(type(one) is int for one in numbers):
        raise ValueError(f"a key must be one of {', '.join(KEYS)} and its numbers, got {key!r}")
    return (kind, *numbers)


def _times(spent_ms: list[object]) -> list[float]:
    times = [float(ms) for ms in spent_ms if isinstance(ms, int | float)]
    if not times or len(times) < len(spent_ms) or not all(0 < ms < math.inf for ms in times):
        raise ValueError(f"times of a turn must be ms, got {spent_ms!r:.80}")
    return times


class Measurements:
    """Times in ms by what took them: ("plain", requests), ("verify", requests), ("pass", requests, rows), ("prompt",
    tokens), ("draft_step", depth, requests).

    limit_s: what may be spent on them, from now on and by earlier starts. keep: a file that they go on from; raises
    ValueError for a damaged one.
    """

    def __init__(self, limit_s: float, *, keep: Path | None = None) -> None:
        self.limit_s, self.file = limit_s, keep
        self.turns, self.before_s, self.num_sizes = Kept({}, 0.0) if keep is None else kept_in(keep)
        self.began_s = time.monotonic()

    def keep(self) -> None:
        if self.file is not None:
            kept = {"spent_s": self.spent_s, "num_sizes": self.num_sizes, "turns": list(self.turns.items())}
            write_atomically(self.file, json.dumps(kept).encode(), private=True)

    def has(self, turn: int, *key: str | int) -> bool:
        """Whether these were measured in a turn, counted from 0."""
        return len(self.turns.get(key, [])) > turn

    def add(self, key: Key, spent_ms: list[float]) -> None:
        if spent_ms:
            self.turns.setdefault(key, []).append(spent_ms)

    def add_plain(self, size: int, spent_ms: list[float]) -> None:
        """Beside the first turn with so many requests, of the same start: only those are compared."""
        self.turns["plain", size] = [spent_ms]

    @property
    def spent_s(self) -> float:
        return self.before_s + time.monotonic() - self.began_s

    @property
    def left_s(self) -> float:
        return self.limit_s - self.spent_s

    def is_known(self, *key: str | int) -> bool:
        """Whether another turn would tell nothing new."""
        return self._off_frac(key) <= KNOWN_FRAC

    def size_is_known(self, size: int) -> bool:
        """All that was measured with so many requests."""
        return all(self.is_known(*key) for key in self.turns if _size_of(key) == size)

    def of(self, *key: str | int) -> float:
        """The median of the quietest turn: what else runs on a machine makes all of a turn slower, and comes and
        goes."""
        return round(min(map(median, self.turns[key])), 4)

    def result(self, depths: list[int]) -> Profiled:
        sizes = sorted(key[1] for key in self.turns if key[0] == "verify")
        passes: dict[str, dict[str, float]] = {str(size): {} for size in sizes}
        for key in sorted(key for key in self.turns if key[0] == "pass"):
            passes[str(key[1])][str(key[2])] = self.of(*key)
        return {
            "verify_ms": {str(size): self.of("verify", size) for size in sizes},
            "pass_ms": passes,
            "prompt_ms": {str(key[1]): self.of(*key) for key in sorted(self.turns) if key[0] == "prompt"},
            "plain_frac": self.plain_frac(),
            "draft_step_ms": {
                str(depth): {str(size): self.of("draft_step", depth, size) for size in sizes} for depth in depths
            },
            "error_frac": {kind: self.error_frac(kind) for kind in ("verify", "pass", "prompt", "draft_step")},
        }

    def plain_frac(self) -> float:
        """Passes as plain vLLM's / as ours, each of one turn and start: what else ran then made both slower."""
        times = [
            median(plain_ms) / median(ours_ms)
            for kind, *size in self.turns
            if kind == "plain"
            for plain_ms, ours_ms in zip(
                self.turns["plain", *size], self.turns.get(("verify", *size), []), strict=False
            )
        ]
        return round(max(1.0, median(times)), 4) if times else 1.0

    def error_frac(self, kind: str) -> float:
        """By how much these medians may be off (95 %): how far the two quietest turns differ, on average."""
        off = [self._off_frac(key) for key, turns in self.turns.items() if key[0] == kind and len(turns) > 1]
        return round(sum(off) / len(off), 4) if off else UNKNOWN_ERROR_FRAC

    def _off_frac(self, key: Key) -> float:
        """How far the two quietest turns differ."""
        medians = sorted(map(median, self.turns.get(key, [])))
        return medians[1] / medians[0] - 1.0 if len(medians) > 1 else math.inf


def _size_of(key: Key) -> int | None:
    """Requests of a key that is measured turn by turn with them."""
    return {"verify": key[1], "pass": key[1], "draft_step": key[-1]}.get(key[0])


def times_ms(work: Callable[[], object], times: int, most_s: float = math.inf) -> list[float]:
    """Of `times` calls, after some that are not counted: the first at a batch size makes its kernels. Of fewer where
    all of them take more than `most_s`."""
    spent: list[float] = []
    while len(spent) < WARM_UP + times:
        began = time.perf_counter()
        work()
        spent.append((time.perf_counter() - began) * 1e3)
        if sum(spent) > 1e3 * most_s and len(spent) >= WARM_UP + FEWEST_STEPS:
            break
    return spent[WARM_UP:]
