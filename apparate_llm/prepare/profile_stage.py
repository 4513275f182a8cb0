"""Stage profile, as part of a preparation. It comes first: what a head costs does not depend on what it has learned, a
model that cannot be served ends a preparation before it has cost anything, and the time that is left is known.
"""

import shutil
from pathlib import Path

import torch

from apparate_llm.host.dtype import dtype_of, element_size
from apparate_llm.machine import what_times_depend_on
from apparate_llm.prepare.acceptance import NUM_POSITIONS
from apparate_llm.prepare.draft_data import BaseParts
from apparate_llm.prepare.needs import give_back_memory
from apparate_llm.prepare.plan import Plan, Run
from apparate_llm.prepare.profile import profile
from apparate_llm.prepare.records import Profiled
from apparate_llm.prepare.servers import used_by_servers
from apparate_llm.prepare.train import TrainSettings, new_head, seconds_of_trained_row
from apparate_llm.ramps.checkpoint import VOCABULARY, save_ramps
from apparate_llm.ramps.sketch import Sketch

TURNS = "profile-turns.json"  # what was measured so far
AS_IT_IS = (1.0, 0.0)  # a calibration


def measure_costs(run: Run) -> Profiled:
    """What a verification pass and each depth's draft step cost on this machine, and `until_s` of the work clock."""
    plan, workspace = run.plan, run.workspace
    here, dtype = what_times_depend_on(), dtype_of(plan.model)
    inputs = {
        "machine": here,
        "tuning": used_by_servers(plan.model).choice.model_dump(),
        "fingerprint": run.base.fingerprint,
        "depths": list(plan.depths),
        "aux_layers": list(plan.aux_layers),
        "ramp_vocab": plan.ramp_vocab,
        "intermediate_size": plan.intermediate_size,
        "enforce_eager": plan.enforce_eager,
        **({} if dtype == "auto" else {"dtype": dtype}),  # not in older ones
    }
    done: Profiled | None = workspace.read("profile", inputs)
    shutil.rmtree(folder := workspace.path("ramps"), ignore_errors=True)  # of a start that was killed
    if done is not None:
        run.say("profile: done")
        return done
    if not workspace.made_from("profile-begun", inputs):
        workspace.path(TURNS).unlink(missing_ok=True)  # of another machine, or other heads
        workspace.write("profile-begun", inputs, {})
    try:
        trained_row_s = _write_untrained(run, folder)
        give_back_memory()
        profiled = _profiled(run, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # nobody is to serve them
    profiled["machine"], profiled["until_s"] = here, round(run.clock.spent_s, 1)
    profiled["trained_row_s"] = trained_row_s
    return workspace.write("profile", inputs, profiled)


def _settings(plan: Plan, depth: int) -> TrainSettings:
    return TrainSettings(depth=depth, aux_layers=plan.aux_layers, intermediate_size=plan.intermediate_size)


def seconds_of_row(profiled: Profiled) -> float:
    """Of the largest pass with a row for each request; that of a larger one takes no longer."""
    largest = max(map(int, profiled["verify_ms"]))
    return profiled["verify_ms"][str(largest)] / largest / 1e3


def _profiled(run: Run, folder: Path) -> Profiled:
    with run.progress.stage("profile", total=1.0, facts="starting the model as it is served") as bar:
        return profile(
            run.plan.model,
            folder,
            run.plan.depths,
            enforce_eager=run.plan.enforce_eager,
            limit_s=run.schedule.profile_s,
            log=run.workspace.path("vllm.log"),
            keep=run.workspace.path(TURNS),
            on_progress=bar.update,
        )


def _write_untrained(run: Run, folder: Path) -> float:
    """Ramps as large as the ones to be trained; returns what a training of the first one takes for a row and epoch, in
    seconds."""
    plan, base = run.plan, BaseParts.of(run.plan.model)
    vocabulary = torch.arange(plan.ramp_vocab)
    tensors = {VOCABULARY: vocabulary.int()}
    for depth in plan.depths:
        weights = new_head(base, vocabulary, _settings(plan, depth)).state_dict()
        tensors |= {
            f"{depth}.{name}": value.to(base.norm.dtype).contiguous()
            for name, value in weights.items()
            if name != "head"
        }
    Sketch.of(plan.model).save(folder)
    save_ramps(
        folder,
        tensors,
        kind="fused",
        base_model=run.base,
        depths=list(plan.depths),
        default_depth=plan.depths[0],
        ramp_vocab=plan.ramp_vocab,
        intermediate_size=plan.intermediate_size,
        aux_layers=list(plan.aux_layers),
        calibration={depth: [AS_IT_IS] * NUM_POSITIONS for depth in plan.depths},
    )
    dtype = torch.float32 if element_size(plan.model) == torch.float32.itemsize else torch.bfloat16
    return seconds_of_trained_row(base, vocabulary, _settings(plan, plan.depths[0]), dtype)
