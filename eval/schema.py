"""The JSON every evaluation writes."""

from typing import Any

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Distribution(_Strict):
    """Over requests; None where no request gave a value."""

    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None


class Exits(_Strict):
    held: int
    accepted: int
    released: int


class Run(_Strict):
    """One system at one concurrency, all repeats together."""

    system: str
    model: str
    concurrency: int
    tpt_ms: Distribution
    ttft_ms: Distribution
    output_tokens_per_s: float | None
    requests: int
    failed: int
    output_tokens: int
    exits: Exits | None  # None for a system without exits
    divergences: int | None
    identical_frac: float | None  # share of outputs equal to the baseline's, None for the baseline itself


class Ratio(_Strict):
    """`system` / `baseline`; below 1 is better, but for throughput."""

    system: str
    baseline: str
    concurrency: int
    tpt_mean: float | None
    tpt_p99: float | None
    throughput: float | None
    tpt_mean_by_repeat: list[float]


class Results(_Strict):
    schema_version: int = SCHEMA_VERSION
    command: str
    machine: dict[str, Any]
    runs: list[Run]
    ratios: list[Ratio]
