"""Stage train, as part of a preparation: from the rows on disk to a head with its measurements on disk."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from apparate_llm.files import replacing
from apparate_llm.models.quantised_heads import quantised_head
from apparate_llm.prepare.acceptance import accepted_per_step, measure_head
from apparate_llm.prepare.draft_data import BaseParts, DraftData, ramp_vocabulary, starts, thinned, whole_conversations
from apparate_llm.prepare.evaluate import ceiling
from apparate_llm.prepare.plan import Plan, Run
from apparate_llm.prepare.predict import ENOUGH_USERS, USERS_KIND
from apparate_llm.prepare.prompts import KINDS
from apparate_llm.prepare.recorded import measured_tensors
from apparate_llm.prepare.records import MeasuredRecord, SynthesisRecord, TrainingRecord
from apparate_llm.prepare.rows import SPLIT_NAMES, TEST, TRAIN, VALIDATION, Rows
from apparate_llm.prepare.train import MAX_EVALUATED_ROWS, TrainSettings, new_head, train_head, working_copy
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.progress import Stage, rate_of
from apparate_llm.ramps.checkpoint import VOCABULARY
from apparate_llm.ramps.heads import FusedHead

MOST_MEASURED_ROWS, FEWEST_MEASURED_ROWS = 24_000, 2_000  # of each split


def train_depth(
    run: Run,
    rows_record: SynthesisRecord,
    depth: int,
    *,
    lap: int = 0,
    after: int | None,
    epochs: float,
    until_s: float = math.inf,
) -> TrainingRecord:
    """Leaves head-DEPTH.safetensors and the training record, which it returns; all depths train on the same rows.

    Starts from the head of depth `after`, if given, and ends after `epochs` of these rows or at `until_s` of the work
    clock.
    """
    plan, workspace, stage = run.plan, run.workspace, f"train-{depth}-lap-{lap}"
    settings = TrainSettings(
        depth=depth,
        aux_layers=plan.aux_layers,
        intermediate_size=plan.intermediate_size,
        epochs=epochs,
        seed=plan.seed + lap,
    )
    inputs = {
        "rows": rows_record["rows"],
        "fingerprint": run.base.fingerprint,
        "ramp_vocab": plan.ramp_vocab,
        "settings": repr(settings),
        "after": after,
        "lap": lap,
    }
    done: TrainingRecord | None = workspace.read(stage, inputs)
    if done is not None:
        if after not in (None, depth):  # a lap has a line of its own
            run.say(f"train depth {depth}: done")
        return done
    budget_s, until_s = _times(run, stage, inputs, depth, until_s)
    record = _train(run, rows_record, replace(settings, time_budget_s=budget_s), after, until_s)
    run.clock.keep()
    return workspace.write(stage, inputs, record)


def _train(
    run: Run, rows_record: SynthesisRecord, settings: TrainSettings, after: int | None, until_s: float
) -> TrainingRecord:
    """Leaves the head; returns what its training was, with its score on rows that it was trained on."""
    plan, workspace, depth = run.plan, run.workspace, settings.depth
    with run.progress.stage(f"train depth {depth}", total=1.0) as bar:
        rows = run.store.rows(depths=_depths(depth, plan.aux_layers), num_rows=rows_record["rows"])
        base = BaseParts.of(plan.model)
        if after is None or after == depth:
            vocabulary = ramp_vocabulary(rows, plan.ramp_vocab)
        else:  # ramps of one folder share it
            vocabulary = head_tensors(workspace, after)[1].long()
        head, record = train_head(
            rows,
            base,
            vocabulary,
            settings,
            initial=None if after is None else head_tensors(workspace, after)[0],
            checkpoint=workspace.path(f"train-{depth}.pt"),
            on_progress=partial(_tell, bar),
            release=run.store.release,
            left_s=lambda: until_s - run.clock.spent_s,
        )
    tensors = {name: value.contiguous() for name, value in head.state_dict().items() if name != "head"}
    _save_tensors(workspace.path(f"head-{depth}.safetensors"), tensors | {VOCABULARY: vocabulary.int()})
    data = DraftData(rows, base, depth=depth, aux_layers=plan.aux_layers, vocabulary=vocabulary)
    as_many = record["evaluated_rows"] or MAX_EVALUATED_ROWS
    known = measure_head(head, data, thinned(starts(rows, split=TRAIN), as_many))
    run.store.release()
    return {**record, "train_accepted_per_step": round(accepted_per_step(known), 4), "settings": repr(settings)}


def _times(run: Run, stage: str, inputs: Mapping[str, object], depth: int, until_s: float) -> tuple[float, float]:
    """The time budget of a training, and its end on the work clock: as they were when it began, also if it goes on
    after an interruption. Both infinite without a time budget."""
    begun = run.workspace.read(f"{stage}-begun", inputs)
    if begun is None:
        run.workspace.path(f"train-{depth}.pt").unlink(missing_ok=True)  # of a training on other rows
        begun = {"budget_s": None, "until_s": None}
        if math.isfinite(until_s):
            until_s = max(until_s, run.clock.spent_s + 1.0)
            begun = {"budget_s": until_s - run.clock.spent_s, "until_s": until_s}
        run.workspace.write(f"{stage}-begun", inputs, begun)
    budget_s, ends_s = begun["budget_s"], begun.get("until_s")  # the latter not in older ones
    return math.inf if budget_s is None else float(budget_s), math.inf if ends_s is None else float(ends_s)


def _tell(bar: Stage, done_frac: float, facts: dict[str, float]) -> None:
    accepted = max(facts["accepted_per_step"], 0.0)
    score = f"{accepted:.3f} accepted tokens per step on validation rows"
    steps = f"{facts['steps']:.0f} steps, {rate_of(facts['steps_per_s'], 'steps')}"
    bar.update(min(1.0, done_frac), f"{steps}, loss {facts['loss']:.3f}, {score}")


def measure_depth(run: Run, rows_record: SynthesisRecord, depth: int, trained: TrainingRecord) -> MeasuredRecord:
    """Leaves what calibration (validation-DEPTH.safetensors) and the report (measured-DEPTH.safetensors) are made
    from; returns the report's facts."""
    _measure_split(run, rows_record, depth, trained, "validation", VALIDATION)
    return _measure_split(run, rows_record, depth, trained, "measured", TEST)


