"""What a preparation is to do, what it will take, and what its stages have made."""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from apparate_llm.prepare.engine import ELEMENT_SIZE
from apparate_llm.prepare.rows import bytes_per_row
from apparate_llm.prepare.synthesise import Messages
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.ramps.checkpoint import BaseModelInfo

GROUP_SIZE = 320  # conversations; what a kill can cost
MAX_ROWS_GIB = 6.0  # of training rows in memory; what is more stays unused
MOST_EPOCHS, FEWEST_EPOCHS = 3.0, 1.5  # of the first depth; the others start from it and take half as many
ENOUGH_ROWS = 1_280_000  # seen by then, more epochs overfit few rows and only cost time with many
TYPICAL_ANSWER_TOKENS = 150  # for the estimate of disk use


@dataclass(frozen=True, slots=True)
class Plan:
    model: Path
    out: Path
    depths: tuple[int, ...]
    inner: tuple[int, ...]
    tokens: int | None  # answer tokens to synthesise, or
    time_budget_s: float | None
    seed: int
    ramp_vocab: int
    intermediate_size: int
    user_prompts: list[Messages] = field(default_factory=list)
    enforce_eager: bool = False  # profile without compilation

    @property
    def states(self) -> tuple[int, ...]:
        """Depths whose residual stream is recorded."""
        return tuple(sorted({depth for depth in (*self.depths, *self.inner) if depth > 0}))


def automatic_depths(num_layers: int) -> tuple[int, ...]:
    """Right after the embedding, and a tenth of the model's depth: deeper rounds cost more than they bring."""
    return (0, max(1, round(num_layers / 12)))


def automatic_inner(num_layers: int) -> tuple[int, ...]:
    return (num_layers // 2, num_layers * 3 // 4)


def automatic_intermediate_size(hidden_size: int) -> int:
    return math.ceil(hidden_size * 8 / 3 / 64) * 64


@dataclass(slots=True)
class Run:
    """What every stage needs."""

    plan: Plan
    workspace: Workspace
    base: BaseModelInfo
    console: Console
    progress: Progress

    def say(self, text: str) -> None:
        self.console.print(text)


@dataclass(slots=True)
class Made:
    """Results of the stages so far."""

    rows: dict[str, Any]
    trained: dict[int, dict[str, Any]] = field(default_factory=dict)  # by depth
    calibration: dict[int, dict[str, Any]] = field(default_factory=dict)


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
        console=console,
    )


def disk_bytes(plan: Plan, base: BaseModelInfo, tokens: int) -> int:
    """Expected size of `out/work` with `tokens` answer tokens: rows, and a checkpoint of each depth's training."""
    rows = tokens * (1 + 1 / TYPICAL_ANSWER_TOKENS)
    text = tokens * 4 * 2
    parameters = (
        (1 + len(plan.inner)) * base.hidden_size**2
        + 3 * base.hidden_size**2
        + 3 * base.hidden_size * plan.intermediate_size
    )
    checkpoints = len(plan.depths) * (parameters * 4 * 4 + rows * 8)  # weights, two moments, best; order of the rows
    row = bytes_per_row(base.hidden_size, len(plan.states), ELEMENT_SIZE)
    return int(rows * row + text + checkpoints)


def say_needs(run: Run) -> None:
    plan = run.plan
    loaded = bytes_per_row(run.base.hidden_size, 1 + len(plan.inner), ELEMENT_SIZE)
    if plan.tokens is not None:
        tokens, need = plan.tokens, disk_bytes(plan, run.base, plan.tokens)
        memory = min(MAX_ROWS_GIB, tokens * loaded / 2**30)
        run.say(
            f"{tokens:,} answer tokens need {gib(need)} of disk in {plan.out / 'work'} and "
            f"{gib(memory * 2**30)} of memory for training rows"
        )
        _check_space(plan.out, need)
    else:
        per_million = disk_bytes(plan, run.base, 1_000_000)
        run.say(
            f"each million answer tokens needs {per_million / 2**30:.1f} GiB of disk in {plan.out / 'work'}; "
            f"training keeps at most {MAX_ROWS_GIB:.0f} GiB of rows in memory"
        )


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _check_space(out: Path, need: int) -> None:
    have = sum(path.stat().st_size for path in (out / "work").iterdir() if path.is_file())
    free = shutil.disk_usage(out).free
    if need - have > free:
        raise ValueError(f"not enough disk space in {out}: {gib(need)} needed, {gib(free)} free")


def group_size(plan: Plan) -> int:
    if plan.tokens is None:
        return GROUP_SIZE
    return max(8, min(GROUP_SIZE, plan.tokens // (4 * TYPICAL_ANSWER_TOKENS)))


def epochs_for(tokens: int) -> float:
    return round(min(MOST_EPOCHS, max(FEWEST_EPOCHS, ENOUGH_ROWS / tokens)), 2)
