"""The one schema of every early-exit knob. CLI flags, `--additional-config` and docs derive from it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ADDITIONAL_CONFIG_KEY = "early_exit"


class ConfigError(ValueError):
    """A knob was given something it does not take. The message is one line for the user."""


class EarlyExitConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Literal["adaptive", "apparate", "static", "off"] = Field(
        "adaptive",
        description="adaptive: as many exits as pay; apparate: the paper's algorithm; static: fixed confidence "
        "thresholds; off: no exits at all, plain vLLM",
    )
    accuracy_bound: float = Field(
        0.01,
        ge=0.0,
        lt=1.0,
        allow_inf_nan=False,
        description="largest share of emitted tokens that may differ from the full model's; 0 is lossless",
    )
    bound_kind: Literal["agreement", "regret"] = Field(
        "agreement",
        description="what the bound counts per token: agreement: divergences; regret: nats between the full model's "
        "best token and the emitted one",
    )
    tpt_target_ms: float | None = Field(
        None,
        gt=0.0,
        allow_inf_nan=False,
        description="time per output token to aim at: a request diverges only while it is slower; default: as fast as "
        "the bound allows",
    )
    allow_looser_requests: bool = Field(
        False, description="whether a request may ask for a larger accuracy bound than the server's"
    )
    max_exits: int = Field(6, ge=1, le=16, description="most exits per request and engine step")
    depth: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="decoder blocks before the ramp; auto: the ramp that pays most"
    )
    ramps: str | None = Field(
        None, description="ramp folder; default: the shipped ramps that fit the model, if there are any"
    )
    threshold: float = Field(
        0.9,
        gt=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="policy static: confidence from which an exit is released",
    )
    hold_threshold: float = Field(
        0.3,
        ge=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="policy static: confidence from which an exit is held for checking",
    )
    max_rows: int = Field(
        4,
        ge=1,
        description="policies static and apparate: rows per step up to which exits may fill the batch; adaptive "
        "measures what rows cost",
    )
    feedback_log: str | None = Field(
        None, description="file to log exits, verdicts and times to, without any text, for `apparate-llm replay`"
    )
    state: str | None = Field(
        None,
        description="file for what the controller has learned, or none; default: one for each model, ramps and machine "
        "in the cache folder",
    )


# What may change while the server runs.
LIVE_KNOBS = (
    "policy",
    "accuracy_bound",
    "tpt_target_ms",
    "allow_looser_requests",
    "max_exits",
    "depth",
    "threshold",
    "hold_threshold",
    "max_rows",
)


class RequestKnobs(BaseModel):
    """What a request may set for itself, in `vllm_xargs`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    early_exit: Literal[0, 1] = Field(1, description="0: no exits for this request")
    accuracy_bound: float | None = Field(
        None, ge=0.0, lt=1.0, allow_inf_nan=False, description="its own bound, not above the server's"
    )
    tpt_target_ms: float | None = Field(None, gt=0.0, allow_inf_nan=False, description="its own target")


def parse_config(raw: Any) -> EarlyExitConfig:
    """Validate what came from a flag, a file or a caller; raises ConfigError with one readable line."""
    if not isinstance(raw, dict):
        raise ConfigError(f"early_exit must be an object of knobs, got {type(raw).__name__}")
    try:
        return EarlyExitConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"early_exit: {_problems(error, EarlyExitConfig)}") from None


def parse_live(changes: Any, config: EarlyExitConfig) -> EarlyExitConfig:
    """The knobs of a running server with some of them changed; raises ConfigError."""
    if not isinstance(changes, dict):
        raise ConfigError(f"early_exit must be an object of knobs, got {type(changes).__name__}")
    if fixed := [name for name in changes if name not in LIVE_KNOBS]:
        raise ConfigError(f"early_exit: {fixed[0]}: cannot be changed while serving (allowed: {', '.join(LIVE_KNOBS)})")
    return parse_config({**config.model_dump(), **changes})


def parse_request_knobs(extra_args: dict[str, Any] | None, config: EarlyExitConfig) -> RequestKnobs:
    """Our part of a request's `vllm_xargs`, which other plugins may use as well; raises ConfigError."""
    ours = {
        name: value
        for name, value in (extra_args or {}).items()
        if name in RequestKnobs.model_fields or name.startswith("early_exit")
    }
    try:
        knobs = RequestKnobs.model_validate(ours)
    except ValidationError as error:
        raise ConfigError(f"vllm_xargs: {_problems(error, RequestKnobs)}") from None
    bound = config.accuracy_bound
    if knobs.accuracy_bound is not None and knobs.accuracy_bound > bound and not config.allow_looser_requests:
        raise ConfigError(f"vllm_xargs: accuracy_bound: at most the server's {bound:g}, got {knobs.accuracy_bound:g}")
    return knobs


def _problems(error: ValidationError, schema: type[BaseModel]) -> str:
    """What was wrong, what was got and what is allowed, in one line."""
    problems = []
    for item in error.errors(include_url=False):
        knob = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            problems.append(f"{knob}: unknown knob (allowed: {', '.join(schema.model_fields)})")
        else:
            problems.append(f"{knob}: {item['msg']}, got {item['input']!r}")
    return "; ".join(dict.fromkeys(problems))


def config_from_vllm(vllm_config: Any) -> EarlyExitConfig:
    """The knobs of a server, out of vLLM's `--additional-config '{"early_exit": {...}}'`."""
    additional = vllm_config.additional_config
    raw = additional.get(ADDITIONAL_CONFIG_KEY, {}) if isinstance(additional, dict) else {}
    return parse_config(raw)
