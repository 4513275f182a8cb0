"""Names of version 0.1 that are taken until 0.3, each with a warning."""

import logging
import os
from collections.abc import Mapping
from typing import Any

TOLD_VARIABLE = "APPARATE_OLD_NAMES_TOLD"
OPTIONS = {  # old -> new
    "waiting_weight": "ttft_weight",
    "max_rows": "max_batch_tokens",
    "classes": "tenants",
    "class_metrics": "tenant_metrics",
    "state": "controller_state",
}
REQUEST_FIELDS = {"early_exit_class": "early_exit_tenant"}
METRICS = {  # new -> old; both are on the page
    "held_accepted": "accepted",
    "held_accepted_divergences": "accepted_diverged",
    "divergences": "diverged",
    "verification_passes": "completion_passes",
    "draft_steps": "rounds",
    "verification_pass_seconds": "completion_seconds",
    "draft_step_seconds": "round_seconds",
    "tenant_divergences": "class_diverged",
    **{
        f"tenant_{name}": f"class_{name}"
        for name in (
            "emitted",
            "divergences_at_worst",
            "unverified",
            "decode_tokens",
            "decode_seconds",
            "targets_met",
            "targets_missed",
        )
    },
}
LABELS = {"tenant": "class"}
STATUS = {  # part of the status -> its new names -> old; both are in it
    "counts": {"verification_passes": "completion_passes", "draft_steps": "rounds"},
    "distributions": {"verify_ms": "completion_ms", "draft_step_ms": "round_ms"},
    "controller": {"verify_ms": "completion_ms", "draft_step_ms": "round_ms", "draft_steps_planned": "rounds_planned"},
}
CONTROLLER_STATE = {"completion": "verify_ms", "rounds": "draft_steps"}  # old -> new, in the file of an earlier start
OLD_SETTINGS = "knobs"  # what an evaluation's settings had for its options
SYSTEMS = {"bounded": "early-exit", "idle": "ramps-only"}  # of the evaluation, old -> new


def with_new_names(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`given` with its old names replaced; ValueError where old and new say different things."""
    renamed = dict(given)
    for old, new in names.items():
        if old not in renamed:
            continue
        value = renamed.pop(old)
        if renamed.setdefault(new, value) != value:
            raise ValueError(f"{old}: the old name of {new}, which says something else")
        warn(old, new)
    return renamed


def beside_old_names(status: dict[str, Any]) -> dict[str, Any]:
    """The worker's status, with the names that its figures had."""
    told = dict(status)
    for part in STATUS.keys() & status.keys():
        figures = status[part]
        told[part] = {**figures, **{old: figures[new] for new, old in STATUS[part].items() if new in figures}}
    return told


def system_of_old(name: str) -> str:
    """Of an evaluation's results: `bounded 0.05` is early-exit-0.05 now, and so is `epsilon=0.05`."""
    kind, _, bound = name.replace("epsilon=", "bounded ").partition(" ")
    if kind not in SYSTEMS:
        return name
    return "-".join(part for part in (SYSTEMS[kind], bound) if part)


def warn(old: str, new: str) -> None:
    """Once, this process, what it becomes and its children taken together."""
    told = os.environ.get(TOLD_VARIABLE, "").split(",")
    if old in told:
        return
    os.environ[TOLD_VARIABLE] = ",".join([*filter(None, told), old])
    logging.getLogger("vllm.apparate").warning("%s is called %s now; the old name goes with version 0.3", old, new)
