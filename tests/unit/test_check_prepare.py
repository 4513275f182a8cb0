"""The preparation that is tried by hand: what counts as work that was kept, and what its log has to tell."""

import os
import time

from scripts import check_prepare
from scripts.check_prepare import KILLS, WITH_RATE, last_kept_s, left_alone, memory_of


class Left:
    """A run that was left alone."""

    def __init__(self, lines, *, took_s, peak_gib=4.0):
        self.lines, self._took_s = lines, took_s
        self.peak_gib = {"needed": peak_gib, "whole": 2 * peak_gib}

    def took_s(self):
        return self._took_s


SYNTHESIS = (
    "12:58:26  synthesise, lap 1  2m 00s/14m (14 %), 26.8k answer tokens, 400 tokens/s, stage left 12m, whole left 43m"
)
TRAINING = (
    "13:11:39  train depth 0  37 %, 115 steps, 2 steps/s, loss 5.389, 1.777 accepted tokens per step on validation "
    "rows, stage left 1m 43s, whole left 30m"
)
MEMORY = "12:56:26  peak memory about 4.2 GiB; 22.1 GiB are free"


def faults(lines, took_s=100.0, **changes):
    rows = left_alone(Left([(float(at), text) for at, text in lines], took_s=took_s, **changes), 0, 100.0)
    return [row.what for row in rows if row.holds is False]


def test_a_run_that_says_what_it_does_and_keeps_its_budget_is_as_expected():
    lines = [(1, MEMORY), (30, SYNTHESIS), (60, TRAINING), (90, TRAINING)]
    assert faults(lines) == []
    assert faults(lines, took_s=115.0) == ["time"]
    assert faults(lines, peak_gib=6.0) == ["peak memory"]
    assert faults([*lines, *[(91, "x")] * 80]) == ["lines of log"]
    assert faults([(1, MEMORY), (50, SYNTHESIS), (60, TRAINING), (90, TRAINING)]) == ["silence at first"]
    without_rate = SYNTHESIS.replace(", 400 tokens/s", "")
    assert WITH_RATE.match(SYNTHESIS) and not WITH_RATE.match(without_rate)
    assert faults([(1, MEMORY), (30, without_rate), (60, TRAINING), (90, TRAINING)]) == ["amount, rate, time left"]


def test_starts_that_go_on_may_need_as_much_memory_as_is_stated():
    runs = [Left([(1.0, MEMORY)], took_s=9.0, peak_gib=peak_gib) for peak_gib in (1.0, 5.0)]
    assert memory_of(runs).holds and not memory_of([*runs, Left([], took_s=9.0, peak_gib=5.1)]).holds


def test_a_training_is_at_work_from_its_first_file_to_its_record(tmp_path):
    run = check_prepare.Run.__new__(check_prepare.Run)
    run.out, run.lines, work = tmp_path, [(1.0, "13:11:39  synthesise, lap 1  0s/1m (0 %), starting the model")], []
    (tmp_path / "work").mkdir()
    for name in ("train-0-lap-0-begun", "train-0-lap-0", "train-2-lap-0-begun", "train-2-lap-0"):
        (tmp_path / "work" / f"{name}.json").touch()
        work.append(run._is_at_work("train"))
    assert work == [True, False, True, False]
    assert not run._is_at_work("synthesise")
    run.lines.append((2.0, SYNTHESIS))
    assert run._is_at_work("synthesise")


def test_what_a_stage_says_of_itself_is_no_work_that_is_kept(tmp_path):
    (tmp_path / "rows").mkdir()
    now = time.time()
    ages = {"clock.json": 1, "lap-0.json": 2, "train-0-lap-0-begun.json": 3, "rows/index.json": 70, "train-0.pt": 90}
    for name, ago_s in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - ago_s, now - ago_s))
    (_, _, rows), (_, _, heads) = KILLS
    assert 69 < last_kept_s(tmp_path, rows, now - 500) < 80
    assert 89 < last_kept_s(tmp_path, heads, now - 500) < 100
    assert 9 < last_kept_s(tmp_path, heads, now - 10) < 20, "this start is no longer ago"
    (tmp_path / "train-0.pt").unlink()
    assert last_kept_s(tmp_path, heads, now - 500) > 499


class WallClock:
    now = 1e9

    def time(self):
        return self.now


class Start:
    """A start that is at a stage for 400 s of the clock, and has last kept something so long ago."""

    def __init__(self, out, clock, kept_s):
        self.out, self.clock, self.kept_s = out, clock, kept_s
        self.at_work = None  # stage, and for how long it was to be waited

    def wait_at_work(self, stage, seconds, timeout_s):
        self.at_work = stage, seconds
        self.clock.now += 400
        for name in ("lap-0.json", "train-0-lap-0-begun.json", "rows/index.json", "train-0.pt"):
            path, ago_s = self.out / "work" / name, self.kept_s if name in ("rows/index.json", "train-0.pt") else 1
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (self.clock.now - ago_s,) * 2)

    def wait(self, timeout_s):
        (self.out / "ramps.json").touch()
        return 0

    def spent_s(self):
        return 100.0

    took_s = spent_s

    def kill(self):
        return 0


def test_it_kills_where_work_is_kept_and_says_what_was_not(tmp_path, monkeypatch):
    clock = WallClock()
    monkeypatch.setattr(check_prepare, "time", clock)
    monkeypatch.setattr(check_prepare, "kept_tokens", lambda work: 0)

    def disturbed(kept_s, budget_s):
        starts = []

        def start():
            starts.append(Start(tmp_path, clock, kept_s))
            return starts[-1]

        rows = check_prepare.disturbed(start, tmp_path, budget_s, False)
        return [one.at_work for one in starts], [row.what for row in rows if row.holds is False]

    assert disturbed(60, 2700.0) == ([("synthesise", 150.0), ("train", 90.0), None], [])
    starts, faults = disturbed(130, 480.0)
    assert starts == [("synthesise", 75.0), ("train", 75.0), None], "a checkpoint is due by then"
    assert faults == ["synthesise: last work kept, ago", "train: last work kept, ago"]
