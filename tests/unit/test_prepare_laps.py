"""The laps of a preparation: when they end, what they say, and the time that all of it takes."""

import errno
import json
import math
import os
from dataclasses import replace

import pytest
from rich.console import Console

from apparate_llm.prepare import pipeline
from apparate_llm.prepare.plan import Made
from apparate_llm.prepare.rows import SPLIT_NAMES
from apparate_llm.prepare.schedule import Lap
from tests.preparation import Clock, lines, plan_for, running


@pytest.fixture
def laps_of(tiny_llama, tmp_path, monkeypatch):
    """Laps whose synthesis ends in time and whose trainings have these scores on (training, validation) rows."""

    def run_laps(scores, *, missing=(), full_from=math.inf, **changes):
        clock, asked = Clock(), []
        monkeypatch.setattr("apparate_llm.prepare.schedule.time", clock)

        def synthesise_lap(run, lap):
            asked.append(lap)
            clock.now += max(0.0, lap.synthesise_until_s - run.clock.spent_s) if run.plan.tokens is None else 60.0
            made = {"rows": 1000 * (1 + lap.number), "tokens": 200_000 * (1 + lap.number), "seconds": 1}
            return made | ({"disk_is_full": True} if lap.number >= full_from else {})

        def train_depth(run, rows, depth, *, lap=0, after, epochs, until_s):
            if until_s < math.inf:
                clock.now += max(1.0, until_s - run.clock.spent_s)
            on_training, on_validation = scores[lap]
            record = {
                "steps": 9,
                "seconds": 18,
                "train_accepted_per_step": on_training,
                "validation_accepted_per_step": on_validation,
            }
            asked.append((lap, depth, after, until_s))
            return record

        monkeypatch.setattr(pipeline, "synthesise_lap", synthesise_lap)
        monkeypatch.setattr(pipeline, "train_depth", train_depth)
        splits = iter([*missing, *[[]] * 9])
        monkeypatch.setattr(pipeline, "_splits_without_rows", lambda run, rows: next(splits))
        settings = {"tokens": None, "time_budget_s": 7200.0} | changes
        with running(plan_for(tiny_llama, tmp_path / "out", **settings)) as (run, log):
            made = pipeline._laps(run)
        laps = [one for one in asked if isinstance(one, Lap)]
        return made, laps, [one for one in asked if not isinstance(one, Lap)], lines(log)

    return run_laps


def test_a_curve_that_is_flat_ends_the_laps_and_the_last_line_says_so(laps_of):
    made, laps, _, log = laps_of([(1.5, 1.4), (1.5, 1.402), (9.0, 9.0)])
    assert len(laps) == 2
    assert log[-1] == "The next lap would bring next to nothing: this is enough."
    assert made.outlook == "Another hour would bring next to nothing."
    assert made.rows["rows"] == 2000 and made.trained[0]["validation_accepted_per_step"] == 1.402


def test_the_last_lap_knows_what_the_trainings_before_took(laps_of, monkeypatch):
    """Until then what a step took before all of them counts."""
    known, say_lap = [], pipeline._say_lap
    monkeypatch.setattr(pipeline, "_say_lap", lambda run, *said: (known.append(run.trained_row_s), say_lap(run, *said)))
    laps_of([(1.0, 1.0), (1.5, 1.5), (2.0, 2.0)])
    assert known == [18 / 9 / 1024] * 3


def test_a_curve_that_rises_is_gone_on_with_and_what_is_short_gets_more_time(laps_of):
    for gap, more in ((0.3, "tokens"), (0.01, "training")):
        made, laps, trainings, log = laps_of([(1.0, 1.0), (1.5 + gap, 1.5), (2.0 + gap, 2.0)])
        assert len(laps) == 3 and [after for _, _, after, _ in trainings] == [None, 0, 0]
        planned = plan_for(None, None, tokens=None, time_budget_s=7200.0).schedule.laps()[-1]
        sign = 1 if more == "tokens" else -1
        assert sign * (laps[-1].synthesise_until_s - planned.synthesise_until_s) > 60
        assert f"{more} {'are' if more == 'tokens' else 'is'} short" in log[1]
        assert made.outlook.startswith("Another hour would bring about ") and made.outlook.endswith(" short.")


def test_a_first_lap_without_a_row_of_each_split_is_gone_on_with_and_a_last_one_says_what_to_do(laps_of):
    _, laps, trainings, _ = laps_of([(1.0, 1.0)] * 3, missing=[["test"]])
    assert trainings[0][0] == 1 and len(laps) == 3
    with pytest.raises(RuntimeError, match="answer tokens are too few, none are for test: give more tokens or time"):
        laps_of([(1.0, 1.0)] * 3, missing=[["test"]] * 3)


