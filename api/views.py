"""What of a status, and of the knobs, one class of requests may see: its own figures, and what is in force for it."""

from typing import Any

from apparate_llm.config import EarlyExitConfig, class_of
from apparate_llm.core import shares_of
from apparate_llm.exits.tenants import UNNAMED

FILE_KNOBS = ("ramps", "feedback_log", "state")  # paths on the server
TIMELESS = ("clock_s", "active", "depth")
COUNTS = (
    "emitted",
    "diverged",
    "unverified",
    "divergences_at_worst",
    "decode_tokens",
    "decode_s",
    "targets_met",
    "targets_missed",
)


def class_seen(config: EarlyExitConfig, key_class: str | None, *, sees_all: bool) -> str | None:
    """The one class that a visitor sees; None: all there is, as where the server has no classes. key_class: of its
    API key."""
    if sees_all or not config.classes:
        return None
    return class_of(config, key_class) or UNNAMED


def config_view(config: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Of the knobs in force as plain values."""
    if name is None:
        return config
    kept = {knob: value for knob, value in config.items() if knob not in FILE_KNOBS}
    return {**kept, "classes": {own: knobs for own, knobs in config["classes"].items() if own == name}}


def status_view(status: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Of the worker's `early_exit_status`. All totals but a class's own tell of other classes, too."""
    if name is None:
        return status
    share = status["classes"][name]
    counts = {count: share[count] for count in COUNTS}
    return {
        **{field: status[field] for field in TIMELESS},
        "class": name,
        "config": config_view(status["config"], name),
        "classes": {name: share},
        "counts": {**counts, **shares_of(counts, counts["emitted"])},
        "budget_left": share["budget_left"],
    }
