"""`apparate-llm prepare`: the stages one after another, each left on disk and used again by the next run."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from apparate_llm.files import replacing
from apparate_llm.ramps.checkpoint import VOCABULARY, BaseModelInfo, save_ramps
from apparate_llm.ramps.prepare.calibrate import calibrate_rounds
from apparate_llm.ramps.prepare.engine import ELEMENT_SIZE, context_length, generation_engine
from apparate_llm.ramps.prepare.evaluate import ceiling
from apparate_llm.ramps.prepare.profile import profile
from apparate_llm.ramps.prepare.report import write_report
from apparate_llm.ramps.prepare.rows import Rows, bytes_per_row, load_rows
from apparate_llm.ramps.prepare.synthesise import (
    KINDS,
    Messages,
    Synthesiser,
    answer_tokens,
    group_files,
    kinds_of,
    synthesise,
)
from apparate_llm.ramps.prepare.train import (
    BaseParts,
    Measured,
    RoundData,
    TrainSettings,
    measure_head,
    ramp_vocabulary,
    starts,
    train_head,
)
from apparate_llm.ramps.prepare.workspace import Workspace

GROUP_SIZE = 320  # conversations; what a kill can cost
MAX_PROMPT_TOKENS = 96
MAX_ANSWER_TOKENS = 320
MAX_ROWS_GIB = 6.0  # of training rows in memory; what is more stays unused
MOST_EPOCHS, FEWEST_EPOCHS = 3.0, 1.5  # of the first depth; the others start from it and take half as many
ENOUGH_ROWS = 1_280_000  # seen by then, more epochs overfit few rows and only cost time with many
SYNTHESIS_SHARE = 0.55  # of the time budget
TRAINING_SHARE = 0.38
TYPICAL_ANSWER_TOKENS = 150  # for the estimate of disk use


@dataclass(frozen=True, slots=True)
class Plan:
    model: Path
    out: Path
    depths: tuple[int, ...]
    inner: tuple[int, ...]
    tokens: int | None  # answer tokens to synthesise, or
    time_budget_s: float | None
    seed: int
    ramp_vocab: int
    intermediate_size: int
    user_prompts: list[Messages] = field(default_factory=list)
    enforce_eager: bool = False  # profile without compilation

    @property
    def states(self) -> tuple[int, ...]:
        """Depths whose residual stream is recorded."""
        return tuple(sorted({depth for depth in (*self.depths, *self.inner) if depth > 0}))


def automatic_depths(num_layers: int) -> tuple[int, ...]:
    """Right after the embedding, and a tenth of the model's depth: deeper rounds cost more than they bring."""
    return (0, max(1, round(num_layers / 12)))


def automatic_inner(num_layers: int) -> tuple[int, ...]:
    return (num_layers // 2, num_layers * 3 // 4)


def automatic_intermediate_size(hidden_size: int) -> int:
    return math.ceil(hidden_size * 8 / 3 / 64) * 64


@dataclass(slots=True)
class _Run:
    plan: Plan
    workspace: Workspace
    base: BaseModelInfo
    console: Console
    progress: Progress

    def say(self, text: str) -> None:
        self.console.print(text)


def prepare(plan: Plan) -> None:
    """Leaves a ramp folder with its report in `plan.out`; raises ValueError for bad input, RuntimeError otherwise."""
    console = Console(stderr=True)
    workspace = Workspace(plan.out)
    with workspace.locked(), _progress(console) as progress:
        run = _Run(plan, workspace, BaseModelInfo.of(plan.model), console, progress)
        _say_needs(run)
        rows_record = _synthesise(run)
        trained: dict[int, dict[str, Any]] = {}
        for depth in plan.depths:
            trained[depth] = _train(run, rows_record, depth, after=plan.depths[0] if trained else None)
        calibration = _calibrate(run, trained)
        folder = _draft(run, rows_record, trained, calibration)
        profiled = _profile(run, folder, trained)
        report = write_report(plan.out, run.base, plan.model.name, rows_record, trained, calibration, profiled)
        _finish(run, folder, rows_record, trained, calibration, default_depth=report["advice"]["depth"])
        console.print(report["advice"]["sentence"], style="bold")
        console.print(f"ramps: {plan.out}  report: {plan.out / 'report.html'}")
        console.print(f"{plan.out / 'work'} is only needed to go on with more tokens; delete it to free the space")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
        console=console,
    )