@pytest.mark.parametrize("full_from", [0, 1, 2])
@pytest.mark.parametrize("settings", [{}, {"tokens": 1_000_000, "time_budget_s": None}])
def test_a_lap_that_a_full_disk_has_ended_is_the_last_and_no_doubling(full_from, settings, laps_of):
    made, laps, trainings, log = laps_of([(1.0, 1.0), (1.5, 1.5), (1.5, 1.5)], full_from=full_from, **settings)
    assert len(laps) == len(trainings) == full_from + 1
    assert made.outlook == "The disk was full: with more room the same command goes on."
    assert not any("this is enough" in line for line in log)
    if not settings:
        schedule = plan_for(None, None, tokens=None, time_budget_s=7200.0).schedule
        (*_, until_s), spent_s = trainings[-1], laps[-1].synthesise_until_s
        assert (until_s - spent_s) * 1.5 == pytest.approx(schedule.work_s - spent_s), "the second depth has the rest"


def test_a_full_disk_with_a_split_missing_is_told_as_one(laps_of):
    with pytest.raises(RuntimeError, match=r"^no space left in .*/out: make room and give the same command again"):
        laps_of([(1.0, 1.0)] * 3, missing=[["test"]] * 3, full_from=0)


# ---- the whole of it


@pytest.fixture
def stages(tiny_llama, tmp_path, monkeypatch):
    """A preparation whose stages take a minute of the clock, and its verification an hour; and the clock's file."""
    clock = Clock()
    monkeypatch.setattr("apparate_llm.prepare.schedule.time", clock)
    advice = {"advice": {"depth": 0, "sentence": "Use depth 0."}}

    def taking(seconds, result=None):
        def stage(*args, **settings):
            clock.now += seconds
            return result

        return stage

    made = Made({"rows": 1, "tokens": 1, "seconds": 1}, trained=dict.fromkeys((0, 2)), outlook="Enough.")
    for name, result in (
        ("measure_costs", {"until_s": 60.0, "trained_row_s": 0.01, "verify_ms": {"1": 20.0, "32": 64.0}}),
        ("_laps", made),
        *((name, None) for name in ("_other_depths", "measure_depth", "_calibrate", "_conversations", "_write_ramps")),
        ("write_report", advice),
    ):
        monkeypatch.setattr(pipeline, name, taking(60.0, result))
    monkeypatch.setattr(pipeline, "say_needs", taking(30.0))
    monkeypatch.setattr(pipeline, "verify", taking(3600.0, advice | {"verified": {"sentence": "Measured."}}))
    plan = plan_for(tiny_llama, tmp_path / "out", tokens=None, time_budget_s=900.0, verify=True)
    return plan, plan.out / "work" / "clock.json"


def test_a_verification_and_what_is_said_before_cost_nothing_of_the_budget(stages):
    plan, file = stages
    pipeline.prepare(plan, Console(quiet=True))
    assert json.loads(file.read_text())["result"]["seconds"] == 60.0 * (5 + 3 * len(plan.depths))


def test_laps_know_what_was_measured_and_the_report_has_what_a_server_pays(stages, monkeypatch):
    plan, known = stages[0], []
    laps, write_report = pipeline._laps, pipeline.write_report

    def known_laps(run):
        known.append((run.begins_s, run.row_s, run.trained_row_s))
        return laps(run)

    def known_report(out, base, name, made, profiled):
        known.append(profiled)
        return write_report()

    monkeypatch.setattr(pipeline, "_laps", known_laps)
    monkeypatch.setattr(pipeline, "write_report", known_report)
    pipeline.prepare(plan, Console(quiet=True))
    assert known == [(60.0, 0.002, 0.01), {"verify_ms": {"1": 20.0, "32": 64.0}}]


def test_a_verification_that_fails_costs_nothing_either_and_no_time_is_said_to_be_left(stages, monkeypatch):
    plan, file = stages
    left = []

    def fails(*args, progress, **settings):
        left.append(progress.left_s())
        raise RuntimeError("nothing measured")

    monkeypatch.setattr(pipeline, "verify", fails)
    with pytest.raises(RuntimeError, match="nothing measured"):
        pipeline.prepare(plan, Console(quiet=True))
    assert json.loads(file.read_text())["result"]["seconds"] == 660.0 and left == [None]


