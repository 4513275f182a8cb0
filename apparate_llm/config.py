"""The one schema of every early-exit knob. CLI flags, `--additional-config` and docs derive from it."""

import hashlib
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ADDITIONAL_CONFIG_KEY = "early_exit"
DEFAULT_CLASS = "default"  # of requests that name none
KEY_CLASS_PROOF = "apparate_class_proof"  # field of vLLM's `extra_args`: that the API has seen a key of the class
PolicyName = Literal["adaptive", "apparate", "static", "off"]
BoundKind = Literal["agreement", "regret"]
LONGEST_NAME = 100  # characters of what a caller sent that a message repeats


class ConfigError(ValueError):
    """A knob was given something it does not take. The message is one line for the user."""


class RequestClass(BaseModel):
    """Knobs for all requests of one tenant or use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    early_exit: Literal[0, 1] = Field(1, description="0: no exits")
    accuracy_bound: float | None = Field(None, ge=0.0, lt=1.0, allow_inf_nan=False, description="default: the server's")
    tpt_target_ms: float | None = Field(None, gt=0.0, allow_inf_nan=False, description="default: the server's")
    api_keys_sha256: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = Field(
        (), repr=False, description="digests of the API keys whose requests are of this class, whatever they ask for"
    )
    by_name: bool | None = Field(
        None, description="whether a request with another key, or none, may name it; default: only where it has no keys"
    )

    @property
    def may_be_named(self) -> bool:
        return not self.api_keys_sha256 if self.by_name is None else self.by_name


ClassName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]


class EarlyExitConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: PolicyName = Field(
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
    bound_kind: BoundKind = Field(
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
    max_exits: int = Field(10, ge=1, le=16, description="most exits per request and engine step")
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
    waiting_weight: float = Field(
        1.0,
        ge=0.0,
        allow_inf_nan=False,
        description="policy adaptive: how much others' wait for their first token counts against tokens per ms; 0: not "
        "at all, more exits with many clients",
    )
    huge_pages: bool = Field(
        True, description="whether to keep the weights in pages of 2 MB, where Linux gives them: each pass is faster"
    )
    batch_invariant: bool = Field(
        True,
        description="whether a token's bits do not depend on what else is in its batch, so that a text is the same "
        "whatever the load, with policy off as well",
    )
    feedback_log: str | None = Field(
        None, description="file to log exits, verdicts and times to, without any text, for `apparate-llm replay`"
    )
    classes: dict[ClassName, RequestClass] = Field(
        {},
        description="classes of requests, by API key or chosen per request; as a flag: TOML file, see docs/operate.md",
    )
    class_metrics: bool = Field(
        True, description="whether /metrics, which asks nobody for a key, shows the figures of each class"
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
    "waiting_weight",
)


class RequestKnobs(BaseModel):
    """What a request may set for itself, in `vllm_xargs`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    early_exit: Literal[0, 1] = Field(1, description="0: no exits for this request")
    accuracy_bound: float | None = Field(
        None, ge=0.0, lt=1.0, allow_inf_nan=False, description="its own bound, not above the server's"
    )
    tpt_target_ms: float | None = Field(None, gt=0.0, allow_inf_nan=False, description="its own target")
    early_exit_class: str | None = Field(None, description="the class it is of")
    early_exit_report: Literal[0, 1] = Field(0, description="1: the answer says where its tokens came from")


def parse_config(raw: object) -> EarlyExitConfig:
    """Validate what came from a flag, a file or a caller; raises ConfigError with one readable line."""
    if not isinstance(raw, dict):
        raise ConfigError(f"early_exit must be an object of knobs, got {type(raw).__name__}")
    try:
        return EarlyExitConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"early_exit: {_problems(error, EarlyExitConfig)}") from None


def effective_bound(config: EarlyExitConfig, *, class_name: str | None = None, asked: float | None = None) -> float:
    """The accuracy bound that a request goes by: its own, else its class's, else the server's; never looser than the
    server's without `allow_looser_requests`."""
    own = config.classes.get(class_name) if class_name is not None else None
    wanted = asked if asked is not None else own.accuracy_bound if own is not None else None
    if wanted is None:
        return config.accuracy_bound
    return wanted if config.allow_looser_requests else min(wanted, config.accuracy_bound)


def check_classes(config: EarlyExitConfig) -> None:
    """Raises ConfigError for classes that a server cannot start with."""
    keys: dict[str, str] = {}
    for name, own in config.classes.items():
        bound = own.accuracy_bound
        if bound is not None and bound > effective_bound(config, class_name=name):
            raise ConfigError(
                f"early_exit: classes: {name}: accuracy_bound: at most the server's {config.accuracy_bound:g} without "
                f"allow_looser_requests, got {bound:g}"
            )
        if not own.may_be_named and not own.api_keys_sha256:
            raise ConfigError(
                f"early_exit: classes: {name}: no request can be of it: by_name is false, without api_keys"
            )
        for digest in own.api_keys_sha256:
            if digest in keys:
                raise ConfigError(f"early_exit: classes: {keys[digest]} and {name} have an API key in common")
            keys[digest] = name


def parse_live(changes: object, config: EarlyExitConfig) -> EarlyExitConfig:
    """The knobs of a running server with some of them changed; raises ConfigError."""
    if not isinstance(changes, dict):
        raise ConfigError(f"early_exit must be an object of knobs, got {type(changes).__name__}")
    if fixed := [_name(name) for name in changes if name not in LIVE_KNOBS]:
        raise ConfigError(f"early_exit: {fixed[0]}: cannot be changed while serving (allowed: {', '.join(LIVE_KNOBS)})")
    return parse_config({**config.model_dump(), **changes})


