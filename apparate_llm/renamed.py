"""Names of versions 0.1 and 0.2. Those that users give are taken until 0.3, each with a warning; those in files that we
wrote ourselves are read without."""

import logging
import os
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
WARNED_VARIABLE = "APPARATE_OLD_NAMES_WARNED"
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
    "counts": {
        "verification_passes": "completion_passes",
        "draft_steps": "rounds",
        "divergences": "diverged",
        "accepted_divergences": "accepted_diverged",
        "released_divergences": "released_diverged",
        "lookup_exits": "copied",
    },
    "distributions": {"verify_ms": "completion_ms", "draft_step_ms": "round_ms"},
    "controller": {"verify_ms": "completion_ms", "draft_step_ms": "round_ms", "draft_steps_planned": "rounds_planned"},
}
CALIBRATIONS = {f"prompt lookup, {how}": f"copied, {how}" for how in ("greedy", "sampled")}  # new -> old
TENANT = {"divergences": "diverged"}  # of each tenant in the status, new -> old
ORIGINS = {"held_diverged": "held_divergence", "released_diverged": "released_divergence"}  # in reports, old -> new
OLD_AUX_LAYERS = "inner"  # what the manifest of ramps had for its aux_layers
CONTROLLER_STATE = {"completion": "verify_ms", "rounds": "draft_steps"}  # old -> new, in the file of an earlier start
PREPARATION = {  # old -> new, in the records of a preparation and of a manifest's training
    "completion": "verify",
    "completion_ms": "verify_ms",
    "round": "draft_step",
    "round_ms": "draft_step_ms",
    "agreement": "acceptance_rates",
    "spread_frac": "error_frac",
    "copy_agreement": "lookup_agreement",
    "held_out_agreement": "held_out_acceptance_rates",
    **{f"{rows}_tokens_per_cycle": f"{rows}_accepted_per_step" for rows in ("train", "validation", "held_out")},
}
ROW_COLUMNS = {"copied": "lookup_tokens", "copy_lengths": "lookup_lengths"}  # old -> new, of a preparation's rows
POSITION = {"agreement": "acceptance_rate", "agreement_all_rows": "acceptance_rate_all_rows"}  # old -> new
TRAIN_SETTINGS = {"inner": "aux_layers", "round_weights": "step_weights"}  # old -> new, in their repr
OLD_SETTINGS = "knobs"  # what an evaluation's settings had for its options
SYSTEMS = {"bounded": "early-exit", "idle": "ramps-only"}  # of the evaluation, old -> new


def with_new_names(given: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
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
    both = dict(status)
    for part in STATUS.keys() & status.keys():
        both[part] = _with_old_names(status[part], STATUS[part])
    if "calibration" in (controller := both.get("controller", {})):
        both["controller"] = {**controller, "calibration": _with_old_names(controller["calibration"], CALIBRATIONS)}
    if "tenants" in status:
        both["tenants"] = {name: _with_old_names(share, TENANT) for name, share in status["tenants"].items()}
    return both


def _with_old_names(figures: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    return {**figures, **{old: figures[new] for new, old in names.items() if new in figures}}


def counts_of_any_version(status_counts: Mapping[str, T]) -> dict[str, T]:
    """Of a status, or of a stored block of an evaluation: by the new names only."""
    old = {old: new for new, old in STATUS["counts"].items()}
    return {old.get(name, name): value for name, value in status_counts.items()}


def of_any_preparation(record: Any) -> Any:
    """A record of a preparation by its new names, whichever version wrote it."""
    if isinstance(record, list):
        return [of_any_preparation(item) for item in record]
    if not isinstance(record, dict):
        return record
    renamed = {PREPARATION.get(name, name): of_any_preparation(item) for name, item in record.items()}
    if isinstance(settings := renamed.get("settings"), str):
        for old, new in TRAIN_SETTINGS.items():
            settings = settings.replace(f" {old}=", f" {new}=")
        renamed["settings"] = settings
    return renamed


def depth_of_any_evaluation(result: dict[str, Any]) -> dict[str, Any]:
    """One depth's results of `ramps evaluate`, or of a preparation's report, by their new names, whichever version
    wrote them."""
    if "rounds" not in result:
        return result
    renamed = {name: value for name, value in result.items() if name not in ("rounds", "tokens_per_cycle")}
    renamed["positions"] = [
        {
            "position": part["round"] - 1,
            **{new: part[old] for old, new in POSITION.items() if old in part},
            "rows": part["rows"],
        }
        for part in result["rounds"]
    ]
    renamed["accepted_per_step"] = result["tokens_per_cycle"]
    if "by_category" in result:
        renamed["by_category"] = {
            category: {str(int(number) - 1): rate for number, rate in rates.items()}
            for category, rates in result["by_category"].items()
        }
    return renamed


def system_of_old(name: str) -> str:
    """Of an evaluation's results: `bounded 0.05` is early-exit-0.05 now, and so is `epsilon=0.05`."""
    kind, _, bound = name.replace("epsilon=", "bounded ").partition(" ")
    if kind not in SYSTEMS:
        return name
    return "-".join(part for part in (SYSTEMS[kind], bound) if part)


def warn(old: str, new: str) -> None:
    """Once, this process, what it becomes and its children taken together."""
    warned = os.environ.get(WARNED_VARIABLE, "").split(",")
    if old in warned:
        return
    os.environ[WARNED_VARIABLE] = ",".join([*filter(None, warned), old])
    logging.getLogger("vllm.apparate").warning("%s is called %s now; the old name goes with version 0.3", old, new)
