"""The JSON every evaluation writes. Times are ms, shares lie in [0, 1], unknown is null."""

from typing import Any

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1  # keys are only ever added


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Distribution(_Strict):
    """Over requests; None where no request gave a value."""

    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    mean_ci95: tuple[float, float] | None = None  # over blocks; over requests in results without `Ratio.units`


class Exits(_Strict):
    """What the server counted during the run."""

    held: int
    accepted: int
    released: int
    unverified: int  # released, and their request ended before their verdict
    by_depth: dict[str, int]  # depth -> exits that were emitted


class Quality(_Strict):
    """Against the baseline's answers to the same prompts, and against the prompt file's references."""

    identical_frac: float | None  # the very same text
    first_difference_tokens: float | None  # median over answers that differ: tokens before they do
    rouge_l_baseline: float | None  # ROUGE-L F-measure, mean
    rouge_l_reference: float | None  # prompts with a reference
    same_number_frac: float | None  # final number as in the baseline's answer; prompts about maths
    right_number_frac: float | None  # final number as in the reference; prompts about maths with a reference
    code_passed_frac: float | None  # prompts with tests


class TimelinePoint(_Strict):
    """After one more block of requests."""

    phase: str  # of the prompts, one name if there is only one set
    output_tokens: int  # so far, of requests that do not count as well
    divergence_frac: float | None  # of the tokens so far
    block_divergence_frac: float | None  # of this block's tokens
    divergences_at_worst_frac: float | None = None  # of the tokens so far, exits without a verdict included
    tpt_ms: float | None  # mean over the block's requests


class Run(_Strict):
    """One system under one load, all repeats together."""

    system: str
    model: str
    load: str  # "1 client", "16 clients", "2 requests/s", a trace
    concurrency: int | None  # clients; None where arrivals are set by time
    fixed_length: bool  # answers are made to have exactly the longest length
    requests: int
    failed: int
    output_tokens: int
    served_tokens: int | None = None  # of requests that do not count as well; None: there were none
    wall_s: float  # in which there were requests that count
    tpt_ms: Distribution
    ttft_ms: Distribution
    gap_ms: Distribution  # between chunks that carry tokens, over all chunks
    e2e_ms: Distribution
    shared_chunk_frac: float | None  # of the tokens: came in one chunk with an earlier one
    output_tokens_per_s: float | None  # of all requests, in `wall_s`
    goodput_frac: float | None  # of the requests: within every --slo; None without
    goodput_per_s: float | None
    within_target_frac: float | None = None  # of the requests with a TPT: at most --tpt-target-ms; None without
    cpu_s_per_token: float | None
    energy_j_per_token: float | None  # None where the machine does not tell
    blocks_per_token: float | None  # decoder blocks executed
    peak_memory_gib: float | None  # all processes, since their start; shared pages count for each
    exits: Exits | None  # None for a system without exits
    divergences: int | None
    identical_frac: float | None = None  # as in `quality`
    same_as_off_frac: float | None = None  # of the answers: the very text of system `off` under this load
    same_as_first_load_frac: float | None = None  # the system's own text under the first load; None under that
    regret_nats_per_token: float | None
    quality: Quality | None  # None without a baseline; of that itself, only what needs no comparison
    timeline: list[TimelinePoint]

    @property
    def tokens_at_server(self) -> int:
        """What exits, divergences, processor time and energy are over."""
        return self.output_tokens if self.served_tokens is None else self.served_tokens

    @property
    def divergences_at_worst(self) -> int | None:
        """What the bound holds for: exits without a verdict are among them."""
        if self.divergences is None:
            return None
        return self.divergences + (self.exits.unverified if self.exits else 0)


class Ratio(_Strict):
    """`system` / `baseline`; below 1 is better, but for throughput."""

    system: str
    baseline: str
    load: str
    concurrency: int | None
    fixed_length: bool
    units: int | None = None  # blocks of both, which intervals are over; None: of old results, over prompts or requests
    tpt_mean: float | None
    tpt_mean_ci95: tuple[float, float] | None  # None, as the next: too few blocks
    tpt_p99: float | None
    tpt_p99_ci95: tuple[float, float] | None = None  # None, as of other p99: under 500 requests of either
    ttft_mean: float | None
    ttft_mean_ci95: tuple[float, float] | None = None
    ttft_p99: float | None
    ttft_p99_ci95: tuple[float, float] | None = None
    throughput: float | None
    throughput_ci95: tuple[float, float] | None = None
    tpt_mean_by_repeat: list[float]


class SteadyRun(_Strict):
    """One system, or one policy of a server, with clients in a closed loop. Times are those in which its server
    ran; None: not known."""

    system: str
    requests: int | None = None  # answers that began and ended within its turns
    failed: int
    errors: list[str] = []  # what failed requests said, each once, a few
    output_tokens_per_s: float
    tpt_by_turn_ms: list[float | None]  # over all answers under way
    tpt_ms: Distribution | None = None  # over whole answers, as the next
    ttft_ms: Distribution | None = None
    ttft_parts: dict[str, float] | None = None  # what first tokens waited for
    gap_ms: Distribution | None = None  # between chunks of an answer, within turns
    step_ms: float | None = None  # an engine step, mean
    tokens_per_step: float | None = None
    prompt_tokens_per_step: float | None = None
    exits: dict[str, int] | None = None  # None for a system without


class SteadyRatio(_Strict):
    """`system` / `baseline` at one level; below 1 is better, but for throughput."""

    system: str
    baseline: str
    tpt: float  # geometric mean over pairs of turns
    tpt_ci95: tuple[float, float] | None  # over turns, as all others; None: too few
    throughput: float
    throughput_ci95: tuple[float, float] | None
    answers_of_both: int | None = None  # what the next are over
    tpt_mean: float | None = None
    tpt_mean_ci95: tuple[float, float] | None = None
    tpt_p99: float | None = None
    tpt_p99_ci95: tuple[float, float] | None = None
    ttft_mean: float | None = None
    ttft_mean_ci95: tuple[float, float] | None = None
    ttft_p99: float | None = None
    ttft_p99_ci95: tuple[float, float] | None = None


class SteadyLevel(_Strict):
    clients: int
    runs: list[SteadyRun]
    ratios: list[SteadyRatio]


class _Measured(_Strict):
    schema_version: int = SCHEMA_VERSION
    command: str
    commit: str | None  # of a source checkout
    started: str  # ISO 8601
    machine: dict[str, object]
    settings: dict[str, Any]
    systems: dict[str, str]  # name -> how it was started


class SteadyResults(_Measured):
    levels: list[SteadyLevel]
    notes: list[str] = []  # as of `Results`


class Results(_Measured):
    skipped: dict[str, str]  # name -> why it could not run
    runs: list[Run]
    ratios: list[Ratio]
    steps: list[Ratio] = []  # of systems that have one more part of the gain each, to the one before
    oracle_ratio: dict[str, float]  # concurrency -> TPT with a perfect ramp / without, replayed from the model's log
    notes: list[str]  # what a reader should know, e.g. that the machine was noisy
