"""How a preparation spends its time, and what its learning curve says."""

import math
import threading
import time
from itertools import pairwise

import pytest

from apparate_llm.prepare import schedule as module
from apparate_llm.prepare.schedule import (
    Schedule,
    WorkClock,
    after_doublings,
    another_hour,
    outlook,
    shifted,
    tpt_saved,
    train_until_s,
    what_is_short,
    without_more_rows,
)
from apparate_llm.prepare.workspace import Workspace
from tests.preparation import Clock


@pytest.mark.parametrize("budget_s", [120.0, 600.0, 1200.0, 2700.0, 36000.0])
@pytest.mark.parametrize("num_depths", [1, 2, 3])
def test_laps_fill_the_budget_and_leave_time_to_measure(budget_s, num_depths):
    schedule = Schedule(None, budget_s, num_depths)
    laps = schedule.laps()
    assert len(laps) == (3 if budget_s >= 900 else 1)
    assert [lap.last for lap in laps] == [False] * (len(laps) - 1) + [True]
    times = [time for lap in laps for time in (lap.synthesise_until_s, lap.train_until_s)]
    assert times == sorted(times) and times[0] > 0
    assert schedule.work_s + 2 * num_depths * schedule.measure_s < budget_s  # validation and test rows, then the report
    first_depth_s = sum(lap.train_until_s - lap.synthesise_until_s for lap in laps)
    # Each further depth takes half of what the first one took.
    assert schedule.work_s - times[-1] == pytest.approx(first_depth_s / 2 * (num_depths - 1), rel=1e-6, abs=1e-6)


def test_laps_share_the_time_that_costs_have_left():
    laps, whole = Schedule(None, 1200.0, 2, begins_s=300.0).laps(), Schedule(None, 1200.0, 2)
    times = [time for lap in laps for time in (lap.synthesise_until_s, lap.train_until_s)]
    assert len(laps) == 3 and all(before < after for before, after in pairwise([300.0, *times, 1200.0]))
    for lap, alone in zip(laps, whole.laps(), strict=True):
        assert lap.train_until_s == pytest.approx(300 + alone.train_until_s * (whole.work_s - 300) / whole.work_s)
    nothing_left = Schedule(None, 120.0, 2, begins_s=200.0).laps()
    assert [(lap.synthesise_until_s, lap.train_until_s) for lap in nothing_left] == [(200.0, 200.0)]


@pytest.mark.parametrize(
    ("budget_s", "start_s", "laps"),
    [(2700.0, 0.0, 3), (2700.0, 25.0, 3), (2700.0, 100.0, 1), (900.0, 20.0, 3), (900.0, 40.0, 1), (36_000.0, 100.0, 3)],
)
def test_a_model_that_starts_slowly_has_one_lap(budget_s, start_s, laps):
    """A start in each of three would take more than 15 % of the time to write."""
    assert len(Schedule(None, budget_s, 2, begins_s=60.0, start_s=start_s).laps()) == laps
    assert len(Schedule(1_000_000, None, 2, start_s=start_s).laps()) == 3


@pytest.mark.parametrize("num_depths", [1, 2, 3])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_lap_without_more_rows_trains_for_all_that_is_left_of_the_first_depth(number, num_depths):
    schedule = Schedule(None, 2700.0, num_depths)
    laps = schedule.laps()
    full = without_more_rows(laps[number], schedule)
    assert full.last and full.fraction == 1.0 and full.number == number
    assert full.training_share == pytest.approx(sum(lap.training_share for lap in laps[number:]))
    spent_s = laps[number].synthesise_until_s - 100  # when the disk was full
    until_s = train_until_s(full, spent_s, schedule.work_s)
    trained_s, left_s = until_s - spent_s, schedule.work_s - spent_s
    assert trained_s * (1 + 0.5 * (num_depths - 1)) == pytest.approx(left_s)
    tokens = Schedule(1_000_000, None, num_depths)
    assert math.isinf(train_until_s(without_more_rows(tokens.laps()[number], tokens), 9.0, tokens.work_s))


def test_a_training_gets_its_part_of_what_a_late_synthesis_has_left():
    schedule = Schedule(None, 2700.0, 2)
    *_, lap = schedule.laps()
    in_time = train_until_s(lap, lap.synthesise_until_s, schedule.work_s)
    assert in_time == pytest.approx(lap.train_until_s)
    late = train_until_s(lap, lap.synthesise_until_s + 100, schedule.work_s)
    assert lap.synthesise_until_s + 100 < late < schedule.work_s
    assert late - (lap.synthesise_until_s + 100) < in_time - lap.synthesise_until_s
    assert train_until_s(lap, schedule.work_s + 50, schedule.work_s) == schedule.work_s + 50
    tokens = Schedule(1000, None, 2)
    assert math.isinf(train_until_s(tokens.laps()[0], 100.0, tokens.work_s))


def test_costs_and_test_rows_get_a_share_of_the_time():
    for budget_s in (60.0, 180.0, 600.0, 1800.0):
        assert Schedule(None, budget_s, 2).profile_s == pytest.approx(0.05 * budget_s)
    assert Schedule(None, 3600.0, 2).profile_s == pytest.approx(180.0)
    assert Schedule(None, 36_000.0, 2).profile_s == 300.0 and Schedule(1000, None, 2).profile_s == 90.0
    assert Schedule(None, 2700.0, 2).measure_s == pytest.approx(8.1) and math.isinf(Schedule(1000, None, 2).measure_s)


