"""What the stages of a preparation leave as JSON, for the next start, the manifest and the report."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

Ms = dict[str, float]  # by number of requests, rows or tokens


class SynthesisRecord(TypedDict):
    """What there is at the end of a lap."""

    rows: int
    tokens: int  # of answers
    seconds: int  # of the work clock
    disk_is_full: NotRequired[bool]  # it ended so; never on disk, as a later start goes on


class StartRecord(TypedDict):
    """How long the model took to start, after what it imports."""

    seconds: float  # the fastest
    number: int
    first_s: float  # in the first lap; 0: it was started in a later one only


class HeadRecord(TypedDict):
    """How a head was trained."""

    rows: int
    steps: int
    seconds: int
    validation_accepted_per_step: float
    evaluated_rows: NotRequired[int | None]  # in one evaluation; None: there were no validation rows
    evaluate_s: NotRequired[float]  # it took; neither is in older records


class TrainingRecord(HeadRecord):
    """Of one depth."""

    train_accepted_per_step: float  # on rows that it was trained on
    settings: str


class MeasuredRecord(TypedDict):
    """A trained head on test conversations."""

    held_out_accepted_per_step: float
    acceptance_rates: list[float]  # by position
    vocabulary_coverage: float
    ceiling: dict[str, float]


class CalibrationRecord(TypedDict):
    """Fitted on validation conversations, measured on test conversations."""

    calibration: list[tuple[float, float]]  # of each position: scale, offset
    acceptance_rates: list[float | None]
    rows: list[int]
    calibration_error: float
    reliability: list[tuple[float, float, int]]  # mean probability, agreement, rows
    coverage: list[tuple[float, float]]  # share of rows that exit, and whose exit is a divergence
    by_kind: dict[str, float]


class Profiled(TypedDict):
    """What a server pays on a machine, in ms; see `profile.profile`."""

    verify_ms: Ms
    pass_ms: dict[str, Ms]
    prompt_ms: Ms
    plain_frac: float
    draft_step_ms: dict[str, Ms]  # by depth
    error_frac: dict[str, float]  # by kind
    threads: NotRequired[int]
    machine: NotRequired[dict[str, object]]
    until_s: NotRequired[float]  # of the work clock, when they were known; not in the report
    trained_row_s: NotRequired[float]  # of a training, for each row and epoch; neither in the report, nor in older ones


class TptRatio(TypedDict):
    """Time per output token with exits / without; None: not known."""

    tpt_ratio: float | None
    ci95: Sequence[float] | None


class Predicted(TptRatio):
    """With one number of clients."""

    plain_ms: float | None
    ours_ms: float | None
    by_kind: dict[str, TptRatio]  # of prompt
    users: NotRequired[TptRatio]  # expected on users' prompts


class MeasuredRatio(TptRatio):
    """With one number of clients."""

    ours_ms: float | None
    plain_ms: float | None
    by_repeat: list[float]


class ComparedRatio(TypedDict):
    """A prediction and what was measured, with one number of clients."""

    predicted: TptRatio
    measured: TptRatio
    within: bool | None  # whether the interval of the one holds the other; None: not known
    off_frac: float | None  # by how much of the prediction the measurement differs from it


class Comparison(TypedDict):
    num_prompts: int
    prompts_of: str  # whose
    max_tokens: int
    clients: dict[str, ComparedRatio]


class Verified(Comparison):
    sentence: str


class FolderVerified(Verified):
    """Of any ramp folder."""

    schema_version: int
    model: str
    depth: int
    acceptance_rates: list[float | None]  # by position
    profile: Profiled


class PositionReport(TypedDict):
    position: int
    acceptance_rate: float | None
    rows: int


class DepthReport(TypedDict):
    depth: int
    positions: list[PositionReport]
    accepted_per_step: float
    calibration_error: float
    reliability: list[tuple[float, float, int]]
    coverage: list[tuple[float, float]]
    by_kind: dict[str, float]
    vocabulary_coverage: float
    training: dict[str, object]  # of its record
    predicted: dict[str, Predicted]  # by clients


class Advice(TypedDict):
    depth: int
    sentence: str


class Report(TypedDict):
    """report.json."""

    schema_version: int
    model: str
    base_model: dict[str, object]
    answer_tokens: int
    synthesis_seconds: int
    ceiling: dict[str, float]
    profile: Profiled
    predicted_for: dict[str, str]  # `own`, `users`: for whose prompts
    depths: list[DepthReport]
    advice: Advice
    verified: NotRequired[Verified]
