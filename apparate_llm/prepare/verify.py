"""Prediction against measurement: a short evaluation of plain vLLM and of exits with given ramps, interleaved.

`prepare --verify` does it with the ramps it has just made, `apparate-llm ramps verify` with any ramp folder.
"""

import hashlib
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from apparate_llm.eval.prompts import Prompt, load_prompts
from apparate_llm.eval.store import Block, Store
from apparate_llm.eval.systems import BASELINE, ModelChoice, System, early_exits, plain_alike, tuned
from apparate_llm.machine import what_times_depend_on
from apparate_llm.naming import model_name
from apparate_llm.prepare.engine import context_length
from apparate_llm.prepare.predict import MAX_TOKENS, predict
from apparate_llm.prepare.profile import profile
from apparate_llm.prepare.recorded import Recorded, measured_tensors, recorded
from apparate_llm.prepare.records import (
    ComparedRatio,
    Comparison,
    FolderVerified,
    MeasuredRatio,
    Profiled,
    Report,
    TptRatio,
    Verified,
)
from apparate_llm.prepare.report import write_pages
from apparate_llm.prepare.schedule import PROFILE_S
from apparate_llm.prepare.servers import servers_environment
from apparate_llm.progress import Progress
from apparate_llm.ramps.checkpoint import RampManifest, read_manifest

if TYPE_CHECKING:
    from apparate_llm.eval.summary import SystemUnderLoad
    from apparate_llm.eval.workloads import Load

CLIENTS = (1, 4, 16)
YOURS, EVALS = "your", "eval's"  # prompts
MOST_PROMPTS = 24
SYSTEM = "ramps"
START_TIMEOUT_S = 900.0
MOST_REPEATS = 6
NARROW_FRAC = 0.03  # standard error of the ratio, of itself, that is small enough
LOAD_S = 240.0  # no further repeat of a load that took so long


def verify(
    out: Path,
    model: Path,
    report: Report,
    *,
    prompts: Sequence[Prompt] = (),
    progress: Progress,
    clients: Sequence[int] = CLIENTS,
    max_tokens: int = MAX_TOKENS,
    keep: Path | None = None,
) -> Report:
    """Measure what `report` predicts for users' prompts, with the ramps in `out`; the report with `verified`, also
    written to `out`. prompts: the user's; without, those that come with `eval`. keep: a folder that what was measured
    stays in, and is gone on with from."""
    depth = report["advice"]["depth"]
    predicted = next(item["predicted"] for item in report["depths"] if item["depth"] == depth)
    asked, whose = chosen(prompts or load_prompts(None)), YOURS if prompts else EVALS
    measured = measure(model, out, asked, clients, progress=progress, max_tokens=max_tokens, keep=keep)
    expected = {number: predicted[number]["users"] for number in measured if number in predicted}
    verified = compared(expected, measured, num_prompts=len(asked), whose=whose, max_tokens=max_tokens)
    report = {**report, "verified": verified}
    write_pages(out, report)
    return report


def verify_folder(
    folder: Path,
    manifest: RampManifest,
    model: Path,
    prompts: Sequence[Prompt],
    *,
    whose: str,
    progress: Progress,
    clients: Sequence[int] = CLIENTS,
    max_tokens: int = MAX_TOKENS,
) -> FolderVerified:
    """Acceptance rates on the prompts, which are YOURS or EVALS, costs on this machine, the prediction from both, and
    the measurement."""
    asked, depth = chosen(prompts), manifest.default_depth
    conversations, rates, asked = _answered(folder, manifest, model, asked, max_tokens=max_tokens, progress=progress)
    profiled = _profiled(model, folder, depth, progress)
    expected = predict(
        conversations,
        profiled,
        depth=depth,
        num_layers=manifest.base_model.num_hidden_layers,
        clients=clients,
        max_tokens=max_tokens,
    )
    measured = measure(model, folder, asked, clients, progress=progress, max_tokens=max_tokens)
    comparison = compared(expected, measured, num_prompts=len(asked), whose=whose, max_tokens=max_tokens)
    return {
        "schema_version": 2,
        "model": model_name(model),
        "depth": depth,
        "acceptance_rates": rates,  # by position
        "profile": profiled,
        **comparison,
    }


def _profiled(model: Path, folder: Path, depth: int, progress: Progress) -> Profiled:
    with progress.stage("profile", total=1.0) as stage, tempfile.TemporaryDirectory() as logs:
        profiled = profile(
            model,
            folder,
            (depth,),
            enforce_eager=False,
            limit_s=PROFILE_S,
            log=Path(logs, "log"),
            on_progress=stage.update,
        )
    return profiled