def test_the_clock_is_kept_whatever_goes_on_and_counts_all_starts(tmp_path, monkeypatch):
    """A kill in the middle of a start, or of costs that are measured, loses next to nothing of the time spent."""
    monkeypatch.setattr(module, "KEEP_CLOCK_EVERY_S", 0.02)
    workspace = Workspace(tmp_path)
    with WorkClock(workspace) as clock:
        deadline = time.monotonic() + 10
        while WorkClock(workspace).before_s < 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 0.1 <= WorkClock(workspace).before_s <= clock.spent_s
    ended_s = WorkClock(workspace).before_s
    assert ended_s == pytest.approx(clock.spent_s, abs=0.2)
    with WorkClock(workspace) as again:
        assert again.spent_s >= ended_s
    assert "work-clock" not in [thread.name for thread in threading.enumerate()]


def test_a_clock_counts_from_when_it_is_entered_until_it_is_stopped(tmp_path, monkeypatch):
    now = Clock()
    monkeypatch.setattr(module, "time", now)
    workspace = Workspace(tmp_path)
    clock = WorkClock(workspace)
    now.now += 1000.0  # what is refused is refused here
    assert not workspace.path("clock.json").exists()
    with clock:
        now.now += 60.0
        assert clock.spent_s == 60.0 and not clock.is_stopped
        clock.stop()
        now.now += 1000.0  # a verification
        assert clock.spent_s == 60.0 == WorkClock(workspace).before_s and clock.is_stopped
        clock.stop()
    assert WorkClock(workspace).before_s == 60.0


def test_a_full_disk_takes_the_clocks_file_and_not_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEEP_CLOCK_EVERY_S", 0.01)
    tried = threading.Event()

    def full(self, *args):
        tried.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Workspace, "write", full)
    with WorkClock(Workspace(tmp_path)):
        assert tried.wait(10)


def test_tokens_come_in_laps_that_double():
    assert [lap.tokens for lap in Schedule(1_000_000, None, 2).laps()] == [250_000, 500_000, 1_000_000]
    assert [lap.tokens for lap in Schedule(400_000, None, 2).laps()] == [100_000, 200_000, 400_000]
    only = Schedule(1000, None, 2).laps()
    assert [lap.tokens for lap in only] == [1000] and math.isinf(only[0].train_until_s)


def test_what_is_short_gets_more_of_the_time_left():
    schedule = Schedule(None, 2700.0, 2)
    lap, spent_s = schedule.laps()[-1], schedule.laps()[-2].train_until_s
    more_tokens = shifted(lap, spent_s, schedule.work_s, "tokens")
    more_training = shifted(lap, spent_s, schedule.work_s, "training")
    assert shifted(lap, spent_s, schedule.work_s, "neither") == lap
    for changed, sign in ((more_tokens, 1), (more_training, -1)):
        assert sign * (changed.synthesise_until_s - lap.synthesise_until_s) > 60
        assert spent_s < changed.synthesise_until_s < changed.train_until_s < schedule.work_s
        # The other depths give their part.
        before = (lap.train_until_s - lap.synthesise_until_s) / (schedule.work_s - lap.synthesise_until_s)
        after = (changed.train_until_s - changed.synthesise_until_s) / (schedule.work_s - changed.synthesise_until_s)
        assert after == pytest.approx(before)


def test_the_curve_goes_on_as_it_went():
    assert after_doublings([1.0], 1.0) is None and another_hour([1.0], 100.0) is None
    assert after_doublings([1.0, 1.2], 1.0) == pytest.approx(0.1)  # the first fading is assumed
    assert after_doublings([1.0, 1.4, 1.6], 1.0) == pytest.approx(0.1)  # half of the gain before, as that was
    assert after_doublings([1.0, 1.4, 1.6], 2.0) == pytest.approx(0.15)
    assert after_doublings([1.0, 1.2, 1.5], 1.0) == pytest.approx(0.18)  # gains that grow fade as well
    assert after_doublings([1.0, 1.2, 1.2], 1.0) == 0.0 == after_doublings([1.0, 1.2, 1.1], 3.0)
    assert tpt_saved(1.0, 0.0) == 0.0 and tpt_saved(1.0, 2.0) == 0.5
    # An hour more after an hour is one doubling, after three hours less.
    assert another_hour([1.0, 1.4, 1.6], 3600.0) == pytest.approx(tpt_saved(1.6, 0.1))
    assert 0 < another_hour([1.0, 1.4, 1.6], 10800.0) < another_hour([1.0, 1.4, 1.6], 3600.0)


def test_far_better_on_training_rows_means_that_tokens_are_short():
    assert what_is_short(2.0, 1.5) == "tokens"
    assert what_is_short(1.51, 1.5) == what_is_short(1.4, 1.5) == "training"
    assert what_is_short(1.58, 1.5) == "neither"


def test_the_outlook_is_one_sentence():
    assert outlook([1.0], 300.0, "tokens").startswith("Too short a preparation")
    assert outlook([1.0, 1.2, 1.2], 3600.0, "tokens") == "Another hour would bring next to nothing."
    assert outlook([1.0, 1.4, 1.6], 3600.0, "tokens") == "Another hour would bring about 4 % TPT; tokens are short."