def _measure_split(
    run: Run, rows_record: SynthesisRecord, depth: int, trained: TrainingRecord, name: str, split: int
) -> MeasuredRecord:
    plan, workspace, stage = run.plan, run.workspace, f"measure-{depth}-{name}"
    inputs = {"trained": trained, "rows": rows_record["rows"]}
    done: MeasuredRecord | None = workspace.read(stage, inputs)
    if done is not None:
        return done
    head, vocabulary = head_tensors(workspace, depth)
    rows = run.store.rows(depths=_depths(depth, plan.aux_layers), num_rows=rows_record["rows"])
    users = torch.nonzero(run.store.kinds() == KINDS.index(USERS_KIND))[:, 0]
    most, all_rows = _affordable_rows(run, trained), starts(rows, split=split)
    index = whole_conversations(rows, all_rows, most, first=users, num_first=ENOUGH_USERS)
    unit = f"{SPLIT_NAMES[split]} rows"
    with run.progress.stage(f"measure depth {depth}", total=len(index), unit=unit, often_brief=True) as bar:
        bar.update(0)
        base, dtype = BaseParts.of(plan.model), rows.final.dtype
        data = DraftData(rows, base, depth=depth, aux_layers=plan.aux_layers, vocabulary=vocabulary.long())
        served = quantised_head(_restored(head, base, vocabulary.long(), plan, dtype), dtype)
        measured = measure_head(served, data, index, on_rows=bar.update)
    tensors = measured_tensors(measured, rows, run.store.kinds())
    _save_tensors(workspace.path(f"{name}-{depth}.safetensors"), tensors)
    covered = torch.isin(rows.top_ids[index, 0].long(), vocabulary.long()).float()
    result: MeasuredRecord = {
        "held_out_accepted_per_step": round(accepted_per_step(measured), 4),
        "acceptance_rates": [float(part.agrees.float().mean()) if len(part.agrees) else 0.0 for part in measured],
        "vocabulary_coverage": round(float(covered.mean()), 4) if len(covered) else 0.0,
        "ceiling": ceiling(_part(rows, index)),
    }
    run.store.release()
    return workspace.write(stage, inputs, result)


def _affordable_rows(run: Run, trained: TrainingRecord) -> int:
    """By how fast the training evaluated."""
    spent_s, evaluated = trained.get("evaluate_s"), trained.get("evaluated_rows")
    if not spent_s or not evaluated:
        return MOST_MEASURED_ROWS
    most = run.schedule.measure_s * evaluated / spent_s
    return int(min(MOST_MEASURED_ROWS, max(FEWEST_MEASURED_ROWS, most)))


def _restored(
    head: dict[str, torch.Tensor], base: BaseParts, vocabulary: torch.Tensor, plan: Plan, dtype: torch.dtype
) -> FusedHead:
    """A trained head from its tensors, as it is served."""
    settings = TrainSettings(depth=0, aux_layers=plan.aux_layers, intermediate_size=plan.intermediate_size)
    made = new_head(base, vocabulary, settings)
    made.load_state_dict({name: value.float() for name, value in head.items()}, strict=False)
    return working_copy(made, dtype)


def _part(rows: Rows, index: torch.Tensor) -> Rows:
    """Some of the rows, without their states."""
    few = {name: getattr(rows, name)[index] for name in Rows._fields if name not in ("states", "final")}
    return Rows(**few, states={}, final=torch.empty(0))


def _depths(depth: int, aux_layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({number for number in (depth, *aux_layers) if number > 0}))


def head_tensors(workspace: Workspace, depth: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights of a trained head and its vocabulary."""
    from safetensors.torch import load_file

    head = load_file(workspace.path(f"head-{depth}.safetensors"))
    vocabulary = head.pop(VOCABULARY)
    return head, vocabulary


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(tensors, temporary)