def _answered(
    folder: Path,
    manifest: RampManifest,
    model: Path,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    progress: Progress,
) -> tuple[list[Recorded], list[float | None], list[Prompt]]:
    """Conversations, acceptance rates by position, and the prompts that were answered: servers refuse the others."""
    import torch

    from apparate_llm.prepare.evaluate import answer, mean, served_ramps
    from apparate_llm.prepare.evaluate import measure as measure_positions

    messages = [prompt.messages for prompt in prompts]
    answered = answer(model, manifest, messages, max_tokens=max_tokens, progress=progress)
    ramps = served_ramps(folder, manifest, answered, manifest.default_depth)
    measured = measure_positions(answered, ramps)
    kinds = sorted({prompt.category or "prompts" for prompt in prompts})
    of_answer = [kinds.index(prompts[number].category or "prompts") for number in answered.prompts]
    tensors = measured_tensors(measured, answered.rows, torch.tensor(of_answer))
    conversations = recorded(tensors, ramps.calibration, kinds, dict(enumerate(answered.texts)))
    return conversations, [mean(part.agrees) for part in measured], [prompts[number] for number in answered.prompts]


def chosen(prompts: Sequence[Prompt]) -> list[Prompt]:
    """At most MOST_PROMPTS, evenly over all."""
    few = min(len(prompts), MOST_PROMPTS)
    return [prompts[number * len(prompts) // few] for number in range(few)]


# ---- measurement


def measure(
    model: Path,
    ramps: Path,
    prompts: Sequence[Prompt],
    clients: Sequence[int],
    *,
    progress: Progress,
    max_tokens: int,
    keep: Path | None = None,
) -> dict[str, MeasuredRatio]:
    """By number of clients: the ratio of mean times per output token, lossless exits / plain vLLM, and its interval.
    Raises RuntimeError where a server does not run."""
    from apparate_llm.eval.evaluate import Evaluation, evaluate
    from apparate_llm.eval.summary import cells_of
    from apparate_llm.eval.workloads import closed

    loads = [closed(len(prompts), number, max_tokens=max_tokens, length="free") for number in clients]
    with servers_environment(), ExitStack() as stack:
        systems = systems_with(model, ramps)
        made_of = measured_from(loads, max_tokens, systems) | {"asked": digest_of(ramps, prompts)}
        store = stack.enter_context(store_in(keep, made_of))
        if kept := sum(1 for _ in store.blocks()):
            progress.say(f"verify: {kept} blocks of requests count that an earlier start measured")
        evaluation = Evaluation(
            model=model,
            systems=systems,
            prompts=list(prompts),
            loads=loads,
            repeat=MOST_REPEATS,
            store=store,
            start_timeout_s=START_TIMEOUT_S,
            enough=lambda load: enough([block for block in store.blocks() if block.key.load == load]),
        )
        evaluate(evaluation, progress)
        if SYSTEM in evaluation.dead:
            raise RuntimeError(f"nothing measured: {evaluation.dead[SYSTEM]}")
        cells = {
            (cell.system.name, cell.load.concurrency): cell for cell in cells_of(list(store.blocks()), systems, loads)
        }
    return {str(number): measured_ratio(cells[SYSTEM, number], cells[BASELINE, number]) for number in clients}


def systems_with(model: Path, ramps: Path) -> list[System]:
    """Plain vLLM, and lossless exits with these ramps, both on this machine as it is served on."""
    from apparate_llm.engine.vllm_settings import memory_flags
    from apparate_llm.host.options import kept_tuning_from

    flags = ["--max-model-len", str(context_length(model))]
    choice = tuned(ModelChoice(model, (*flags, *memory_flags(flags, num_servers=2))), kept_tuning_from())
    options = ("--ramps", str(ramps.resolve()), "--accuracy-bound", "0")
    return [replace(plain_alike(choice), name=BASELINE), early_exits(SYSTEM, choice, *options)]


def measured_from(loads: Sequence["Load"], max_tokens: int, systems: Sequence[System]) -> dict[str, object]:
    """What the blocks of a measurement have in common, beside the ramps and what is asked."""
    return {
        "loads": [[load.name, load.fixed_length] for load in loads],
        "max_tokens": max_tokens,
        "machine": what_times_depend_on(),
        "systems": [started_as(system) for system in systems],
    }


def started_as(system: System) -> str:
    """By which command; the size of the cache, which goes by what is free just then, left out."""
    command, name = list(system.command), "--kv-cache-memory-bytes"
    if name in command:
        place = command.index(name)
        del command[place : place + 2]
    return replace(system, command=tuple(command)).started_by


def measured_ratio(ours: "SystemUnderLoad", plain: "SystemUnderLoad") -> MeasuredRatio:
    """Under one load."""
    from apparate_llm.eval.intervals import ratio_interval, sums_of
    from apparate_llm.eval.statistics import ratio_of

    ours_ms, plain_ms = (_mean(cell.values("tpt_ms")) for cell in (ours, plain))
    return {
        "tpt_ratio": ratio_of(ours_ms, plain_ms),
        "ci95": ratio_interval(*(sums_of(cell.by_unit("tpt_ms")) for cell in (ours, plain))),
        "ours_ms": ours_ms,
        "plain_ms": plain_ms,
        "by_repeat": ratios_of_repeats(ours.blocks + plain.blocks),
    }


@contextmanager
def store_in(keep: Path | None, made_of: Mapping[str, object]) -> Iterator[Store]:
    """For blocks that are made of just this, those of an earlier start included; without a folder a temporary one."""
    with ExitStack() as stack:
        store = Store(keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="apparate-verify-"))))
        is_there = (store.folder / "plan.json").is_file()
        if keep is not None and not is_there:  # of a start that was killed, or had no room, before it had a plan
            shutil.rmtree(keep, ignore_errors=True)
        store.open(made_of, fresh=is_there and store.plan() != made_of)
        yield store


