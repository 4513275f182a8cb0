"""`apparate-llm prepare`: the stages one after another, each left on disk and used again by the next run."""

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from pickle import UnpicklingError

import torch
from rich.console import Console
from safetensors import SafetensorError

from apparate_llm.eval.prompts import Prompt
from apparate_llm.naming import model_name
from apparate_llm.prepare.calibrate import calibrate_positions
from apparate_llm.prepare.needs import disk_left, gib, say_needs
from apparate_llm.prepare.peak_memory import PeakMemory
from apparate_llm.prepare.plan import Made, Plan, Run
from apparate_llm.prepare.profile_stage import measure_costs, seconds_of_row
from apparate_llm.prepare.prompts import KINDS
from apparate_llm.prepare.recorded import Recorded, recorded
from apparate_llm.prepare.records import CalibrationRecord, Report, SynthesisRecord, TrainingRecord
from apparate_llm.prepare.report import write_report
from apparate_llm.prepare.rows import SPLIT_NAMES
from apparate_llm.prepare.schedule import (
    STOP_BELOW,
    Lap,
    WorkClock,
    after_doublings,
    epochs_of_lap,
    epochs_of_other_depth,
    outlook,
    point,
    shifted,
    tpt_saved,
    train_until_s,
    what_is_short,
    without_more_rows,
)
from apparate_llm.prepare.store import RowStore
from apparate_llm.prepare.synthesise_stage import start_that_counts, synthesise_lap
from apparate_llm.prepare.train import BATCH_ROWS
from apparate_llm.prepare.train_stage import head_tensors, measure_depth, train_depth
from apparate_llm.prepare.verify import verify
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.progress import Progress
from apparate_llm.ramps.checkpoint import VOCABULARY, BaseModelInfo, save_ramps
from apparate_llm.ramps.sketch import Sketch

NO_ROOM_FOR_MORE = "The disk was full: with more room the same command goes on."
FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_SAID = 240  # characters of another's error


def prepare(plan: Plan, console: Console | None = None) -> Report:
    """Leaves a ramp folder with its report in `plan.out`, and returns the report; raises ValueError for bad input,
    RuntimeError otherwise. What is refused costs nothing of the time budget, nor does `--verify`."""
    workspace = Workspace(plan.out)
    console = console or Console(stderr=True)
    with (
        workspace.locked(),
        disk_errors(plan.out),
        PeakMemory() as memory,
        running(plan, workspace, console) as run,
    ):
        check_settings(run)
        say_needs(run)
        with run.clock:
            report, made = _prepared(run)
            run.say(f"peak memory was {gib(memory.peak_bytes)}, pages of files left out")
            run.say(report["advice"]["sentence"])
            run.say(made.outlook)
            run.clock.stop()
            if plan.verify:
                prompts = [Prompt(messages) for messages in plan.user_prompts]
                kept = workspace.path("verify")
                report = verify(plan.out, plan.model, report, prompts=prompts, progress=run.progress, keep=kept)
                run.say(report["verified"]["sentence"])
        return report


def _prepared(run: Run) -> tuple[Report, Made]:
    """All that the time budget is for."""
    plan = run.plan
    profiled = measure_costs(run)
    run.begins_s, run.row_s = profiled.pop("until_s"), seconds_of_row(profiled)
    run.trained_row_s = profiled.pop("trained_row_s", 0.0)
    made = _laps(run)
    _other_depths(run, made)
    for depth in plan.depths:
        made.measured[depth] = measure_depth(run, made.rows, depth, made.trained[depth])
        made.calibration[depth] = _calibrate(run, depth)
        made.conversations[depth] = _conversations(run, depth, made.calibration[depth])
    with run.progress.stage("predict", total=math.inf, facts="simulating a server", often_brief=True):
        report = write_report(plan.out, run.base, model_name(plan.model), made, profiled)
    _write_ramps(run, plan.out, made, default_depth=report["advice"]["depth"])
    return report, made


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A full disk, or a damaged file of the preparation, as one line that says how to go on."""
    try:
        yield
    except Exception as error:
        if (where := _full_disk(error, out)) is not None:
            raise no_space_left(where) from None
        if isinstance(error, SafetensorError | UnpicklingError | EOFError):
            why = " ".join(str(error).split())[:100]
            raise ValueError(f"a damaged file in {out / 'work'} ({why}): delete that folder to begin anew") from None
        raise


def no_space_left(where: object) -> RuntimeError:
    return RuntimeError(
        f"no space left in {where}: make room and give the same command again, what is finished is kept"
    )


def _full_disk(error: Exception, out: Path) -> str | None:
    """Where there was no room, if that is what failed: safetensors and torch wrap the system's error in ones of their
    own, or raise another while they tidy up, and of another process there is what it said."""
    chain = list(_with_causes(error))
    refused = [one for one in chain if isinstance(one, OSError) and one.errno in FULL]
    if refused:
        names = [one.filename for one in refused if isinstance(one.filename, str | bytes | os.PathLike)]
        return str(_disk_of(Path(os.fsdecode(names[0])), out) if names else out)
    messages = [str(one) for one in chain if any(os.strerror(code) in str(one) for code in FULL)]
    return f"{out} or elsewhere ({_in_short(messages[0])})" if messages else None


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_of(file: Path, out: Path) -> Path:
    """The folder to make room in."""
    return out if file.resolve().is_relative_to(out.resolve()) else file.resolve().parent


def _in_short(message: str) -> str:
    """How it begins, which names a log where there is one, and its line about the disk, which may name a file."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    full = next(line for line in lines if any(os.strerror(code) in line for code in FULL))
    return lines[0][:MOST_SAID] if full == lines[0] else f"{lines[0][:MOST_SAID]} ... {full[-MOST_SAID:]}"


