"""What a long command says, on a terminal and into a log."""

import io
import re
import threading
import time
from contextlib import suppress

import pytest
from rich.console import Console

from apparate_llm.progress import Progress, Stage, number, rate_of, time_span
from tests.preparation import Clock, Killed

NEVER_S = 1e6  # the thread stays out of tests that call tick() themselves


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log(clock: Clock, **options) -> tuple[io.StringIO, Progress]:
    file = io.StringIO()
    return file, Progress(Console(file=file, width=40), clock=clock.monotonic, poll_s=NEVER_S, **options)


def lines(file: io.StringIO) -> list[str]:
    """Without the time of day, which each line must have."""
    shown = file.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in shown)
    return [line[10:] for line in shown]


def run_for(progress: Progress, clock: Clock, seconds: float, stage: Stage | None = None, per_s: float = 0.0) -> None:
    for _ in range(int(seconds)):
        clock.now += 1
        if stage is not None:
            stage.update(stage.done + per_s, stage.facts)
        progress.tick()


def test_a_line_in_a_log_tells_stage_amount_rate_facts_and_times():
    clock = Clock()
    file, progress = log(clock, left_s=lambda: 41 * 60)
    with progress, progress.stage("synthesise", total=40_000, unit="tokens") as stage:
        stage.update(0)
        run_for(progress, clock, 30, stage, per_s=410)
        assert lines(file) == [
            "synthesise  0/40.0k tokens (0 %), whole left 41m",
            "synthesise  12.3k/40.0k tokens (31 %), 410 tokens/s, stage left 1m 08s, whole left 41m",
        ]
        stage.update(40_000, "123 conversations")
    assert lines(file)[2] == "synthesise  40.0k/40.0k tokens (100 %), 1333 tokens/s, 123 conversations, took 30s"