def digest_of(ramps: Path, prompts: Sequence[Prompt]) -> str:
    """Of the ramps and of what is asked."""
    asked = [read_manifest(ramps).sha256(), *(prompt.messages for prompt in prompts)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def enough(blocks: Sequence[Block]) -> bool:
    """Whether a load's ratio would not become much surer, or only slowly, by another repeat."""
    ratios = ratios_of_repeats(blocks)
    if sum(block.wall_s for block in blocks) > LOAD_S:
        return True
    return len(ratios) > 2 and stdev(ratios) / len(ratios) ** 0.5 < NARROW_FRAC * fmean(ratios)


def ratios_of_repeats(blocks: Sequence[Block]) -> list[float]:
    """Of mean times per output token, exits / plain vLLM, repeat by repeat, where both have any."""
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for block in blocks:
        times[block.key.repeat, block.key.system] += [done.tpt_ms for done in block.completions if done.tpt_ms]
    repeats = sorted({repeat for repeat, _ in times})
    both = [[times[repeat, name] for name in (SYSTEM, BASELINE)] for repeat in repeats]
    return [round(fmean(ours) / fmean(plain), 4) for ours, plain in both if ours and plain]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ---- what comes of it


def compared(
    predicted: Mapping[str, TptRatio],
    measured: Mapping[str, TptRatio],
    *,
    num_prompts: int,
    whose: str,
    max_tokens: int,
) -> Verified:
    """By number of clients `predicted`, `measured`, `within`: whether the one's interval holds the other's ratio; and
    `off_frac`, by how much of the prediction the measurement differs from it."""
    both = sorted(measured.keys() & predicted.keys(), key=int)
    clients = {number: _compared(predicted[number], measured[number]) for number in both}
    comparison: Comparison = {
        "num_prompts": num_prompts,
        "prompts_of": whose,
        "max_tokens": max_tokens,
        "clients": clients,
    }
    return {**comparison, "sentence": sentence(comparison)}


def _compared(predicted: TptRatio, measured: TptRatio) -> ComparedRatio:
    within: bool | None = None
    off_frac: float | None = None
    expected, interval, ratio = predicted["tpt_ratio"], predicted["ci95"], measured["tpt_ratio"]
    if expected is not None and interval is not None and ratio is not None:
        within = interval[0] <= ratio <= interval[1]
        off_frac = round(ratio / expected - 1.0, 4)
    return {
        "predicted": {"tpt_ratio": expected, "ci95": interval},
        "measured": measured,
        "within": within,
        "off_frac": off_frac,
    }


def sentence(verified: Comparison) -> str:
    """One line for whoever waits for it."""
    parts, outside = [], []
    for number, item in verified["clients"].items():
        clients = f"{number} client{'s' * (number != '1')}"
        expected, interval = item["predicted"]["tpt_ratio"], item["predicted"]["ci95"]
        ratio = item["measured"]["tpt_ratio"]
        if expected is None or interval is None or ratio is None:
            parts.append(f"{clients}: nothing measured")
            continue
        low, high = interval
        parts.append(f"{clients}: {ratio:.2f} (predicted {expected:.2f}, {low:.2f} to {high:.2f})")
        if not item["within"]:
            outside.append(clients)
    asked = f"{verified['num_prompts']} of {verified['prompts_of']} prompts"
    text = f"Measured TPT with exits / plain vLLM on {asked}: {'; '.join(parts)}."
    if outside:
        text += f" Outside the predicted interval with {' and '.join(outside)}."
    return text
