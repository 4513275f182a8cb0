"""The preparation that is tried by hand: what counts as work that was kept, and what its log has to tell."""

import os
import time

from scripts import check_prepare
from scripts.check_prepare import WITH_RATE, last_kept_s, left_alone


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


def test_a_clock_that_is_kept_is_no_work_that_is(tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    now = time.time()
    for path, ago_s in ((tmp_path / "clock.json", 1), (tmp_path / "vllm.log", 2), (rows / "index.json", 70)):
        path.touch()
        os.utime(path, (now - ago_s, now - ago_s))
    assert 69 < last_kept_s(tmp_path, now - 500) < 80
    assert 9 < last_kept_s(tmp_path, now - 10) < 20, "this start is no longer ago"


def test_it_kills_in_two_stages():
    assert [stage for stage, _ in check_prepare.KILLS] == ["synthesise", "train depth"]
