"""A preparation from its first stage to its report, without an engine: rows are made up, costs given."""

import errno
import json
import math
import os
from collections import Counter
from functools import partial

import pytest
import torch
from rich.console import Console

from apparate_llm import files
from apparate_llm.prepare import needs, pipeline, profile_stage, schedule, train
from apparate_llm.prepare.pipeline import prepare
from apparate_llm.prepare.rows import TRAIN
from apparate_llm.prepare.train_stage import head_tensors, train_depth
from apparate_llm.prepare.workspace import Workspace, save_state
from apparate_llm.ramps.checkpoint import MANIFEST, WEIGHTS, RampError, read_manifest
from apparate_llm.ramps.load import load_ramps
from tests.full_disk import on_full_device, on_full_disk
from tests.preparation import Killed, conversations, lines, plan_for, running

NUMBER = 200
COSTS = {
    "verify_ms": {"1": 20.0, "4": 21.0},
    "pass_ms": {},
    "prompt_ms": {"32": 30.0},
    "plain_frac": 1.0,
    "draft_step_ms": {"0": {"1": 1.0, "4": 1.0}, "2": {"1": 2.0, "4": 2.0}},
    "error_frac": {},
    "threads": 1,
}


@pytest.fixture
def without_engine(monkeypatch):
    """Counts what is done: rows made up, and costs measured."""
    done: Counter[str] = Counter()

    def synthesise_lap(run, lap):
        if (kept := run.workspace.read(f"lap-{lap.number}", {})) is not None:
            return kept
        if not run.store.counts["rows"]:
            done["synthesise"] += 1
            run.store.append(conversations(NUMBER))
        counts = run.store.counts
        result = {"rows": counts["rows"], "tokens": counts["answer_tokens"], "seconds": 1}
        return run.workspace.write(f"lap-{lap.number}", {}, result)

    def profile(model, ramps, depths, **settings):
        done["profile"] += 1
        done["profile first"] += not done["synthesise"]
        return json.loads(json.dumps(COSTS))

    monkeypatch.setattr(pipeline, "synthesise_lap", synthesise_lap)
    monkeypatch.setattr(profile_stage, "profile", profile)
    monkeypatch.setattr(needs, "available_memory_bytes", lambda: 64 << 30)
    return done


def quiet():
    return Console(quiet=True)


def test_all_depths_train_on_the_same_rows_and_have_one_vocabulary_whatever_is_free(
    without_engine, tiny_llama, tmp_path, monkeypatch
):
    plan, say_needs = plan_for(tiny_llama, tmp_path / "out"), needs.say_needs

    def and_then_nothing_is_free(run):
        say_needs(run)
        monkeypatch.setattr(needs, "available_memory_bytes", lambda: 1 << 20)

    monkeypatch.setattr(pipeline, "say_needs", and_then_nothing_is_free)
    prepare(plan, quiet())
    workspace = Workspace(plan.out)
    (_, first), (_, second) = (head_tensors(workspace, depth) for depth in plan.depths)
    assert torch.equal(first, second) and len(first) == plan.ramp_vocab
    trained = read_manifest(plan.out).training["depths"]
    train_rows = sum(len(one.answer) for one in conversations(NUMBER) if one.split == TRAIN)
    assert [trained[str(depth)]["rows"] for depth in plan.depths] == [train_rows] * 2


