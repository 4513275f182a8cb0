"""The one schema of every early-exit option. CLI flags, `--additional-config` and docs derive from it."""

import hashlib
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apparate_llm.renamed import OPTIONS, REQUEST_FIELDS, with_new_names

T = TypeVar("T")
ADDITIONAL_CONFIG_KEY = "early_exit"
DEFAULT_TENANT = "default"  # of requests that name none
KEY_TENANT_PROOF = "apparate_tenant_proof"  # field of vLLM's `extra_args`: that the API has seen a key of the tenant
PolicyName = Literal["adaptive", "apparate", "static", "off"]
BoundKind = Literal["agreement", "regret"]
LONGEST_NAME = 100  # characters of what a caller sent that a message repeats


class ConfigError(ValueError):
    """An option was given something it does not take. The message is one line for the user."""


class Tenant(BaseModel):
    """Options for all requests of one tenant, or of one use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    early_exit: Literal[0, 1] = Field(1, description="0: no exits")
    accuracy_bound: float | None = Field(None, ge=0.0, lt=1.0, allow_inf_nan=False, description="default: the server's")
    tpt_target_ms: float | None = Field(None, gt=0.0, allow_inf_nan=False, description="default: the server's")
    api_keys_sha256: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = Field(
        (), repr=False, description="digests of the API keys whose requests are this tenant's, whatever they ask for"
    )
    by_name: bool | None = Field(
        None, description="let a request with another key, or none, name it; default: only where it has no keys"
    )

    @property
    def may_be_named(self) -> bool:
        return not self.api_keys_sha256 if self.by_name is None else self.by_name


TenantName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]


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
        description="largest share of emitted tokens that may differ from the full model's (divergences); 0: none, "
        "lossless",
    )
    bound_kind: BoundKind = Field(
        "agreement",
        description="what the bound counts: agreement: divergences; regret: how much less likely than the full model's "
        "best token they were, in nats per token; then exits are held only",
    )
    tpt_target_ms: float | None = Field(
        None,
        gt=0.0,
        allow_inf_nan=False,
        description="time per output token to aim at, in ms: tokens may differ only while a request is slower; "
        "default: as fast as the bound allows",
    )
    allow_looser_requests: bool = Field(
        False, description="let a request ask for a larger accuracy bound than the server's"
    )
    max_exits: int = Field(10, ge=1, le=16, description="most exits per request and step")
    depth: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="decoder blocks before the ramp; auto: the ramp that pays most"
    )
    ramps: str | None = Field(
        None,
        description="ramp folder; default: the shipped ramps that fit the model; where none do, the start is refused",
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
    max_batch_tokens: int = Field(
        4,
        ge=1,
        description="policies static and apparate: exits join a step until it has this many tokens, within vLLM's "
        "--max-num-batched-tokens; adaptive measures what tokens cost instead",
    )
    ttft_weight: float = Field(
        1.0,
        ge=0.0,
        allow_inf_nan=False,
        description="policy adaptive: how much it counts that other requests wait for their first token; 0: not at "
        "all, so more exits with many clients",
    )
    huge_pages: bool = Field(
        True, description="keep the weights in pages of 2 MB, where Linux gives them, which makes each pass faster"
    )
    screened_head: bool = Field(
        True,
        description="find the best token of greedy requests by int8 scores and a few exact ones, where that is faster: "
        "the token is the same; takes a byte for each weight of the model's head",
    )
    batch_invariant: bool = Field(
        True,
        description="compute each token to the same bits whatever else is in its batch, so that a text does not depend "
        "on the load; with policy off, too",
    )
    feedback_log: str | None = Field(
        None, description="file to log exits, verdicts and times to, for `apparate-llm replay`; it holds no text"
    )
    tenants: dict[TenantName, Tenant] = Field(
        {},
        description="groups of requests, by API key or by name: a TOML file, see docs/serving.md",
    )
    tenant_metrics: bool = Field(
        True, description="show the figures of each tenant on /metrics, which asks nobody for a key"
    )
    controller_state: str | None = Field(
        None,
        description="file that keeps what the controller has learned; none: keep nothing; default: one in the cache "
        "folder for each model, ramps and machine",
    )


# What may change while the server runs.
LIVE_OPTIONS = (
    "policy",
    "accuracy_bound",
    "tpt_target_ms",
    "allow_looser_requests",
    "max_exits",
    "depth",
    "threshold",
    "hold_threshold",
    "max_batch_tokens",
    "ttft_weight",
)


class RequestOptions(BaseModel):
    """What a request may set for itself, in `vllm_xargs`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    early_exit: Literal[0, 1] = Field(1, description="0: no exits for this request")
    accuracy_bound: float | None = Field(
        None, ge=0.0, lt=1.0, allow_inf_nan=False, description="the request's bound, not above the server's"
    )
    tpt_target_ms: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="the request's time per output token to aim at"
    )
    early_exit_tenant: str | None = Field(None, description="the tenant the request is of")
    early_exit_report: Literal[0, 1] = Field(0, description="1: the answer says where its tokens came from")