# ---- what it will take


def disk_bytes(plan: Plan, base: BaseModelInfo, tokens: int) -> int:
    """Expected size of `out/work` with `tokens` answer tokens: rows, and a checkpoint of each depth's training."""
    rows = tokens * (1 + 1 / TYPICAL_ANSWER_TOKENS)
    text = tokens * 4 * 2
    parameters = (
        (1 + len(plan.inner)) * base.hidden_size**2
        + 3 * base.hidden_size**2
        + 3 * base.hidden_size * plan.intermediate_size
    )
    checkpoints = len(plan.depths) * (parameters * 4 * 4 + rows * 8)  # weights, two moments, best; order of the rows
    row = bytes_per_row(base.hidden_size, len(plan.states), ELEMENT_SIZE)
    return int(rows * row + text + checkpoints)


def _say_needs(run: _Run) -> None:
    plan = run.plan
    loaded = bytes_per_row(run.base.hidden_size, 1 + len(plan.inner), ELEMENT_SIZE)
    if plan.tokens is not None:
        tokens, need = plan.tokens, disk_bytes(plan, run.base, plan.tokens)
        memory = min(MAX_ROWS_GIB, tokens * loaded / 2**30)
        run.say(
            f"{tokens:,} answer tokens need {gib(need)} of disk in {plan.out / 'work'} and "
            f"{gib(memory * 2**30)} of memory for training rows"
        )
        _check_space(plan.out, need)
    else:
        per_million = disk_bytes(plan, run.base, 1_000_000)
        run.say(
            f"each million answer tokens needs {per_million / 2**30:.1f} GiB of disk in {plan.out / 'work'}; "
            f"training keeps at most {MAX_ROWS_GIB:.0f} GiB of rows in memory"
        )


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _check_space(out: Path, need: int) -> None:
    import shutil

    have = sum(path.stat().st_size for path in (out / "work").iterdir() if path.is_file())
    free = shutil.disk_usage(out).free
    if need - have > free:
        raise ValueError(f"not enough disk space in {out}: {need / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")


# ---- stages


