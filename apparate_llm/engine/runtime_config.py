"""Options changed while serving: between two engine steps, on every rank alike."""

import sys
from dataclasses import dataclass, field

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from apparate_llm.config import (
    ConfigError,
    EarlyExitConfig,
    RequestOptions,
    effective_bound,
    effective_target_ms,
    parse_live,
    parse_request_options,
)
from apparate_llm.controller.budget import Bucket
from apparate_llm.controller.policies import make_policy
from apparate_llm.controller.policy import Policy
from apparate_llm.controller.state import check_numbers
from apparate_llm.engine.eligibility import is_releasable, may_exit, stop_token_ids
from apparate_llm.exits.draft import Drafter
from apparate_llm.exits.ledger import RequestExits, VerdictLedger
from apparate_llm.exits.tenants import UNNAMED
from apparate_llm.exits.token_origins import trace_of

logger = init_logger("vllm.apparate")
MOST_LOGGED = 500  # characters of what a request asked for


@dataclass(slots=True)
class PolicySwitch:
    """Makes the policy that the options ask for, and remembers what those before it had learned."""

    depth: int  # to begin with
    depths: tuple[int, ...]  # ramps there are
    num_layers: int
    most_exits: int  # that the server has made room for
    sibling: bool = False  # whether the ramps were made for another model than the one that is served
    _learned: dict[str, dict[str, object]] = field(default_factory=dict)  # by policy

    def make(self, config: EarlyExitConfig) -> Policy:
        depth = self.depth if config.depth == "auto" else config.depth
        depths = self.depths if config.depth == "auto" else (config.depth,)
        return make_policy(config, depth=depth, depths=depths, num_layers=self.num_layers, sibling=self.sibling)

    def check(self, config: EarlyExitConfig) -> None:
        """Raises ConfigError for options that this server cannot serve with."""
        if config.depth != "auto" and config.depth not in self.depths:
            allowed = ", ".join(map(str, self.depths))
            raise ConfigError(f"early_exit: depth: this server has ramps at {allowed}, got {config.depth}")
        if config.max_exits > self.most_exits:
            raise ConfigError(
                f"early_exit: max_exits: at most {self.most_exits}, which the server was started with, "
                f"got {config.max_exits}"
            )

    def change(self, drafter: Drafter, before: EarlyExitConfig, after: EarlyExitConfig) -> None:
        self._learned[before.policy] = drafter.policy.state()
        drafter.policy = self.make(after)
        drafter.max_exits = after.max_exits
        if state := self._learned.get(after.policy):
            if after.depth != "auto":
                state = {**state, "depth": after.depth}
            drafter.policy.restore(state)

    def renew(self, drafter: Drafter, config: EarlyExitConfig, learned: dict[str, object]) -> None:
        """Begin anew with no more than what was `learned`."""
        self._learned.clear()
        drafter.policy = self.make(config)
        if learned:
            drafter.policy.restore(learned)


def learned_of(policy: Policy) -> dict[str, object]:
    """What a policy has learned, if it is sound."""
    try:
        state = policy.state()
        check_numbers(state)
        return state
    except Exception:
        logger.warning("What the controller has learned is not kept", exc_info=True)
        return {}


def apply_changes(switch: PolicySwitch | None, config: EarlyExitConfig, changes: object) -> EarlyExitConfig:
    """The options with `changes`; raises ConfigError if they are refused."""
    if switch is None:
        raise ConfigError("this server was started without early exits (policy off)")
    after = parse_live(changes, config)
    switch.check(after)
    return after


def apply_to_requests(ledger: VerdictLedger, config: EarlyExitConfig) -> None:
    """Requests under way and the server's budget go by the new options; what was spent stays spent."""
    ledger.budget.change_bound(config.accuracy_bound)
    for (_, asked), group in ledger.budget.groups.items():
        group.follow(effective_bound(config, asked=asked))
    for name, share in ledger.tenants.items():
        share.bucket.change_bound(effective_bound(config, tenant_name=name))
    for request in ledger.requests.values():
        request.bucket.change_bound(effective_bound(config, asked=request.options.accuracy_bound))
        request.tpt_target_ms = effective_target_ms(config, asked=request.options.tpt_target_ms)


def admit_request(
    params: SamplingParams, config: EarlyExitConfig, ledger: VerdictLedger, *, others_allow: bool = True
) -> RequestExits:
    """Of a new request. others_allow: whether what else the server runs leaves
    room for exits. A bad option was refused by the API already, where it runs with our plugin; else it falls back to
    the server's, whatever it was."""
    given = params.extra_args if isinstance(params.extra_args, dict) else {}
    try:
        options = parse_request_options(given, config)
    except Exception as error:
        logger.error("%s; the server's own settings are used", str(error)[:MOST_LOGGED])
        options = RequestOptions.model_validate({})
    bound = effective_bound(config, asked=options.accuracy_bound)
    bucket = Bucket.of_request(bound)
    name = options.early_exit_tenant or UNNAMED
    share = ledger.tenants.get(name)
    releasable, exits = is_releasable(params), others_allow and may_exit(params)
    if options.early_exit and releasable and exits:
        bucket.of_group = ledger.budget.groups.of(name, options.accuracy_bound, bound)
        bucket.of_tenant = share.bucket if share else None
    else:
        bucket.stay_alone()
    return RequestExits(
        releasable=releasable,
        greedy=params.temperature == 0.0,
        may_exit=exits,
        max_tokens=max_tokens_of(params),
        stop_token_ids=stop_token_ids(params),
        options=options,
        bucket=bucket,
        share=share,
        tpt_target_ms=effective_target_ms(config, asked=options.tpt_target_ms),
        trace=trace_of(given) if options.early_exit_report else None,
    )


def plain_exits(num_emitted: int, params: SamplingParams | None) -> RequestExits:
    """Of a request that the ledger has lost sight of: it takes no exits."""
    options = RequestOptions.model_validate({"early_exit": 0})
    bucket = Bucket.of_request(0.0)
    bucket.stay_alone()
    return RequestExits(
        releasable=False, bucket=bucket, options=options, max_tokens=max_tokens_of(params), num_emitted=num_emitted
    )


def max_tokens_of(params: SamplingParams | None) -> int:
    return sys.maxsize if params is None or params.max_tokens is None else params.max_tokens