def test_starts_that_are_refused_cost_nothing(stages, monkeypatch):
    plan, file = stages

    def refuses(run):
        raise ValueError("not enough memory")

    monkeypatch.setattr(pipeline, "say_needs", refuses)
    for _ in range(3):
        with pytest.raises(ValueError, match="not enough memory"):
            pipeline.prepare(plan, Console(quiet=True))
    assert not file.exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="other settings"):
        pipeline.prepare(replace(plan, seed=7), Console(quiet=True))
    assert not file.exists()


# ---- which disk is full


@pytest.mark.parametrize("inside", [True, False])
def test_the_disk_that_is_full_is_named(inside, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    (out / "work").mkdir(parents=True)
    file = out / "work" / "rows" / "index.json" if inside else other / "temporary"
    named = out if inside else other
    with pytest.raises(RuntimeError, match=rf"^no space left in {named}: make room"), pipeline.disk_errors(out):
        raise RuntimeError("wrapped") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def test_a_work_folder_on_another_disk_is_named(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "out" / "work").symlink_to(tmp_path / "disk")
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(tmp_path / "out" / "work" / "head.safetensors"))
    says = rf"^no space left in {tmp_path / 'disk'}: make room"
    with pytest.raises(RuntimeError, match=says), pipeline.disk_errors(tmp_path / "out"):
        raise full


def test_what_another_process_said_of_a_full_disk_is_kept_with_its_log_and_file(tmp_path):
    output = "\n".join(
        ["Traceback", *["  in a line"] * 99, "OSError: [Errno 28] No space left on device: '/tmp/kernel.so'"]
    )
    failed = RuntimeError(f"profile failed with exit code 1, see {tmp_path / 'vllm.log'}: {output}")
    with pytest.raises(RuntimeError, match=r"^no space left in ") as error, pipeline.disk_errors(tmp_path / "out"):
        raise failed
    text = str(error.value)
    assert str(tmp_path / "vllm.log") in text and "/tmp/kernel.so" in text and "make room" in text
    assert "\n" not in text and len(text) < 800


def test_without_any_row_all_splits_are_missing(tiny_llama, tmp_path):
    with running(plan_for(tiny_llama, tmp_path)) as (run, _):
        assert pipeline._splits_without_rows(run, {"rows": 0}) == list(SPLIT_NAMES)


@pytest.mark.parametrize("budget_s", [900.0, 1200.0, 2700.0, 7200.0, 36_000.0])
@pytest.mark.parametrize("slow", [1.0, 3.0])
def test_a_budget_is_kept_within_a_tenth_with_measuring_and_report_on_a_slow_machine_too(
    budget_s, slow, laps_of, tiny_llama, tmp_path, monkeypatch
):
    """As of 1.5 billion parameters: seconds that starts, steps and reports take, on a machine and on a slower one."""
    start_s, step_s, report_s = 40.0 * slow, 10.0 * slow, 10.0 * slow
    clock = Clock()
    monkeypatch.setattr("apparate_llm.prepare.schedule.time", clock)

    def synthesise_lap(run, lap):
        if run.clock.spent_s + start_s < lap.synthesise_until_s:
            clock.now += lap.synthesise_until_s - run.clock.spent_s + step_s / 10
        return {"rows": 1000, "tokens": 200_000, "seconds": 1}

    def train_depth(run, rows, depth, *, lap=0, after, epochs, until_s):
        clock.now += max(step_s, until_s - run.clock.spent_s + step_s / 2)
        return {"steps": 9, "seconds": 9, "train_accepted_per_step": 1.5, "validation_accepted_per_step": 1.0 + lap}

    monkeypatch.setattr(pipeline, "synthesise_lap", synthesise_lap)
    monkeypatch.setattr(pipeline, "train_depth", train_depth)
    monkeypatch.setattr(pipeline, "_splits_without_rows", lambda run, rows: [])
    with running(plan_for(tiny_llama, tmp_path / "out", tokens=None, time_budget_s=budget_s)) as (run, _):
        began = clock.now
        clock.now += 3 * start_s + run.schedule.profile_s  # a start that compiles, and costs
        run.begins_s = run.clock.spent_s
        made = pipeline._laps(run)
        pipeline._other_depths(run, made)
        clock.now += 4 * max(run.schedule.measure_s, 3 * slow) + report_s
        took_s = clock.now - began
    assert isinstance(made, Made)
    assert 0.9 * budget_s < took_s < 1.1 * budget_s
