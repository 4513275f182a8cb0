"""What of a status, and of the options, one tenant may see: its own figures, and what is in force for it."""

from typing import Any

from apparate_llm.config import EarlyExitConfig, effective_bound, effective_target_ms, tenant_of
from apparate_llm.core import shares_of
from apparate_llm.exits.tenants import UNNAMED
from apparate_llm.renamed import beside_old_names

FILE_OPTIONS = ("ramps", "feedback_log", "controller_state")  # paths on the server
TIMELESS = ("clock_s", "active", "depth")
COUNTS = (
    "emitted",
    "divergences",
    "unverified",
    "divergences_at_worst",
    "decode_tokens",
    "decode_s",
    "targets_met",
    "targets_missed",
)


def tenant_seen(config: EarlyExitConfig, key_tenant: str | None, *, sees_all: bool) -> str | None:
    """The one tenant that a visitor sees; None: all there is, as where the server has no tenants. key_tenant: of its
    API key."""
    if sees_all or not config.tenants:
        return None
    return tenant_of(config, key_tenant) or UNNAMED


def config_view(config: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Of the options in force as plain values."""
    if name is None:
        return config
    kept = {option: value for option, value in config.items() if option not in FILE_OPTIONS}
    return {**kept, "tenants": {own: options for own, options in config["tenants"].items() if own == name}}


def status_view(status: dict[str, Any], config: EarlyExitConfig, name: str | None) -> dict[str, Any]:
    """Of the worker's `early_exit_status`; config: in force. All totals but a tenant's own tell of others, too."""
    if name is None:
        return status
    share = status["tenants"][name]
    counts = {count: share[count] for count in COUNTS}
    return beside_old_names(
        {
            **{field: status[field] for field in TIMELESS},
            "tenant": name,
            "accuracy_bound": effective_bound(config, tenant_name=name),
            "tpt_target_ms": effective_target_ms(config, tenant_name=name),
            "config": config_view(status["config"], name),
            "tenants": {name: share},
            "counts": {**counts, **shares_of(counts, counts["emitted"])},
            "budget_left": share["budget_left"],
        }
    )