@contextmanager
def running(plan: Plan, workspace: Workspace, console: Console) -> Iterator[Run]:
    """It goes on in its budget of time, and in what it says, where an earlier start was stopped. The clock is to be
    entered when the work begins."""
    clock = WorkClock(workspace)

    def left_s() -> float | None:
        if plan.time_budget_s is None or clock.is_stopped:
            return None
        return max(0.0, plan.time_budget_s - clock.spent_s)

    with Progress(console, left_s=left_s, before_s=clock.before_s) as progress:
        yield Run(plan, workspace, RowStore(workspace.path("rows")), BaseModelInfo.of(plan.model), clock, progress)


def check_settings(run: Run) -> None:
    """A preparation goes on with the settings it began with; raises ValueError otherwise."""
    plan, workspace = run.plan, run.workspace
    fixed = {
        "format": 2,
        "fingerprint": run.base.fingerprint,
        "states": list(plan.states),
        "seed": plan.seed,
        "user_prompts": plan.user_prompts,
    }
    started = workspace.inputs("rows-settings")
    if started is not None and not workspace.made_from("rows-settings", fixed):
        different = [name for name in fixed if started.get(name) != fixed[name]]
        raise ValueError(
            f"{plan.out} holds a preparation with other settings ({', '.join(different)}): go on with the same ones, "
            f"or choose another --out, or delete {workspace.folder}"
        )
    workspace.write("rows-settings", fixed, {})


def _laps(run: Run) -> Made:
    """Synthesis and the first depth's training in turn, each lap with twice of what the last one had. A full disk
    makes a lap the last one."""
    run.start_s = start_that_counts(run)
    records: list[TrainingRecord] = []
    short = "neither"
    for number in count():
        lap = run.schedule.laps()[number]
        if lap.last:
            lap = shifted(lap, run.clock.spent_s, run.schedule.work_s, short)
        rows = synthesise_lap(run, lap)
        if is_full := rows.get("disk_is_full", False):
            lap = without_more_rows(lap, run.schedule)
        elif not number:  # its start may have told that there can be no other
            lap = run.schedule.laps()[number]
        if missing := _splits_without_rows(run, rows):
            if is_full or disk_left(run) <= 0:
                raise no_space_left(run.plan.out)
            if not lap.last:
                continue
            raise RuntimeError(
                f"{rows['tokens']:,} answer tokens are too few, none are for {missing[0]}: give more tokens or time"
            )
        record = _train_lap(run, lap, rows, is_first=not records)
        records.append(record)
        run.trained_row_s = _seconds_of_trained_row(record) or run.trained_row_s
        scores = [point(record) for record in records]
        short = what_is_short(record["train_accepted_per_step"], scores[-1])
        _say_lap(run, lap, rows, record, short)
        if not lap.last and _is_enough(scores):
            run.say("The next lap would bring next to nothing: this is enough.")
        elif not lap.last:
            continue
        text = NO_ROOM_FOR_MORE if is_full else outlook(scores, run.clock.spent_s, short)
        return Made(rows, trained={run.plan.depths[0]: record}, outlook=text)
    raise AssertionError("a last lap ends the laps")


def _train_lap(run: Run, lap: Lap, rows: SynthesisRecord, *, is_first: bool) -> TrainingRecord:
    depth = run.plan.depths[0]
    return train_depth(
        run,
        rows,
        depth,
        lap=lap.number,
        after=None if is_first else depth,
        epochs=epochs_of_lap(lap, rows["tokens"]),
        until_s=train_until_s(lap, run.clock.spent_s, run.schedule.work_s),
    )


