#!/usr/bin/env python3
"""`prepare` on a model of 1.5 billion parameters with random weights: progress, memory, budget, kills, a full disk.

    python -m scripts.check_prepare [--folder DIR] [--time-budget 45m] [--layers 28 --hidden 1536] [-- FLAGS of prepare]

From the repository's root; takes a little more than twice the budget. First a run that is left alone: lines in its log,
peak memory as stated, time. Then one on a small disk (a tmpfs, if we may mount one): killed with -9 while it
synthesises and while it trains, each time started again, then out of disk space, and started again after space was
made; the time of all starts counts. Small, to try it: --layers 4 --hidden 256 --vocabulary 8000 --time-budget 8m. Exit
code 1 if something is not as expected.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from apparate_llm.files import PART
from apparate_llm.launch import server_environment
from apparate_llm.prepare.command import duration
from apparate_llm.prepare.store import RowStore
from apparate_llm.progress import AT_LEAST_EVERY_S, FIRST_EVERY_S, FIRST_S
from scripts.random_model import build_model

LATE_S = 5.0  # that a line may be late on a busy machine
# Stage, seconds that it has been at work, and the files in which it keeps its work.
KILLS = (("synthesise", 150.0, "rows/*"), ("train", 90.0, "train-*.pt"))
AT_WORK_FRAC, LEAST_AT_WORK_S = 0.08, 75.0  # of the budget, at most so many; by the latter it has kept something
DISK_FULL = 0.65  # of the budget
LOST_S = 120.0
CLOCK_S = 15.0  # of the time budget, that a kill may lose
MOST_LINES = 80  # of an hour's log, or a shorter one's
END_TIMEOUT_S = 900.0
STARTING = "starting the model"
WITH_RATE = re.compile(r"\d\d:\d\d:\d\d  (\w+).* (?:\d+ %|\(\d+ %\)).*/(?:s|min|h)\b.*stage left .*whole left ")
STATED = re.compile(r"peak memory about ([\d.]+) ([GM])iB")


class Row(NamedTuple):
    what: str
    expected: str
    measured: str
    holds: bool | None  # None: left out, or only told


def at_most(what: str, limit_s: float, measured_s: float) -> Row:
    return Row(what, f"<= {limit_s:.0f} s", f"{measured_s:.0f} s", measured_s <= limit_s)


def lines_of(runs: Sequence["Run"]) -> Row:
    """All starts of one preparation together."""
    number, hours = sum(len(run.lines) for run in runs), sum(run.took_s() for run in runs) / 3600
    most = round(MOST_LINES * max(1.0, hours))
    return Row("lines of log", f"<= {most}", str(number), number <= most)


class Run:
    """One `prepare`: what it says and when, and the memory of all its processes."""

    def __init__(self, model: Path, out: Path, log: Path, budget_s: float, flags: list[str]) -> None:
        command = [sys.executable, "-m", "apparate_llm.cli", "prepare", str(model), "--out", str(out)]
        self.out = out
        self.began_s, self.ended_s = time.monotonic(), 0.0
        self.lines: list[tuple[float, str]] = []  # seconds after the start
        self.peak_gib = {"needed": 0.0, "whole": 0.0}  # without and with pages of files
        self.process = subprocess.Popen(
            [*command, "--time-budget", f"{budget_s:.0f}s", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=server_environment(),
        )
        self._known: set[psutil.Process] = set()
        self._threads = [threading.Thread(target=self._listen, args=(log,)), threading.Thread(target=self._watch)]
        for thread in self._threads:
            thread.start()

    def spent_s(self) -> float:
        return time.monotonic() - self.began_s

    def took_s(self) -> float:
        return self.ended_s or self.spent_s()

    def _listen(self, log: Path) -> None:
        assert self.process.stdout is not None
        with log.open("a") as file:
            for line in self.process.stdout:
                file.write(f"{self.spent_s():8.1f}  {line}")
                file.flush()
                if line.strip():
                    self.lines.append((self.spent_s(), line.rstrip()))

    def _watch(self) -> None:
        """Proportional set sizes: a page that processes share counts once."""
        while self.process.poll() is None:
            with suppress(psutil.Error):
                main = psutil.Process(self.process.pid)
                self._known |= {main, *main.children(recursive=True)}
            now = dict.fromkeys(("Pss_Anon", "Pss_Shmem", "Pss_File"), 0.0)
            for process in self._known:
                with suppress(OSError, psutil.Error):
                    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                        name, _, size = line.partition(":")
                        if name in now:
                            now[name] += int(size.split()[0]) / 2**20
            now |= {"needed": now["Pss_Anon"] + now["Pss_Shmem"], "whole": sum(now.values())}
            self.peak_gib = {name: max(peak, now[name]) for name, peak in self.peak_gib.items()}
            time.sleep(1.0)
        self.ended_s = self.spent_s()

    def wait(self, timeout_s: float | None) -> int | None:
        """Exit code; None if it has not ended by then."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
            for thread in self._threads:
                thread.join(30.0)
        return self.process.returncode

    def wait_at_work(self, stage: str, seconds: float, timeout_s: float) -> int | None:
        """Until it has been at a stage for so long, its model's start left out; its exit code if it ends before."""
        until_s, since_s = time.monotonic() + timeout_s, None
        while self.process.poll() is None and time.monotonic() < until_s:
            if not self._is_at_work(stage):
                since_s = None
            elif since_s is None:
                since_s = time.monotonic()
            if since_s is not None and time.monotonic() - since_s >= seconds:
                return None
            time.sleep(0.5)
        return self.wait(0.0)

    def _is_at_work(self, stage: str) -> bool:
        """By what it says, or by files of a training, whose lines may come late."""
        if stage == "train":
            begun = (self.out / "work").glob("train-*-begun.json")
            return any(not path.with_name(path.name.replace("-begun", "")).is_file() for path in begun)
        texts = [text.partition("  ")[2] for _, text in list(self.lines)]
        return any(text.startswith(stage) and STARTING not in text for text in texts)

    def kill(self) -> int:
        """As an operating system short of memory does; returns how many processes outlive it."""
        self.process.kill()
        self.wait(None)
        _, alive = psutil.wait_procs([p for p in self._known if p.pid != self.process.pid], timeout=20.0)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        return len(alive)


