"""What a command that takes minutes says meanwhile: bars on a terminal, plain lines in a log. Imports nothing heavy."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

# In a log: seconds between two lines, and what keeps an hour's log within 80 lines, two restarts included. Where there
# are more lines than there may be by now, they come as seldom as they may, and stages begin without one.
FIRST_S, FIRST_EVERY_S, EVERY_S, AT_LEAST_EVERY_S = 240.0, 30.0, 60.0, 110.0
LINES_AT_FIRST, LINES_PER_MINUTE = 8, 0.8
POLL_S = 0.5
SECONDS = "s"  # a unit whose amounts are shown as times


class Stage:
    """One piece of work. `total` may change."""

    def __init__(self, name: str, total: float, unit: str, facts: str, clock: Callable[[], float]) -> None:
        self.name, self.total, self.unit, self.facts = name, total, unit, facts
        self.done = 0.0
        self._clock = clock
        self._began_s = clock()
        self._first: tuple[float, float] | None = None  # time and amount of the first update

    def update(self, done: float, facts: str = "") -> None:
        """May be called often. What the first call reports was done before, and does not count into the rate."""
        if self._first is None:
            self._first = (self._clock(), done)
        self.done, self.facts = done, facts

    @property
    def took_s(self) -> float:
        return self._clock() - self._began_s

    @property
    def rate_per_s(self) -> float | None:
        """Of this run of the process; None before anything is done."""
        if self._first is None:
            return None
        first_s, before = self._first
        spent_s, done = self._clock() - first_s, self.done - before
        return done / spent_s if spent_s > 0 and done > 0 else None

    @property
    def left_s(self) -> float | None:
        if not math.isfinite(self.total):
            return None
        rest = max(0.0, self.total - self.done)
        if self.unit == SECONDS:
            return rest if self._first else None
        return rest / rate if (rate := self.rate_per_s) else None

    @property
    def frac(self) -> float | None:
        return min(1.0, self.done / self.total) if 0 < self.total < math.inf else None

    def amount(self) -> str:
        """`12.3k/40k tokens (31 %)`."""
        if not self.unit:
            return "" if self.frac is None else f"{100 * self.frac:.0f} %"
        show = time_span if self.unit == SECONDS else number
        done = show(self.done) if self.frac is None else f"{show(self.done)}/{show(self.total)}"
        unit = "" if self.unit == SECONDS else f" {self.unit}"
        return done + unit + ("" if self.frac is None else f" ({100 * self.frac:.0f} %)")

    def rate(self) -> str:
        if not self.unit or self.unit == SECONDS or (per_s := self.rate_per_s) is None:
            return ""
        return rate_of(per_s, self.unit)

    def ended(self, *, stopped: bool) -> str:
        took = f"{'stopped after' if stopped else 'took'} {time_span(self.took_s)}"
        return ", ".join(part for part in (self.amount(), self.rate(), self.facts, took) if part)


class Progress:
    """Stages of one command, and how long the whole still takes by `left_s`, which may be called by another thread.
    before_s: spent on the same work by earlier starts, whose log this one's goes on."""

    def __init__(
        self,
        console: Console,
        *,
        left_s: Callable[[], float | None] = lambda: None,
        before_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        poll_s: float = POLL_S,
    ) -> None:
        self.console = console
        self.left_s = left_s
        self.before_s = before_s
        self.clock = clock
        self.poll_s = poll_s
        self.stages: list[Stage] = []  # that are open; the last one is told of in a log
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._began_s = self._last_line_s = clock()
        self._lines = 0  # told by this start
        self._told_stage = False
        self._bars = self._bars_on(console) if on_terminal(console) else None

    def __enter__(self) -> Self:
        self._began_s = self._last_line_s = self.clock()
        if self._bars is not None:
            self._bars.start()
        else:
            self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bars is not None:
            self._bars.stop()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def stage(
        self, name: str, *, total: float, unit: str = "", facts: str = "", often_brief: bool = False
    ) -> Iterator[Stage]:
        """`facts`: what goes on before the first update, such as a model that loads. often_brief: if it ends before
        the first line is due, nothing is said of it."""
        stage = Stage(name, total, unit, facts, self.clock)
        bar: TaskID | None = None
        with self._lock:
            self.stages.append(stage)
            if self._bars is not None:
                bar = self._bars.add_task(name, total=None, stage=stage)
            elif not often_brief and not (self._told_stage and self._is_full):
                self._told_stage = True
                self._print(self._state(stage, begins=True))
        stopped = True
        try:
            yield stage
            stopped = False
        finally:
            with self._lock:
                self.stages.remove(stage)
                if self._bars is not None and bar is not None:
                    self._bars.remove_task(bar)
                if not often_brief or stage.took_s >= FIRST_EVERY_S:
                    self._print(f"{name}  {stage.ended(stopped=stopped)}")

    def say(self, text: str) -> None:
        """A line, or several, above the bars."""
        with self._lock:
            for line in text.splitlines():
                self._print(line)

    def tick(self) -> None:
        """The last known state as a line, if it is time for one."""
        with self._lock:
            every_s = FIRST_EVERY_S if self._is_early else AT_LEAST_EVERY_S if self._is_full else EVERY_S
            if self.stages and self.clock() - self._last_line_s >= every_s:
                self._print(self._state(self.stages[-1]))

    @property
    def _worked_s(self) -> float:
        return self.before_s + self.clock() - self._began_s

    @property
    def _is_early(self) -> bool:
        return self._worked_s <= FIRST_S

    @property
    def _is_full(self) -> bool:
        """Whether the log has as many lines as it may have by now; earlier starts are taken to have told all theirs."""
        most = lines_by(self._worked_s) - (lines_by(self.before_s) if self.before_s else 0.0)
        return not self._is_early and self._lines >= most

    def _tell(self) -> None:
        while not self._ended.wait(self.poll_s):
            self.tick()

    def _state(self, stage: Stage, *, begins: bool = False) -> str:
        lefts = [
            f"{name} left {time_span(left_s)}"
            for name, left_s in (("stage", stage.left_s), ("whole", self.left_s()))
            if left_s is not None
        ]
        so_far = "" if begins or stage.left_s is not None else f"{time_span(stage.took_s)} so far"
        parts = [stage.amount(), stage.rate(), stage.facts, so_far, *lefts]
        return f"{stage.name}  " + (", ".join(part for part in parts if part) or "begins")

    def _print(self, text: str) -> None:
        self._last_line_s = self.clock()
        self._lines += 1
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
            return
        if self.console.quiet:
            return
        with suppress(OSError):  # a full disk or a closed pipe takes the lines, not the work
            self.console.file.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
            self.console.file.flush()

    def _bars_on(self, console: Console) -> Bars:
        return Bars(
            _Words(lambda stage: stage.name),
            _Bar(bar_width=24),
            _Words(Stage.amount),
            _Words(self._lefts),
            _Words(lambda stage: ", ".join(part for part in (stage.rate(), stage.facts) if part)),
            console=console,
            refresh_per_second=2,
            redirect_stdout=False,  # a library that logs must not be given the bars' stream for good
            redirect_stderr=False,
        )

    def _lefts(self, stage: Stage) -> str:
        whole_s = self.left_s()
        parts = [
            "" if stage.left_s is None else f"left {time_span(stage.left_s)}",
            "" if whole_s is None else f"whole {time_span(whole_s)}",
        ]
        return ", ".join(part for part in parts if part)