def _synthesise(run: _Run) -> dict[str, Any]:
    """Stages synthesise and collect: groups of conversations with their rows."""
    plan, workspace = run.plan, run.workspace
    fixed = {
        "fingerprint": run.base.fingerprint,
        "states": list(plan.states),
        "seed": plan.seed,
        "user_prompts": plan.user_prompts,
    }
    started = workspace.inputs("rows-settings")
    if started is not None and started != json.loads(json.dumps(fixed)):
        different = [name for name in fixed if started.get(name) != fixed[name]]
        raise ValueError(
            f"{plan.out} holds a preparation with other settings ({', '.join(different)}): go on with the same ones, "
            f"or choose another --out, or delete {workspace.folder}"
        )
    workspace.write("rows-settings", fixed, {})
    wanted = {**fixed, "tokens": plan.tokens, "time_budget_s": plan.time_budget_s}
    if (done := workspace.read("rows", wanted)) is not None and len(group_files(workspace.folder)) >= done["groups"]:
        run.say(f"synthesise: done, {done['tokens']:,} answer tokens")
        return done
    clock = workspace.read("rows-clock", {}) or {"seconds": 0.0}
    limit_s = math.inf if plan.time_budget_s is None else plan.time_budget_s * SYNTHESIS_SHARE
    have = sum(answer_tokens(path) for path in group_files(workspace.folder))
    target = plan.tokens if plan.tokens is not None else math.inf
    task = run.progress.add_task("synthesise", total=plan.tokens or limit_s, facts="starting the model")
    began = time.monotonic()

    def spent_s() -> float:
        return clock["seconds"] + time.monotonic() - began

    def on_tokens(made: int) -> None:
        nonlocal have
        have += made
        workspace.write("rows-clock", {}, {"seconds": spent_s()})
        run.progress.update(task, completed=have if plan.tokens else spent_s(), facts=f"{have:,} tokens")

    if have < target and spent_s() < limit_s:
        with generation_engine(plan.model, seed=plan.seed) as llm:
            on_tokens(0)
            synthesiser = Synthesiser(
                llm,
                workspace.folder,
                depths=plan.states,
                user_prompts=plan.user_prompts,
                group_size=group_size(plan),
                max_prompt_tokens=MAX_PROMPT_TOKENS,
                max_answer_tokens=min(MAX_ANSWER_TOKENS, context_length(plan.model) // 2),
                seed=plan.seed,
            )
            synthesise(synthesiser, num_tokens=target, deadline=lambda: spent_s() >= limit_s, on_tokens=on_tokens)
    run.progress.remove_task(task)
    files = group_files(workspace.folder)
    run.say(f"synthesise: {have:,} answer tokens in {len(files)} groups")
    return workspace.write("rows", wanted, {"tokens": have, "groups": len(files), "seconds": round(spent_s())})


def group_size(plan: Plan) -> int:
    if plan.tokens is None:
        return GROUP_SIZE
    return max(8, min(GROUP_SIZE, plan.tokens // (4 * TYPICAL_ANSWER_TOKENS)))


def epochs_for(tokens: int) -> float:
    return round(min(MOST_EPOCHS, max(FEWEST_EPOCHS, ENOUGH_ROWS / tokens)), 2)


def _load(run: _Run, groups: int, depths: tuple[int, ...]) -> tuple[Rows, list[str]]:
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


def _train(run: _Run, rows_record: dict[str, Any], depth: int, *, after: int | None) -> dict[str, Any]:
    """Stage train: head-DEPTH.safetensors, its held-out measurements and the training record. Starts from the head of
    depth `after`, if given."""
    plan, workspace = run.plan, run.workspace
    part = 1.0 if after is None else 0.5
    budget_s = math.inf if plan.time_budget_s is None else plan.time_budget_s * TRAINING_SHARE
    share_s = budget_s * part / (0.5 + 0.5 * len(plan.depths))
    settings = TrainSettings(
        depth=depth,
        inner=plan.inner,
        intermediate_size=plan.intermediate_size,
        epochs=epochs_for(rows_record["tokens"]) * part,
        time_budget_s=share_s,
        seed=plan.seed,
    )
    inputs = {
        "groups": rows_record["groups"],
        "fingerprint": run.base.fingerprint,
        "ramp_vocab": plan.ramp_vocab,
        "settings": repr(settings),
        "after": after,
    }
    stage = f"train-{depth}"
    if (done := workspace.read(stage, inputs)) is not None:
        run.say(f"train depth {depth}: done")
        return done
    if workspace.inputs(f"{stage}-started") != json.loads(json.dumps(inputs)):
        workspace.path(f"{stage}.pt").unlink(missing_ok=True)  # of a training on other rows
        workspace.write(f"{stage}-started", inputs, {})
    needed = tuple(sorted({d for d in (depth, *plan.inner) if d > 0}))
    rows, kinds = _load(run, rows_record["groups"], needed)
    base = BaseParts.of(plan.model)
    vocabulary = ramp_vocabulary(rows, plan.ramp_vocab)
    task = run.progress.add_task(f"train depth {depth}", total=1.0, facts="")

    def on_progress(done_frac: float, facts: dict[str, float]) -> None:
        text = f"loss {facts['loss']:.3f}, {max(facts['held_out_tokens_per_cycle'], 0):.3f} exits per cycle held out"
        run.progress.update(task, completed=done_frac, facts=text)

    head, record = train_head(
        rows,
        base,
        vocabulary,
        settings,
        initial=None if after is None else _head_tensors(workspace, after)[0],
        checkpoint=workspace.path(f"{stage}.pt"),
        on_progress=on_progress,
    )
    run.progress.remove_task(task)
    data = RoundData(rows, base, depth=depth, inner=plan.inner, vocabulary=vocabulary)
    measured = measure_head(head, data, starts(rows, held_out=True))
    held_out = rows.top_ids[starts(rows, held_out=True), 0].long()
    tensors = {name: value.contiguous() for name, value in head.state_dict().items() if name != "head"}
    _save_tensors(workspace.path(f"head-{depth}.safetensors"), tensors | {VOCABULARY: vocabulary.int()})
    _save_measured(workspace.path(f"measured-{depth}.safetensors"), measured, rows, kinds)
    run.say(
        f"train depth {depth}: {record['steps']} steps, held-out agreement "
        + " ".join(f"{float(part.agrees.float().mean()) if len(part.agrees) else 0.0:.3f}" for part in measured)
    )
    return workspace.write(
        stage,
        inputs,
        {
            **record,
            "vocabulary_coverage": round(float(torch.isin(held_out, vocabulary).float().mean()), 4),
            "ceiling": ceiling(rows),
            "settings": repr(settings),
        },
    )


def _head_tensors(workspace: Workspace, depth: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
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


def _calibrate(run: _Run, trained: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Stage calibrate: confidence -> probability of agreement, fitted and checked on held-out conversations."""
    from safetensors.torch import load_file

    results = {}
    for depth in run.plan.depths:
        tensors = load_file(run.workspace.path(f"measured-{depth}.safetensors"))
        results[depth] = calibrate_rounds(tensors)
        run.workspace.write(f"calibrate-{depth}", trained[depth], results[depth])
    return results


def _draft(
    run: _Run, rows_record: dict[str, Any], trained: dict[int, Any], calibration: dict[int, dict[str, Any]]
) -> Path:
    """A ramp folder inside `work`, for the profile."""
    folder = run.workspace.path("ramps")
    _write_ramps(run, folder, rows_record, trained, calibration, default_depth=run.plan.depths[0])
    return folder


def _write_ramps(
    run: _Run,
    folder: Path,
    rows_record: dict[str, Any],
    trained: dict[int, Any],
    calibration: dict[int, dict[str, Any]],
    *,
    default_depth: int,
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for depth in run.plan.depths:
        head, vocabulary = _head_tensors(run.workspace, depth)
        assert VOCABULARY not in tensors or torch.equal(tensors[VOCABULARY], vocabulary), "vocabularies differ"
        tensors[VOCABULARY] = vocabulary
        tensors |= {f"{depth}.{name}": value for name, value in head.items()}
    save_ramps(
        folder,
        tensors,
        kind="fused",
        base_model=run.base,
        depths=list(run.plan.depths),
        default_depth=default_depth,
        ramp_vocab=len(tensors[VOCABULARY]),
        intermediate_size=run.plan.intermediate_size,
        inner=list(run.plan.inner),
        calibration={depth: item["calibration"] for depth, item in calibration.items()},
        training={
            "data": "prompts and answers written by the model itself"
            + (", and the user's prompts" if run.plan.user_prompts else ""),
            "answer_tokens": rows_record["tokens"],
            "seed": run.plan.seed,
            "depths": {
                str(depth): {
                    "rows": record["rows"],
                    "steps": record["steps"],
                    "vocabulary_coverage": record["vocabulary_coverage"],
                    "held_out_agreement": calibration[depth]["agreement"],
                    "held_out_calibration_error": calibration[depth]["calibration_error"],
                }
                for depth, record in trained.items()
            },
        },
    )


def _profile(run: _Run, folder: Path, trained: dict[int, Any]) -> dict[str, Any]:
    """Stage profile: what a completion pass and each depth's round cost on this machine."""
    from apparate_llm.eval.quick import machine

    plan, workspace = run.plan, run.workspace
    here = {key: value for key, value in machine().items() if key in ("cpu", "cores", "packages")}
    inputs = {"machine": here, "heads": trained, "enforce_eager": plan.enforce_eager}
    inputs = json.loads(json.dumps(inputs))
    if (done := workspace.read("profile", inputs)) is not None:
        run.say("profile: done")
        return done
    task = run.progress.add_task("profile", total=1.0, facts="starting the model as it is served")
    result = profile(
        plan.model,
        folder,
        plan.depths,
        enforce_eager=plan.enforce_eager,
        on_progress=lambda done, text: run.progress.update(task, completed=done, facts=text),
    )
    run.progress.remove_task(task)
    run.say("profile: done")
    return workspace.write("profile", inputs, {**result, "machine": here})


def _finish(
    run: _Run,
    folder: Path,
    rows_record: dict[str, Any],
    trained: dict[int, Any],
    calibration: dict[int, dict[str, Any]],
    *,
    default_depth: int,
) -> None:
    _write_ramps(run, run.plan.out, rows_record, trained, calibration, default_depth=default_depth)