def last_kept_s(work: Path, files: str, began: float) -> float:
    """Seconds since a stage left work in its files, or this start of it."""
    kept = [path for path in work.glob(files) if path.suffix != PART]
    return time.time() - max([began, *(path.stat().st_mtime for path in kept)])


def kept_tokens(work: Path) -> int:
    return RowStore(work / "rows").counts["answer_tokens"] if (work / "rows").is_dir() else 0


@contextmanager
def small_disk(folder: Path, gib: float) -> Iterator[bool]:
    """Whether it is one: only root may mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(gib * 2**30)}", "none", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)


def stated_gib(run: Run) -> float:
    """The peak of its memory, as it says."""
    stated = next((match for _, line in run.lines if (match := STATED.search(line))), None)
    return 0.0 if stated is None else float(stated[1]) / (1 if stated[2] == "G" else 1024)


def memory_of(runs: Sequence["Run"]) -> Row:
    """Of starts that go on with an earlier one's work, which may need less."""
    most_gib, peak_gib = 1.2 * max(map(stated_gib, runs)), max(run.peak_gib["needed"] for run in runs)
    return Row("peak memory", f"<= {most_gib:.2f} GiB", f"{peak_gib:.2f} GiB", peak_gib <= most_gib)


def left_alone(run: Run, code: int | None, budget_s: float) -> list[Row]:
    took_s = run.took_s()
    gaps = [(b - a, b) for a, b in pairwise([0.0, *(at_s for at_s, _ in run.lines), took_s])]  # and when they ended
    stated, peak = stated_gib(run), run.peak_gib["needed"]
    rated = sorted({match[1] for _, line in run.lines if (match := WITH_RATE.match(line))})
    return [
        Row("exit code", "0", str(code), code == 0),
        at_most("silence at first", FIRST_EVERY_S + LATE_S, max(gap for gap, ended_s in gaps if ended_s <= FIRST_S)),
        at_most(
            "later", AT_LEAST_EVERY_S + LATE_S, max((gap for gap, ended_s in gaps if ended_s > FIRST_S), default=0.0)
        ),
        lines_of([run]),
        Row(
            "amount, rate, time left",
            "of synthesise, train",
            ", ".join(rated),
            {"synthesise", "train"} <= set(rated),
        ),
        Row("peak memory", f"{stated:.2f} GiB ± 20 %", f"{peak:.2f} GiB", abs(stated - peak) <= 0.2 * peak),
        Row("with pages of files", "", f"{run.peak_gib['whole']:.2f} GiB", None),
        Row("time", f"{budget_s:.0f} s ± 10 %", f"{took_s:.0f} s", abs(took_s - budget_s) <= 0.1 * budget_s),
    ]