def parse_request_knobs(
    extra_args: Mapping[str, object] | None, config: EarlyExitConfig, key_class: str | None = None
) -> RequestKnobs:
    """Our part of a request's `vllm_xargs`, which other plugins may use as well, completed by its class's; raises
    ConfigError. key_class: the class of the request's API key, which decides."""
    key_class = key_class or _proven_class(extra_args, config)
    ours = {
        name: value
        for name, value in (extra_args or {}).items()
        if name in RequestKnobs.model_fields or name.startswith("early_exit")
    }
    try:
        knobs = RequestKnobs.model_validate(ours)
    except ValidationError as error:
        raise ConfigError(f"vllm_xargs: {_problems(error, RequestKnobs)}") from None
    name = _class_name(knobs.early_exit_class, config, key_class)
    own = config.classes[name] if name is not None else RequestClass.model_validate({})
    bound = effective_bound(config, class_name=name)
    whose = "the server's" if bound == config.accuracy_bound else f"class {name}'s"
    if knobs.accuracy_bound is not None and knobs.accuracy_bound > bound and not config.allow_looser_requests:
        raise ConfigError(f"vllm_xargs: accuracy_bound: at most {whose} {bound:g}, got {knobs.accuracy_bound:g}")
    if own.early_exit < knobs.early_exit and "early_exit" in knobs.model_fields_set:
        raise ConfigError(f"vllm_xargs: early_exit: requests of class {name} take no exits, got 1")
    completed: dict[str, Any] = {"early_exit_class": name, "early_exit": min(own.early_exit, knobs.early_exit)}
    if knobs.accuracy_bound is None and own.accuracy_bound is not None:
        completed["accuracy_bound"] = bound
    if knobs.tpt_target_ms is None:
        completed["tpt_target_ms"] = own.tpt_target_ms
    return knobs.model_copy(update=completed)


def class_of(config: EarlyExitConfig, key_class: str | None) -> str | None:
    """The class of a request that names none; None where there is none for it."""
    default = config.classes.get(DEFAULT_CLASS)
    return key_class or (DEFAULT_CLASS if default is not None and default.may_be_named else None)


def _class_name(asked: str | None, config: EarlyExitConfig, key_class: str | None) -> str | None:
    """The class a request is of; None where there are none, or it names none and there is no default."""
    if asked is None:
        return class_of(config, key_class)
    if key_class is not None:
        if asked != key_class:
            raise ConfigError(
                f"vllm_xargs: early_exit_class: requests with this API key are {key_class}, got {_name(asked)}"
            )
        return key_class
    if asked not in config.classes or not config.classes[asked].may_be_named:
        named = ", ".join(name for name, own in config.classes.items() if own.may_be_named)
        allowed = named or ("by API key only" if config.classes else "none, the server has no classes")
        raise ConfigError(f"vllm_xargs: early_exit_class: unknown class {_name(asked)} (allowed: {allowed})")
    return asked


def key_class_proof(config: EarlyExitConfig, name: str) -> str:
    """Shows the engine that a request came with a key of this class. Only who knows the keys' digests can make it, so
    where vLLM runs without our part of the API no caller can."""
    return hashlib.sha256("\n".join([name, *sorted(config.classes[name].api_keys_sha256)]).encode()).hexdigest()


def _proven_class(extra_args: Mapping[str, object] | None, config: EarlyExitConfig) -> str | None:
    given = (extra_args or {}).get(KEY_CLASS_PROOF)
    if given is None:
        return None
    keyed = (name for name, own in config.classes.items() if own.api_keys_sha256)
    return next((name for name in keyed if key_class_proof(config, name) == given), None)


def _name(name: object) -> str:
    """What a caller sent as a name, fit to be repeated in one line."""
    if isinstance(name, str) and name.isprintable() and len(name) <= LONGEST_NAME:
        return name
    return _SHORT.repr(name)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST_NAME


def _problems(error: ValidationError, schema: type[BaseModel]) -> str:
    """What was wrong, what was got and what is allowed, in one line. What may hold an API key is not repeated."""
    problems = []
    for item in error.errors(include_url=False):
        loc = [part for part in item["loc"] if part != "[key]"]
        knob = ": ".join(_name(part) if isinstance(part, str) else str(part) for part in loc)
        if item["type"] == "extra_forbidden":
            known = schema if len(item["loc"]) == 1 else RequestClass
            problems.append(f"{knob}: unknown knob (allowed: {', '.join(known.model_fields)})")
            continue
        got = item["input"]
        may_hold_keys = isinstance(got, str if "api_keys_sha256" in loc else list | tuple | dict)
        hides = loc[:1] == ["classes"] and may_hold_keys
        problems.append(
            f"{knob + ': ' if loc else ''}{item['msg']}, got {type(got).__name__ if hides else _SHORT.repr(got)}"
        )
    return "; ".join(dict.fromkeys(problems))


def shown(config: EarlyExitConfig) -> dict[str, Any]:
    """The knobs as plain values, without what tells of API keys."""
    return config.model_dump(exclude={"classes": {"__all__": {"api_keys_sha256"}}})


class WithAdditionalConfig(Protocol):
    """What we read of vLLM's settings; the file knows nothing else of it."""

    @property
    def additional_config(self) -> object: ...


def config_from_vllm(vllm_config: WithAdditionalConfig) -> EarlyExitConfig:
    """The knobs of a server, out of vLLM's `--additional-config '{"early_exit": {...}}'`."""
    additional = vllm_config.additional_config
    raw = additional.get(ADDITIONAL_CONFIG_KEY, {}) if isinstance(additional, dict) else {}
    config = parse_config(raw)
    check_classes(config)
    return config
