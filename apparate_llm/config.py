"""The one schema of every early-exit knob. CLI flags, `--additional-config` and docs derive from it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ADDITIONAL_CONFIG_KEY = "early_exit"


class ConfigError(ValueError):
    """A knob was given something it does not take. The message is one line for the user."""


class EarlyExitConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Literal["static", "off"] = Field(
        "static", description="static: fixed confidence thresholds; off: no exits at all, plain vLLM"
    )
    accuracy_bound: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        allow_inf_nan=False,
        description="largest share of emitted tokens that may differ from the full model's; 0 is lossless",
    )
    threshold: float = Field(
        0.9, gt=0.0, le=1.0, allow_inf_nan=False, description="confidence from which an exit is released"
    )
    hold_threshold: float = Field(
        0.3, ge=0.0, le=1.0, allow_inf_nan=False, description="confidence from which an exit is held for checking"
    )
    max_exits: int = Field(3, ge=1, le=16, description="most exits per request and engine step")
    max_rows: int = Field(
        4,
        ge=1,
        description="rows per step up to which exits may fill the batch: beyond, they cost more than they bring",
    )
    depth: int | None = Field(
        None, ge=0, description="decoder blocks before the ramp; default: the ramp folder's own choice"
    )
    ramps: str | None = Field(
        None, description="ramp folder; default: the shipped ramps that fit the model, if there are any"
    )


def parse_config(raw: Any) -> EarlyExitConfig:
    """Validate what came from a flag, a file or a caller; raises ConfigError with one readable line."""
    if not isinstance(raw, dict):
        raise ConfigError(f"early_exit must be an object of knobs, got {type(raw).__name__}")
    try:
        return EarlyExitConfig.model_validate(raw)
    except ValidationError as error:
        allowed = ", ".join(EarlyExitConfig.model_fields)
        problems = []
        for item in error.errors(include_url=False):
            knob = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(f"{knob}: unknown knob (allowed: {allowed})")
            else:
                problems.append(f"{knob}: {item['msg']}, got {item['input']!r}")
        raise ConfigError("early_exit: " + "; ".join(problems)) from None


def config_from_vllm(vllm_config: Any) -> EarlyExitConfig:
    """The knobs of a server, out of vLLM's `--additional-config '{"early_exit": {...}}'`."""
    additional = vllm_config.additional_config
    raw = additional.get(ADDITIONAL_CONFIG_KEY, {}) if isinstance(additional, dict) else {}
    return parse_config(raw)