class _Bar(BarColumn):
    def render(self, task: Task):  # type: ignore[no-untyped-def]
        stage = task.fields["stage"]
        task.total = None if stage.frac is None else 1.0  # without a total it moves to and fro
        task.completed = stage.frac or 0.0
        return super().render(task)


class _Words(ProgressColumn):
    max_refresh = None

    def __init__(self, words: Callable[[Stage], str]) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self.words = words

    def render(self, task: Task) -> Text:
        return Text(self.words(task.fields["stage"]))


def lines_by(seconds: float) -> float:
    """That a log may have after so much work."""
    return LINES_AT_FIRST + LINES_PER_MINUTE * seconds / 60


def on_terminal(console: Console) -> bool:
    """Whether bars can be drawn there: asked of the file, as variables can make rich draw into a log."""
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


def rate_of(per_s: float, unit: str) -> str:
    """`410 tokens/s`, `12 blocks/min`, `0.5 blocks/h`."""
    factor, name = next((pair for pair in ((1, "s"), (60, "min")) if per_s * pair[0] >= 1), (3600, "h"))
    return f"{number(per_s * factor)} {unit}/{name}"


def number(value: float) -> str:
    """`0.8`, `412`, `12.3k`, `1.25M`."""
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    if value >= 9_999.5:
        return f"{value / 1e3:.1f}k" if value < 99_950 else f"{value / 1e3:.0f}k"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def time_span(seconds: float) -> str:
    """`45s`, `3m 20s`, `41m`, `1h 05m`."""
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    if seconds < 599.5:
        return f"{round(seconds) // 60}m {round(seconds) % 60:02d}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
