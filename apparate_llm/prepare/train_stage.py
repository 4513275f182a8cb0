"""Stage train, as part of a preparation: from the rows on disk to a head with its held-out measurements on disk."""

import math
from pathlib import Path
from typing import Any

import torch

from apparate_llm.files import replacing
from apparate_llm.models.packing import for_serving
from apparate_llm.prepare.engine import ELEMENT_SIZE
from apparate_llm.prepare.evaluate import ceiling
from apparate_llm.prepare.plan import MAX_ROWS_GIB, Run, epochs_for
from apparate_llm.prepare.rows import Rows, bytes_per_row, load_rows
from apparate_llm.prepare.synthesise import KINDS, answer_tokens, group_files, kinds_of
from apparate_llm.prepare.train import (
    BaseParts,
    Measured,
    RoundData,
    TrainSettings,
    measure_head,
    ramp_vocabulary,
    starts,
    train_head,
)
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.ramps.checkpoint import VOCABULARY

TRAINING_SHARE = 0.38  # of the time budget


def train_depth(run: Run, rows_record: dict[str, Any], depth: int, *, after: int | None) -> dict[str, Any]:
    """Leaves head-DEPTH.safetensors, measured-DEPTH.safetensors and the training record, which it returns. Starts from
    the head of depth `after`, if given."""
    plan, workspace, stage = run.plan, run.workspace, f"train-{depth}"
    settings = _settings(run, rows_record, depth, first=after is None)
    inputs = {
        "groups": rows_record["groups"],
        "fingerprint": run.base.fingerprint,
        "ramp_vocab": plan.ramp_vocab,
        "settings": repr(settings),
        "after": after,
    }
    if (done := workspace.read(stage, inputs)) is not None:
        run.say(f"train depth {depth}: done")
        return done
    if not workspace.made_from(f"{stage}-started", inputs):
        workspace.path(f"{stage}.pt").unlink(missing_ok=True)  # of a training on other rows
        workspace.write(f"{stage}-started", inputs, {})
    rows, kinds = _load(run, rows_record["groups"], tuple(sorted({d for d in (depth, *plan.inner) if d > 0})))
    base, vocabulary = BaseParts.of(plan.model), ramp_vocabulary(rows, plan.ramp_vocab)
    task = run.progress.add_task(f"train depth {depth}", total=1.0, facts="")

    def on_progress(done_frac: float, facts: dict[str, float]) -> None:
        text = f"loss {facts['loss']:.3f}, {max(facts['held_out_tokens_per_cycle'], 0):.3f} exits per cycle held out"
        run.progress.update(task, completed=done_frac, facts=text)

    initial = None if after is None else head_tensors(workspace, after)[0]
    checkpoint = workspace.path(f"{stage}.pt")
    head, record = train_head(
        rows, base, vocabulary, settings, initial=initial, checkpoint=checkpoint, on_progress=on_progress
    )
    run.progress.remove_task(task)
    held_out = starts(rows, held_out=True)
    data = RoundData(rows, base, depth=depth, inner=plan.inner, vocabulary=vocabulary)
    measured = measure_head(for_serving(head, rows.final.dtype), data, held_out)
    tensors = {name: value.contiguous() for name, value in head.state_dict().items() if name != "head"}
    _save_tensors(workspace.path(f"head-{depth}.safetensors"), tensors | {VOCABULARY: vocabulary.int()})
    _save_measured(workspace.path(f"measured-{depth}.safetensors"), measured, rows, kinds)
    agreement = [float(part.agrees.float().mean()) if len(part.agrees) else 0.0 for part in measured]
    rounds = " ".join(f"{value:.3f}" for value in agreement)
    run.say(f"train depth {depth}: {record['steps']} steps, held-out agreement {rounds}")
    covered = torch.isin(rows.top_ids[held_out, 0].long(), vocabulary).float().mean()
    record |= {"vocabulary_coverage": round(float(covered), 4), "ceiling": ceiling(rows), "settings": repr(settings)}
    return workspace.write(stage, inputs, record)


def _settings(run: Run, rows_record: dict[str, Any], depth: int, *, first: bool) -> TrainSettings:
    """Every depth after the first takes half as long: it starts from the first one's head."""
    plan, part = run.plan, 1.0 if first else 0.5
    budget_s = math.inf if plan.time_budget_s is None else plan.time_budget_s * TRAINING_SHARE
    return TrainSettings(
        depth=depth,
        inner=plan.inner,
        intermediate_size=plan.intermediate_size,
        epochs=epochs_for(rows_record["tokens"]) * part,
        time_budget_s=budget_s * part / (0.5 + 0.5 * len(plan.depths)),
        seed=plan.seed,
    )


def _load(run: Run, groups: int, depths: tuple[int, ...]) -> tuple[Rows, list[str]]:
    """Rows of as many groups as fit in memory, and the kind of each conversation's prompt."""
    files = group_files(run.workspace.folder)[:groups]
    row = bytes_per_row(run.base.hidden_size, len(depths), ELEMENT_SIZE)
    limit = int(MAX_ROWS_GIB * 2**30 / row)
    tokens = kept = 0
    for path in files:
        tokens += answer_tokens(path)
        if kept and tokens > limit:
            run.say(
                f"only {kept} of {len(files)} groups fit in {MAX_ROWS_GIB:.0f} GiB of memory; the rest stays unused"
            )
            break
        kept += 1
    return load_rows(files[:kept], depths=depths), [kind for path in files[:kept] for kind in kinds_of(path)]


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


def _save_measured(path: Path, measured: list[Measured], rows: Rows, kinds: list[str]) -> None:
    kind_of = torch.tensor([KINDS.index(kind) for kind in kinds], dtype=torch.int8)
    tensors: dict[str, torch.Tensor] = {}
    for number, part in enumerate(measured):
        conversations = rows.conversations[part.rows]
        tensors |= {
            f"{number}.confidence": part.confidence,
            f"{number}.agrees": part.agrees,
            f"{number}.conversation": conversations,
            f"{number}.kind": kind_of[conversations.long()],
        }
    _save_tensors(path, tensors)