def test_lines_are_not_wrapped_and_not_coloured_even_where_variables_ask_for_it(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    file, progress = log(Clock())
    with progress:
        progress.say("1,234 tokens [bold]need[/bold] " + "much " * 40 + "\nspace")
    assert len(lines(file)) == 2 and "[bold]" in file.getvalue() and "\x1b" not in file.getvalue()


def test_a_line_comes_every_half_minute_at_first_and_every_minute_later():
    clock = Clock()
    file, progress = log(clock)
    with progress, progress.stage("train", total=1.0):
        run_for(progress, clock, 240)
        assert len(lines(file)) == 1 + 8
        run_for(progress, clock, 300)
        assert len(lines(file)) == 1 + 8 + 5


def test_an_hour_of_many_stages_stays_within_eighty_lines_and_is_never_silent_for_two_minutes():
    clock = Clock()
    file, progress = log(clock)
    longest = 0.0
    with progress:
        for number_ in range(14):
            with progress.stage(f"stage {number_}", total=257, unit="steps") as stage:
                stage.update(0)
                for _ in range(257):
                    before, began = len(file.getvalue()), progress._last_line_s
                    run_for(progress, clock, 1, stage, per_s=1)
                    if len(file.getvalue()) > before:
                        longest = max(longest, clock.now - began)
    assert clock.now - 1000 >= 3590
    assert len(lines(file)) <= 80
    assert longest < 120


def test_after_a_restart_lines_are_as_far_apart_as_they_were():
    clock, counts = Clock(), {}
    for before_s in (0.0, 100.0, 1000.0):
        file, progress = log(clock, before_s=before_s)
        with progress, progress.stage("train", total=1.0):
            run_for(progress, clock, 240)
            counts[before_s] = len(lines(file))
    assert counts == {0.0: 1 + 8, 100.0: 1 + 4 + 1, 1000.0: 1 + 3}


BRIEF = ("measure", "predict")  # stages that are told only if they take long
SILENT = (*BRIEF, "synthesise", "train 0")  # where an earlier start has ended them; a lap has a line of its own


def preparation(minutes: float, num_depths: int) -> list[tuple[str, float]]:
    """What `prepare` tells of, with seconds: 0 for a line, else a stage. The profile, three laps of synthesis and
    training, the other depths' training, rows of two splits and a line for each depth, the prediction, and the end."""
    work_s = 60 * minutes - 160 - 30 - 20 * num_depths
    first_s = 0.4 * work_s / (0.5 + 0.5 * num_depths)
    steps = [("peak memory", 0.0), ("room on the disk", 0.0), ("profile", 150.0)]
    for lap, (synthesis, training) in enumerate(((0.25, 0.2), (0.25, 0.3), (0.5, 0.5))):
        steps += [(f"synthesise {lap}", 0.6 * work_s * synthesis), (f"train 0, {lap}", first_s * training)]
        steps.append(("this lap", 0.0))
    steps += [(f"train {depth}", first_s / 2) for depth in range(1, num_depths)]
    for depth in range(num_depths):
        steps += [(f"measure {depth}, {split}", 10.0) for split in range(2)] + [("acceptance rate", 0.0)]
    return [*steps, ("predict", 35.0), *[("the end", 0.0)] * 6]


def start_of(steps: list[tuple[str, float]], clock: Clock, done: dict[str, float], end_s: float) -> tuple[int, float]:
    """One start, which goes on where the last one was and is killed at `end_s`: its lines, one on vLLM's log among
    them, and its longest silence. done: seconds by stage."""
    file, progress = log(clock, before_s=clock.now - 1000)
    longest = 0.0
    with suppress(Killed), progress:
        for name, seconds in steps:
            if done.get(name, 0.0) >= seconds:
                if not name.startswith(SILENT):
                    progress.say(name)
                continue
            brief = name.startswith(BRIEF)
            with progress.stage(name, total=seconds, unit="steps", often_brief=brief) as stage:
                stage.update(done.get(name, 0.0))
                while stage.done < seconds:
                    told_s = progress._last_line_s
                    run_for(progress, clock, 1, stage, per_s=1)
                    if progress._last_line_s > told_s:
                        longest = max(longest, progress._last_line_s - told_s)
                    done[name] = stage.done
                    if clock.now - 1000 >= end_s:
                        raise Killed
    killed = clock.now - 1000 >= end_s
    return 1 + len(lines(file)) - killed, longest  # a stage that is killed does not say so


@pytest.mark.parametrize(
    ("minutes", "num_depths", "kills", "most"),
    [(60, 2, (), 72), (60, 6, (), 76), (60, 2, (0.25, 0.5), 76), (60, 6, (0.25, 0.5), 80), (45, 2, (0.25, 0.5), 66)],
)
def test_an_hour_of_a_preparation_stays_within_eighty_lines_killed_twice_or_not(minutes, num_depths, kills, most):
    clock, done, counts = Clock(), {}, []
    for end in (*kills, float("inf")):
        count, longest = start_of(preparation(minutes, num_depths), clock, done, end * minutes * 60)
        counts.append(count)
        assert longest < 120
    assert clock.now - 1000 == pytest.approx(60 * minutes, abs=30)
    assert minutes < sum(counts) <= most, counts


def test_a_silent_stage_still_shows_life_from_a_thread_of_its_own(monkeypatch):
    monkeypatch.setattr("apparate_llm.progress.FIRST_EVERY_S", 0.05)
    file = io.StringIO()
    progress = Progress(Console(file=file), poll_s=0.01)
    with progress, progress.stage("synthesise", total=10, unit="tokens", facts="starting the model"):
        deadline = time.monotonic() + 10
        while len(lines(file)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines(file)[2] == "synthesise  0/10 tokens (0 %), starting the model, 0s so far"
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_what_was_done_before_counts_neither_into_the_rate_nor_does_the_start_of_the_model():
    clock = Clock()
    stage = Stage("train", 1000, "steps", "", clock.monotonic)
    clock.now += 100
    stage.update(600)
    assert stage.rate_per_s is None and stage.left_s is None
    clock.now += 10
    stage.update(620)
    assert stage.rate_per_s == 2.0 and stage.left_s == 190
    stage.total = 820
    assert stage.left_s == 100


def test_seconds_are_shown_as_times_and_need_no_rate():
    clock = Clock()
    stage = Stage("synthesise", 1485, "s", "", clock.monotonic)
    stage.update(200)
    assert stage.amount() == "3m 20s/25m (13 %)"
    assert stage.rate() == "" and stage.left_s == 1285


def test_slow_work_has_its_rate_per_minute_or_hour():
    clock = Clock()
    stage = Stage("eval", 100, "blocks", "", clock.monotonic)
    stage.update(0)
    clock.now += 60
    stage.update(12)
    assert stage.rate() == "12 blocks/min"
    stage.update(0.1)
    assert stage.rate() == "6 blocks/h"


@pytest.mark.parametrize(
    ("per_s", "text"), [(410.0, "410 steps/s"), (0.5, "30 steps/min"), (0.001, "3.6 steps/h"), (0.0, "0 steps/h")]
)
def test_a_rate_is_per_second_minute_or_hour(per_s, text):
    assert rate_of(per_s, "steps") == text


def test_of_what_is_often_brief_nothing_is_said_unless_it_takes_long():
    clock = Clock()
    file, progress = log(clock)
    with progress:
        with progress.stage("replay", total=4, unit="combinations", often_brief=True):
            run_for(progress, clock, 20)
        assert lines(file) == []
        with progress.stage("replay", total=4, unit="combinations", often_brief=True):
            run_for(progress, clock, 40)
    assert [line.rpartition(", ")[2] for line in lines(file)] == ["10s so far", "40s so far", "took 40s"]


def test_a_stage_that_an_error_ends_says_so():
    clock = Clock()
    file, progress = log(clock)
    with pytest.raises(RuntimeError), progress, progress.stage("train", total=4, unit="steps") as stage:
        stage.update(1)
        clock.now += 200
        raise RuntimeError
    assert lines(file)[-1] == "train  1/4 steps (25 %), stopped after 3m 20s"


def test_a_full_disk_takes_the_lines_and_not_the_work():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with Progress(Console(file=Full())) as progress, progress.stage("train", total=1):
        progress.say("hello")


def test_on_a_terminal_there_are_bars_and_a_finished_stage_stays_as_one_line(monkeypatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    file, clock = Terminal(), Clock()
    console = Console(file=file, width=120, force_terminal=True)
    with Progress(console, left_s=lambda: 2460, clock=clock.monotonic) as progress:
        with progress.stage("train depth 0", total=100, unit="steps") as stage:
            stage.update(0)
            clock.now += 10
            stage.update(40, "loss 2.100")
            assert progress._bars is not None
            progress._bars.refresh()
            progress.say("said above")
        assert not progress._bars.tasks
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "40/100 steps (40 %) left 15s, whole 41m 4 steps/s, loss 2.100" in shown
    assert "said above" in shown
    assert "train depth 0  40/100 steps (40 %), 4 steps/s, loss 2.100, took 10s" in shown


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    with Progress(Console(file=file, force_terminal=True)) as progress:
        progress.say("hello")
    assert lines(file) == ["hello"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.84, "0.8"), (3, "3"), (412.4, "412"), (9_999, "9999"), (12_340, "12.3k"), (1_364_347, "1.36M")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (200, "3m 20s"), (2460, "41m"), (3599, "1h 00m"), (3900, "1h 05m")],
)
def test_times_are_short(seconds, text):
    assert time_span(seconds) == text
