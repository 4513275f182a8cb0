"""`apparate-llm prepare`: the stages one after another, each left on disk and used again by the next run."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from apparate_llm.prepare.calibrate import calibrate_rounds
from apparate_llm.prepare.engine import context_length, generation_engine
from apparate_llm.prepare.plan import Made, Plan, Run, group_size, progress_bars, say_needs
from apparate_llm.prepare.profile import profile
from apparate_llm.prepare.report import write_report
from apparate_llm.prepare.synthesise import Synthesiser, answer_tokens, group_files, synthesise
from apparate_llm.prepare.train_stage import head_tensors, train_depth
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.ramps.checkpoint import VOCABULARY, BaseModelInfo, save_ramps

MAX_PROMPT_TOKENS = 96
MAX_ANSWER_TOKENS = 320
SYNTHESIS_SHARE = 0.55  # of the time budget


def prepare(plan: Plan) -> None:
    """Leaves a ramp folder with its report in `plan.out`; raises ValueError for bad input, RuntimeError otherwise."""
    console = Console(stderr=True)
    workspace = Workspace(plan.out)
    with workspace.locked(), progress_bars(console) as progress:
        run = Run(plan, workspace, BaseModelInfo.of(plan.model), console, progress)
        say_needs(run)
        made = Made(_synthesise(run))
        for depth in plan.depths:
            made.trained[depth] = train_depth(run, made.rows, depth, after=plan.depths[0] if made.trained else None)
        made.calibration = _calibrate(run, made.trained)
        draft = workspace.path("ramps")
        _write_ramps(run, draft, made, default_depth=plan.depths[0])
        profiled = _profile(run, draft, made.trained)
        report = write_report(plan.out, run.base, plan.model.name, made, profiled)
        _write_ramps(run, plan.out, made, default_depth=report["advice"]["depth"])
        console.print(report["advice"]["sentence"], style="bold")
        console.print(f"ramps: {plan.out}  report: {plan.out / 'report.html'}")
        console.print(f"{plan.out / 'work'} is only needed to go on with more tokens; delete it to free the space")


def _synthesise(run: Run) -> dict[str, Any]:
    """Stages synthesise and collect: groups of conversations with their rows."""
    plan, workspace = run.plan, run.workspace
    fixed = {
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
                say=run.say,
            )
            synthesise(synthesiser, num_tokens=target, deadline=lambda: spent_s() >= limit_s, on_tokens=on_tokens)
    run.progress.remove_task(task)
    files = group_files(workspace.folder)
    run.say(f"synthesise: {have:,} answer tokens in {len(files)} groups")
    return workspace.write("rows", wanted, {"tokens": have, "groups": len(files), "seconds": round(spent_s())})


def _calibrate(run: Run, trained: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Stage calibrate: confidence -> probability of agreement, fitted and checked on held-out conversations."""
    from safetensors.torch import load_file

    results = {}
    for depth, record in trained.items():
        results[depth] = calibrate_rounds(load_file(run.workspace.path(f"measured-{depth}.safetensors")))
        run.workspace.write(f"calibrate-{depth}", record, results[depth])
    return results


def _write_ramps(run: Run, folder: Path, made: Made, *, default_depth: int) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for depth in run.plan.depths:
        head, vocabulary = head_tensors(run.workspace, depth)
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
        calibration={depth: item["calibration"] for depth, item in made.calibration.items()},
        training={
            "data": "prompts and answers written by the model itself"
            + (", and the user's prompts" if run.plan.user_prompts else ""),
            "answer_tokens": made.rows["tokens"],
            "seed": run.plan.seed,
            "depths": {
                str(depth): {
                    "rows": record["rows"],
                    "steps": record["steps"],
                    "vocabulary_coverage": record["vocabulary_coverage"],
                    "held_out_agreement": made.calibration[depth]["agreement"],
                    "held_out_calibration_error": made.calibration[depth]["calibration_error"],
                }
                for depth, record in made.trained.items()
            },
        },
    )


def _profile(run: Run, folder: Path, trained: dict[int, Any]) -> dict[str, Any]:
    """Stage profile: what a completion pass and each depth's round cost on this machine."""
    from apparate_llm.machine import machine

    plan, workspace = run.plan, run.workspace
    here = {key: value for key, value in machine().items() if key in ("cpu", "cores", "packages")}
    inputs = {"machine": here, "heads": trained, "enforce_eager": plan.enforce_eager}
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