def parse_config(raw: object) -> EarlyExitConfig:
    """Validate what came from a flag, a file or a caller; raises ConfigError with one readable line."""
    if not isinstance(raw, dict):
        raise ConfigError(f"early_exit must be an object of options, got {type(raw).__name__}")
    try:
        return EarlyExitConfig.model_validate(new_options(raw))
    except ValidationError as error:
        raise ConfigError(f"early_exit: {_problems(error, EarlyExitConfig)}") from None


def new_options(given: Mapping[str, T]) -> dict[str, T]:
    """The options by the names they have now; raises ConfigError."""
    try:
        return with_new_names(given, OPTIONS)
    except ValueError as error:
        raise ConfigError(f"early_exit: {error}") from None


def new_request_fields(given: Mapping[str, T]) -> dict[str, T]:
    """What a request asks for by the names it has now; raises ConfigError."""
    try:
        return with_new_names(given, REQUEST_FIELDS)
    except ValueError as error:
        raise ConfigError(f"vllm_xargs: {error}") from None


def effective_bound(config: EarlyExitConfig, *, tenant_name: str | None = None, asked: float | None = None) -> float:
    """The accuracy bound that a request goes by: its own, else its tenant's, else the server's; never looser than the
    server's without `allow_looser_requests`."""
    own = config.tenants.get(tenant_name) if tenant_name is not None else None
    wanted = asked if asked is not None else own.accuracy_bound if own is not None else None
    if wanted is None:
        return config.accuracy_bound
    return wanted if config.allow_looser_requests else min(wanted, config.accuracy_bound)


def effective_target_ms(
    config: EarlyExitConfig, *, tenant_name: str | None = None, asked: float | None = None
) -> float | None:
    """The time per output token that a request aims at: its own, else its tenant's, else the server's, if any."""
    own = config.tenants.get(tenant_name) if tenant_name is not None else None
    return asked or (own.tpt_target_ms if own is not None else None) or config.tpt_target_ms


def check_tenants(config: EarlyExitConfig) -> None:
    """Raises ConfigError for tenants that a server cannot start with."""
    keys: dict[str, str] = {}
    for name, own in config.tenants.items():
        bound = own.accuracy_bound
        if bound is not None and bound > effective_bound(config, tenant_name=name):
            raise ConfigError(
                f"early_exit: tenants: {name}: accuracy_bound: at most the server's {config.accuracy_bound:g} without "
                f"allow_looser_requests, got {bound:g}"
            )
        if not own.may_be_named and not own.api_keys_sha256:
            raise ConfigError(
                f"early_exit: tenants: {name}: no request can be of it: by_name is false, without api_keys"
            )
        for digest in own.api_keys_sha256:
            if digest in keys:
                raise ConfigError(f"early_exit: tenants: {keys[digest]} and {name} have an API key in common")
            keys[digest] = name


def parse_live(changes: object, config: EarlyExitConfig) -> EarlyExitConfig:
    """The options of a running server with some of them changed; raises ConfigError."""
    if not isinstance(changes, dict):
        raise ConfigError(f"early_exit must be an object of options, got {type(changes).__name__}")
    changes = new_options(changes)
    if fixed := [_name(name) for name in changes if name not in LIVE_OPTIONS]:
        raise ConfigError(
            f"early_exit: {fixed[0]}: cannot be changed while serving (allowed: {', '.join(LIVE_OPTIONS)})"
        )
    return parse_config({**config.model_dump(), **changes})