def disturbed(start: Callable[[], Run], out: Path, budget_s: float, is_small: bool) -> list[Row]:
    rows, spent_s, tokens = [], 0.0, 0
    for stage, seconds, files in KILLS:
        run, began = start(), time.time()
        code = run.wait_at_work(stage, min(seconds, max(LEAST_AT_WORK_S, AT_WORK_FRAC * budget_s)), budget_s)
        rows.append(at_most(f"{stage}: last work kept, ago", LOST_S, last_kept_s(out / "work", files, began)))
        if code is not None:
            return [*rows, Row("still at work", "yes", f"exit code {code}", False)]
        spent_s += run.spent_s()
        left = run.kill()
        rows.append(Row("processes left by kill -9", "0", str(left), left == 0))
        before, tokens = tokens, kept_tokens(out / "work")
        rows.append(Row("answer tokens kept", f">= {before:,}", f"{tokens:,}", tokens >= before))
    run = start()
    code = run.wait(max(0.0, DISK_FULL * budget_s - spent_s) if is_small else budget_s + END_TIMEOUT_S)
    if is_small and code is None:
        rows.append(out_of_space(run, out))
        spent_s += run.took_s()
        run = start()
        code = run.wait(budget_s + END_TIMEOUT_S)
    else:
        rows.append(Row("disk full", "", "left out: it needs root, and a budget to be at work in", None))
    made, now = (out / "ramps.json").is_file(), kept_tokens(out / "work")
    rows.append(Row("answer tokens kept", f">= {tokens:,}", f"{now:,}", now >= tokens))
    rows.append(at_most("time of all starts", 1.1 * budget_s + CLOCK_S * len(KILLS), spent_s + run.took_s()))
    return [*rows, Row("in the end", "exit code 0 and ramps", f"exit code {code}, {made}", code == 0 and made)]


def out_of_space(run: Run, out: Path) -> Row:
    """While it is at work; it has ended afterwards, and there is room again."""
    ballast = out.parent / "ballast"
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=1M"], capture_output=True, check=False)
    code, last = run.wait(END_TIMEOUT_S), run.lines[-1][1] if run.lines else ""
    says = code is not None and (code == 0 or "space" in last.lower())
    ballast.unlink()
    if code is None:
        run.kill()
    return Row("disk full", "goes on, or ends and says so", f"exit code {code}: {last}", says)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps model, ramps and logs (default: a temporary one)")
    parser.add_argument("--time-budget", type=duration, default=45 * 60.0, metavar="TIME")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1536, help="a multiple of 128")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--disk-gib", type=float, default=8.0, help="of the disk that gets full; it is in memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="of prepare, behind --")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the disk is given back
    folder = args.folder or Path(tempfile.mkdtemp(prefix="check-prepare-", dir="."))
    folder.mkdir(parents=True, exist_ok=True)
    model, console = folder / "model", Console()
    if not (model / "model.safetensors").is_file():
        console.print(f"building a model in {model}")
        build_model(model, layers=args.layers, hidden=args.hidden, vocabulary=args.vocabulary)

    runs: list[Run] = []

    def start(out: Path, log: str) -> Run:
        runs.append(Run(model, out, folder / log, args.time_budget, args.flags))
        return runs[-1]

    with small_disk(folder / "disk", args.disk_gib) as is_small:
        alone, out = folder / "alone", folder / "disk" / "out"
        for old in (alone, out):
            shutil.rmtree(old, ignore_errors=True)
        try:
            run = start(alone, "alone.log")
            rows = left_alone(run, run.wait(args.time_budget + END_TIMEOUT_S), args.time_budget)
            rows += disturbed(lambda: start(out, "disturbed.log"), out, args.time_budget, is_small)
            rows += [lines_of(runs[1:]), memory_of(runs[1:])]
        finally:
            for run in runs:
                run.kill()
    table = Table("what", "expected", "measured", "holds", title=f"logs: {folder}/*.log")
    for row in rows:
        table.add_row(*row[:3], "" if row.holds is None else "yes" if row.holds else "NO")
    console.print(table)
    if args.json:
        command = "python -m scripts.check_prepare " + shlex.join(sys.argv[1:])
        args.json.write_text(json.dumps({"command": command, "rows": [row._asdict() for row in rows]}, indent=1) + "\n")
    return 1 if any(row.holds is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