def test_a_depth_that_trained_on_other_rows_would_have_the_same_vocabulary(tiny_llama, tmp_path):
    with running(plan_for(tiny_llama, tmp_path)) as (run, _):
        run.store.append(conversations(NUMBER))
        counts = run.store.counts
        rows = {"rows": counts["rows"], "tokens": counts["answer_tokens"]}
        train_depth(run, rows, 0, after=None, epochs=1.0)
        train_depth(run, rows | {"rows": counts["rows"] // 4}, 2, after=0, epochs=1.0)
        (_, first), (_, second) = (head_tensors(run.workspace, depth) for depth in (0, 2))
        assert torch.equal(first, second)
        train_depth(run, rows | {"rows": counts["rows"] // 4}, 0, lap=1, after=0, epochs=1.0)
        assert not torch.equal(first, head_tensors(run.workspace, 0)[1]), "a lap has its own rows' words"


def test_what_cannot_be_served_ends_a_preparation_before_it_costs_anything(without_engine, tiny_llama, tmp_path):
    prepare(plan_for(tiny_llama, tmp_path / "out"), quiet())
    assert without_engine == {"synthesise": 1, "profile": 1, "profile first": 1}


def test_costs_are_measured_anew_for_other_heads_only(without_engine, tiny_llama, tmp_path, monkeypatch):
    kept, settings = [], []

    def profile(model, ramps, depths, *, keep, limit_s, log, **others):
        manifest = read_manifest(ramps)
        assert manifest.depths == list(depths) and manifest.ramp_vocab == 40 and manifest.intermediate_size == 96
        kept.append(keep.exists())
        settings.append((limit_s, log.name))
        keep.write_text("[]")
        return dict(COSTS)

    monkeypatch.setattr(profile_stage, "profile", profile)
    with running(plan_for(tiny_llama, tmp_path / "out")) as (run, log):
        first = profile_stage.measure_costs(run)
        assert profile_stage.measure_costs(run) == first and "profile: done" in lines(log)
        assert 0 < first["trained_row_s"] < 1
    with running(plan_for(tiny_llama, tmp_path / "out", depths=(0, 1))) as (run, _):
        profile_stage.measure_costs(run)
    assert kept == [False, False], "what was measured of other heads does not count"
    assert settings == [(90.0, "vllm.log")] * 2

    def killed(*args, keep, **others):
        keep.write_text("[]")
        raise KeyboardInterrupt

    monkeypatch.setattr(profile_stage, "profile", killed)
    with running(plan_for(tiny_llama, tmp_path / "out")) as (run, _), pytest.raises(KeyboardInterrupt):
        profile_stage.measure_costs(run)
    monkeypatch.setattr(profile_stage, "profile", profile)
    with running(plan_for(tiny_llama, tmp_path / "out")) as (run, _):
        profile_stage.measure_costs(run)
    assert kept[-1], "what was measured of these goes on"


def test_heads_to_measure_costs_with_load_as_trained_ones_do(without_engine, tiny_llama, tmp_path):
    from apparate_llm.prepare.draft_data import BaseParts

    with running(plan_for(tiny_llama, tmp_path)) as (run, _):
        profile_stage._write_untrained(run, run.workspace.path("ramps"))
        folder, base = run.workspace.path("ramps"), BaseParts.of(tiny_llama)
    manifest = read_manifest(folder)
    for depth in (0, 2):
        weights = {"norm": base.norm, "head": base.lm_head}
        ramps = load_ramps(folder, manifest, depth=depth, base_weights=weights, dtype=torch.float32)
        assert all(bool(value.isfinite().all()) for value in ramps.head.state_dict().values())


# ---- what is said


def test_a_log_has_a_line_of_each_stage_and_ends_with_what_it_brings(without_engine, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("apparate_llm.progress.FIRST_EVERY_S", 0.0)  # as if each stage took long
    out = tmp_path / "out"
    with (tmp_path / "log").open("w") as file:
        report = prepare(plan_for(tiny_llama, out), Console(file=file))
    log = [line[10:] for line in (tmp_path / "log").read_text().splitlines()]
    for begin in (
        "peak memory about",
        "profile  ",
        "train depth 0  ",
        "train depth 2  ",
        "measure depth 0  ",
        "predict  ",
    ):
        assert any(line.startswith(begin) for line in log), begin
    assert any(" steps, " in line and "steps/" in line for line in log if line.startswith("train depth 0"))
    assert sum("test rows" in line for line in log) >= 2 <= sum("validation rows (" in line for line in log)
    assert log[-2] == report["advice"]["sentence"]
    assert log[-1].startswith("Too short a preparation to tell what more time would bring")


def test_a_start_that_finds_all_done_has_a_line_of_each_lap_and_depth(without_engine, tiny_llama, tmp_path):
    plan = plan_for(tiny_llama, tmp_path / "out")
    prepare(plan, quiet())
    with (tmp_path / "log").open("w") as file:
        prepare(plan, Console(file=file))
    log = [line[10:] for line in (tmp_path / "log").read_text().splitlines()]
    assert "profile: done" in log and "train depth 2: done" in log
    assert sum(line.startswith("lap 1 of 1: ") for line in log) == 1
    assert not any(line.startswith(("synthesise", "train depth 0", "measure")) for line in log)


def test_the_report_has_a_prediction_with_interval_by_clients_and_says_for_whose_prompts(
    without_engine, tiny_llama, tmp_path
):
    out = tmp_path / "out"
    prepare(plan_for(tiny_llama, out), quiet())
    report = json.loads((out / "report.json").read_text())
    for item in report["depths"]:
        assert set(item["predicted"]) == {"1", "4", "16"}
        for predicted in (part for one in item["predicted"].values() for part in (one, one["users"])):
            assert predicted["ci95"][0] <= predicted["tpt_ratio"] <= predicted["ci95"][1]
    assert "the model's own" in report["predicted_for"]["own"]
    assert "users' prompts" in report["predicted_for"]["users"] and "0.85" in report["predicted_for"]["users"]
    page = (out / "report.html").read_text()
    assert "expected to agree 0.85 times as often" in page
    assert "until_s" not in report["profile"]


# ---- kills and full disks


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("further", [3, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("failure", [Killed, full_disk], ids=["killed", "disk full"])
def test_whatever_write_fails_the_same_command_goes_on_and_ends_as_without(
    failure, further, without_engine, tiny_llama, tmp_path, monkeypatch
):
    """Each start gets `further` writes further than the last one, and leaves what a kill does."""
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(schedule, "KEEP_CLOCK_EVERY_S", 1e6)  # its thread would write whenever it comes to that
    undisturbed = plan_for(tiny_llama, tmp_path / "undisturbed")
    writes, fsync = [0, math.inf], os.fsync

    def counted(handle):
        writes[0] += 1
        if writes[0] > writes[1]:
            raise failure()
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", counted)
    prepare(undisturbed, quiet())
    total, starts, ended = writes[0], 0, False
    plan = plan_for(tiny_llama, tmp_path / "out")
    without_engine.clear()
    while not ended:
        starts += 1
        writes[:] = [0, 1 + further * starts]
        try:
            prepare(plan, quiet())
            ended = True
        except Killed:
            (plan.out / "work" / f".train-0.pt.{starts}{files.PART}").write_bytes(b"half of it")
        except RuntimeError as error:
            assert str(error).startswith(f"no space left in {plan.out}: make room and give the same command again")
    assert not list(plan.out.rglob(f"*{files.PART}"))
    assert 5 < starts < total
    assert without_engine["synthesise"] <= 2
    assert (plan.out / WEIGHTS).read_bytes() == (undisturbed.out / WEIGHTS).read_bytes()
    reports = [json.loads((one.out / "report.json").read_text()) for one in (plan, undisturbed)]
    assert reports[0]["advice"] == reports[1]["advice"]


@pytest.mark.parametrize(
    ("save", "full"),
    [
        *((save, on_full_disk) for save in ("torch", "safetensors", "plain")),
        *((save, on_full_device) for save in ("torch", "plain")),  # safetensors opens files by itself
    ],
)
def test_a_full_disk_is_known_by_what_each_library_says_of_it(save, full, tmp_path):
    from safetensors.torch import save_file

    state, path = {"weights": torch.zeros(1 << 20)}, tmp_path / "file"

    def write():
        if save == "safetensors":
            save_file(state, path)
        else:
            with path.open("wb") as file:
                torch.save(state, file) if save == "torch" else file.write(bytes(1 << 20))

    with pytest.raises(RuntimeError, match=r"^no space left in "), pipeline.disk_errors(tmp_path):
        full(write)
    write()
    assert path.stat().st_size >= 1 << 20, "it was the disk"


@pytest.mark.parametrize("full", [on_full_disk, on_full_device])
def test_a_state_that_finds_no_room_leaves_the_old_one(full, tmp_path):
    path = tmp_path / "train.pt"
    save_state({"steps": 1}, path)
    for size in (1, 1 << 20):  # of which all is written at the end, and most before
        with pytest.raises(RuntimeError, match=r"^no space left in "), pipeline.disk_errors(tmp_path):
            full(partial(save_state, {"steps": 2, "weights": torch.zeros(size)}, path))
    assert torch.load(path, weights_only=True) == {"steps": 1} and list(tmp_path.iterdir()) == [path]


def test_no_ramps_are_there_before_the_report_is(without_engine, tiny_llama, tmp_path, monkeypatch):
    plan = plan_for(tiny_llama, tmp_path / "out")

    def killed(*args, **settings):
        raise Killed

    monkeypatch.setattr(pipeline, "write_report", killed)
    with pytest.raises(Killed):
        prepare(plan, quiet())
    assert not (plan.out / MANIFEST).exists()
    with pytest.raises(RampError):
        read_manifest(plan.out)