def parse_request_options(
    extra_args: Mapping[str, object] | None, config: EarlyExitConfig, key_tenant: str | None = None
) -> RequestOptions:
    """Our part of a request's `vllm_xargs`, which other plugins may use as well, completed by its tenant's; raises
    ConfigError. key_tenant: the tenant of the request's API key, which decides."""
    key_tenant = key_tenant or _proven_tenant(extra_args, config)
    ours = {
        name: value
        for name, value in new_request_fields(extra_args or {}).items()
        if name in RequestOptions.model_fields or name.startswith("early_exit")
    }
    try:
        options = RequestOptions.model_validate(ours)
    except ValidationError as error:
        raise ConfigError(f"vllm_xargs: {_problems(error, RequestOptions)}") from None
    name = _tenant_name(options.early_exit_tenant, config, key_tenant)
    own = config.tenants[name] if name is not None else Tenant.model_validate({})
    bound = effective_bound(config, tenant_name=name)
    whose = "the server's" if bound == config.accuracy_bound else f"tenant {name}'s"
    if options.accuracy_bound is not None and options.accuracy_bound > bound and not config.allow_looser_requests:
        raise ConfigError(f"vllm_xargs: accuracy_bound: at most {whose} {bound:g}, got {options.accuracy_bound:g}")
    if own.early_exit < options.early_exit and "early_exit" in options.model_fields_set:
        raise ConfigError(f"vllm_xargs: early_exit: requests of tenant {name} take no exits, got 1")
    completed: dict[str, object] = {"early_exit_tenant": name, "early_exit": min(own.early_exit, options.early_exit)}
    if options.accuracy_bound is None and own.accuracy_bound is not None:
        completed["accuracy_bound"] = bound
    if options.tpt_target_ms is None:
        completed["tpt_target_ms"] = own.tpt_target_ms
    return options.model_copy(update=completed)


def tenant_of(config: EarlyExitConfig, key_tenant: str | None) -> str | None:
    """The tenant of a request that names none; None where there is none for it."""
    default = config.tenants.get(DEFAULT_TENANT)
    return key_tenant or (DEFAULT_TENANT if default is not None and default.may_be_named else None)


def _tenant_name(asked: str | None, config: EarlyExitConfig, key_tenant: str | None) -> str | None:
    """The tenant a request is of; None where there are none, or it names none and there is no default."""
    if asked is None:
        return tenant_of(config, key_tenant)
    if key_tenant is not None:
        if asked != key_tenant:
            raise ConfigError(
                f"vllm_xargs: early_exit_tenant: requests with this API key are {key_tenant}, got {_name(asked)}"
            )
        return key_tenant
    if asked not in config.tenants or not config.tenants[asked].may_be_named:
        named = ", ".join(name for name, own in config.tenants.items() if own.may_be_named)
        allowed = named or ("by API key only" if config.tenants else "none, the server has no tenants")
        raise ConfigError(f"vllm_xargs: early_exit_tenant: unknown tenant {_name(asked)} (allowed: {allowed})")
    return asked


def key_tenant_proof(config: EarlyExitConfig, name: str) -> str:
    """Shows the engine that a request came with a key of this tenant. Only who knows the keys' digests can make it, so
    where vLLM runs without our part of the API no caller can."""
    return hashlib.sha256("\n".join([name, *sorted(config.tenants[name].api_keys_sha256)]).encode()).hexdigest()


def _proven_tenant(extra_args: Mapping[str, object] | None, config: EarlyExitConfig) -> str | None:
    given = (extra_args or {}).get(KEY_TENANT_PROOF)
    if given is None:
        return None
    keyed = (name for name, own in config.tenants.items() if own.api_keys_sha256)
    return next((name for name in keyed if key_tenant_proof(config, name) == given), None)


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
        option = ": ".join(_name(part) if isinstance(part, str) else str(part) for part in loc)
        if item["type"] == "extra_forbidden":
            known = schema if len(item["loc"]) == 1 else Tenant
            problems.append(f"{option}: unknown option (allowed: {', '.join(known.model_fields)})")
            continue
        got = item["input"]
        may_hold_keys = isinstance(got, str if "api_keys_sha256" in loc else list | tuple | dict)
        hides = loc[:1] == ["tenants"] and may_hold_keys
        problems.append(
            f"{option + ': ' if loc else ''}{item['msg']}, got {type(got).__name__ if hides else _SHORT.repr(got)}"
        )
    return "; ".join(dict.fromkeys(problems))


def public_config(config: EarlyExitConfig) -> dict[str, Any]:
    """The options as plain values, without what tells of API keys."""
    return config.model_dump(exclude={"tenants": {"__all__": {"api_keys_sha256"}}})


class WithAdditionalConfig(Protocol):
    """What we read of vLLM's settings; the file knows nothing else of it."""

    @property
    def additional_config(self) -> object: ...


def config_from_vllm(vllm_config: WithAdditionalConfig) -> EarlyExitConfig:
    """The options of a server, out of vLLM's `--additional-config '{"early_exit": {...}}'`."""
    additional = vllm_config.additional_config
    raw = additional.get(ADDITIONAL_CONFIG_KEY, {}) if isinstance(additional, dict) else {}
    config = parse_config(raw)
    check_tenants(config)
    return config