def _seconds_of_trained_row(record: TrainingRecord) -> float:
    return record["seconds"] / (max(1, record["steps"]) * BATCH_ROWS)


def _splits_without_rows(run: Run, rows: SynthesisRecord) -> list[str]:
    if not rows["rows"]:
        return list(SPLIT_NAMES)
    present = set(run.store.column("split", rows["rows"]).unique().tolist())
    return [name for split, name in enumerate(SPLIT_NAMES) if split not in present]


def _is_enough(scores: list[float]) -> bool:
    added = after_doublings(scores, 1.0)
    return added is not None and tpt_saved(scores[-1], added) < STOP_BELOW


def _say_lap(run: Run, lap: Lap, rows: SynthesisRecord, record: TrainingRecord, short: str) -> None:
    num_laps = len(run.schedule.laps())
    shortage = "" if short == "neither" else f"; {short} are short" if short == "tokens" else f"; {short} is short"
    run.say(
        f"lap {lap.number + 1} of {num_laps}: {rows['tokens']:,} answer tokens, {record['steps']} steps, "
        f"{point(record):.3f} accepted tokens per step on validation rows ({record['train_accepted_per_step']:.3f} on "
        f"training rows){shortage}"
    )


def _other_depths(run: Run, made: Made) -> None:
    """Each starts from the first one's head and takes half as long."""
    first, *others = run.plan.depths
    for number, depth in enumerate(others):
        left_s = run.schedule.work_s - run.clock.spent_s
        made.trained[depth] = train_depth(
            run,
            made.rows,
            depth,
            after=first,
            epochs=epochs_of_other_depth(made.rows["tokens"]),
            until_s=run.clock.spent_s + left_s / (len(others) - number),
        )


def _calibrate(run: Run, depth: int) -> CalibrationRecord:
    """Stage calibrate: confidence -> probability of agreement."""
    from safetensors.torch import load_file

    validation, measured = (
        load_file(run.workspace.path(f"{name}-{depth}.safetensors")) for name in ("validation", "measured")
    )
    result = calibrate_positions(validation, measured)
    rates = " ".join("-" if value is None else f"{value:.3f}" for value in result["acceptance_rates"])
    last = len(result["acceptance_rates"]) - 1
    run.say(
        f"depth {depth}: acceptance rate at position 0..{last} on test conversations {rates}, "
        f"calibration error {result['calibration_error']:.3f}"
    )
    return result


def _conversations(run: Run, depth: int, calibrated: CalibrationRecord) -> list[Recorded]:
    """The test conversations, with what the ramp said in them."""
    from safetensors.torch import load_file

    tensors = load_file(run.workspace.path(f"measured-{depth}.safetensors"))
    return recorded(tensors, calibrated["calibration"], KINDS, _texts(run.store, tensors["0.conversation"].unique()))


def _texts(store: RowStore, conversations: torch.Tensor) -> dict[int, tuple[list[int], list[int]]]:
    wanted = set(conversations.tolist())
    return {number: (text.prompt, text.answer) for number, text in enumerate(store.texts()) if number in wanted}


def _write_ramps(run: Run, folder: Path, made: Made, *, default_depth: int) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for depth in run.plan.depths:
        head, tensors[VOCABULARY] = head_tensors(run.workspace, depth)
        tensors |= {f"{depth}.{name}": value for name, value in head.items()}
    Sketch.of(run.plan.model).save(folder)
    save_ramps(
        folder,
        tensors,
        kind="fused",
        base_model=run.base,
        depths=list(run.plan.depths),
        default_depth=default_depth,
        ramp_vocab=len(tensors[VOCABULARY]),
        intermediate_size=run.plan.intermediate_size,
        aux_layers=list(run.plan.aux_layers),
        calibration={depth: item["calibration"] for depth, item in made.calibration.items()},
        training=_training_facts(run, made),
    )


def _training_facts(run: Run, made: Made) -> dict[str, object]:
    return {
        "data": "prompts and answers written by the model itself"
        + (", and the user's prompts" if run.plan.user_prompts else ""),
        "answer_tokens": made.rows["tokens"],
        "seed": run.plan.seed,
        "depths": {
            str(depth): {
                "rows": record["rows"],
                "steps": record["steps"],
                "vocabulary_coverage": made.measured[depth]["vocabulary_coverage"],
                "held_out_acceptance_rates": made.calibration[depth]["acceptance_rates"],
                "held_out_calibration_error": made.calibration[depth]["calibration_error"],
            }
            for depth, record in made.trained.items()
        },
    }
