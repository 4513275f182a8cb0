"""What a preparation is to do, and what its stages have made."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from apparate_llm.prepare.prompts import Messages
from apparate_llm.prepare.recorded import Recorded
from apparate_llm.prepare.records import CalibrationRecord, MeasuredRecord, SynthesisRecord, TrainingRecord
from apparate_llm.prepare.schedule import Schedule, WorkClock
from apparate_llm.prepare.store import RowStore
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.progress import Progress
from apparate_llm.ramps.checkpoint import BaseModelInfo


@dataclass(frozen=True, slots=True)
class Plan:
    model: Path
    out: Path
    depths: tuple[int, ...]
    aux_layers: tuple[int, ...]
    tokens: int | None  # answer tokens to synthesise, or
    time_budget_s: float | None
    seed: int
    ramp_vocab: int
    intermediate_size: int
    user_prompts: list[Messages] = field(default_factory=list)
    enforce_eager: bool = False  # profile without compilation
    verify: bool = False  # measure against plain vLLM at the end

    @property
    def states(self) -> tuple[int, ...]:
        """Depths whose residual stream is recorded."""
        return tuple(sorted({depth for depth in (*self.depths, *self.aux_layers) if depth > 0}))

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.tokens, self.time_budget_s, len(self.depths))


def automatic_depths(num_layers: int) -> tuple[int, ...]:
    """Right after the embedding, and a tenth of the model's depth: deeper draft steps cost more than they bring."""
    return (0, max(1, round(num_layers / 12)))[:num_layers]


def automatic_aux_layers(num_layers: int) -> tuple[int, ...]:
    return tuple(sorted({num_layers // 2, num_layers * 3 // 4} - {0}))


def automatic_intermediate_size(hidden_size: int) -> int:
    return math.ceil(hidden_size * 8 / 3 / 64) * 64


@dataclass(slots=True)
class Run:
    """What every stage needs."""

    plan: Plan
    workspace: Workspace
    store: RowStore
    base: BaseModelInfo
    clock: WorkClock
    progress: Progress
    begins_s: float = 0.0  # of the work clock: when laps began
    start_s: float = 0.0  # of the model, in its first lap; 0: not known
    row_s: float = 0.0  # of a pass, for each request in it, with as many as were measured; 0: not known
    trained_row_s: float = 0.0  # of a training, for each row and epoch; 0: not known

    @property
    def schedule(self) -> Schedule:
        return replace(self.plan.schedule, begins_s=self.begins_s, start_s=self.start_s)

    def say(self, text: str) -> None:
        self.progress.say(text)


@dataclass(slots=True)
class Made:
    """Results of the stages so far."""

    rows: SynthesisRecord
    trained: dict[int, TrainingRecord] = field(default_factory=dict)  # by depth, as all others
    measured: dict[int, MeasuredRecord] = field(default_factory=dict)
    calibration: dict[int, CalibrationRecord] = field(default_factory=dict)
    conversations: dict[int, list[Recorded]] = field(default_factory=dict)  # of the test split, to predict from
    outlook: str = ""
