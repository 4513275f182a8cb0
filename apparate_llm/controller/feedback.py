"""The feedback log: what exits were proposed, what the full model said, and what it cost. No text, no tokens,
and nothing of exits that prompt lookup proposed without a ramp.

One JSON object per line: first a header, then one engine step per line (see `LoggedStep`).
"""

import gzip
import json
import logging
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, Protocol, TextIO

from apparate_llm.core import Decision, Exit

logger = logging.getLogger("vllm.apparate")
SCHEMA_VERSION = 1
MAX_BYTES = 32 << 20  # then, and at a start, the file becomes FILE.1, replacing an older one
PAUSE_S = 60.0  # after which a log that could not be written is tried again


TAKEN = {Decision.STOP: 0, Decision.HOLD: 1, Decision.RELEASE: 2}  # proposed and not taken, held, released


class FeedbackError(ValueError):
    """Not a feedback log. The message is one line for the user."""


class LoggedExit(NamedTuple):
    request: int  # the same for all exits of a request
    depth: int
    draft_step: int
    confidence: float
    taken: int  # see TAKEN
    agrees: bool
    regret_nats: float | None


class LoggedStep(NamedTuple):
    """Draft steps and the verification pass that followed."""

    num_requests: int
    num_tokens: int
    verify_ms: float  # of the verification pass
    draft_steps: list[tuple[int, float]]  # num_tokens, ms
    exits: list[LoggedExit]


class TimedStep(Protocol):
    """What is read of `exits.step_clock.Took`."""

    @property
    def num_requests(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def verify_ms(self) -> float: ...


class VerifiedExit(Protocol):
    """What is read of `exits.ledger.Verdict`."""

    @property
    def request_id(self) -> str: ...

    @property
    def exit(self) -> Exit: ...

    @property
    def agrees(self) -> bool: ...

    @property
    def regret_nats(self) -> float | None: ...


class FeedbackLog:
    """Written by the engine; two files of MAX_BYTES at most. What cannot be written is left out, with a warning."""

    def __init__(self, path: Path, header: Mapping[str, object], *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self.header = {"schema_version": SCHEMA_VERSION, **header}
        self.max_bytes = max_bytes
        self.num_lost = 0  # records that could not be written
        self._drafted: list[tuple[int, float]] = []
        self._file: FileIO | None = None
        self._size = 0  # of the whole lines in the file
        self._resume_s = 0.0  # nothing is written before

    def drafted(self, spent: list[tuple[int, float]]) -> None:
        """spent: num_tokens and ms of each draft step."""
        self._drafted = spent

    def completed(self, took: TimedStep | None, verdicts: Iterable[VerifiedExit]) -> None:
        """took: None where the step cannot be timed and is left out."""
        spent, self._drafted = self._drafted, []
        if took is None:
            return
        try:
            if monotonic() >= self._resume_s:
                self._write(record_of(took, spent, verdicts))
            else:
                self.num_lost += 1
        except Exception as error:
            self.num_lost += 1
            self._resume_s = monotonic() + PAUSE_S
            logger.warning(
                "Feedback log %s not written, tried again in %.0f s: %s: %s",
                self.path,
                PAUSE_S,
                type(error).__name__,
                error,
            )

    def _write(self, record: list[object]) -> None:
        if self._file is not None and self._size > self.max_bytes:
            self._file.close()
            self._file = None
        if self._file is None:
            self._begin()
        self._append(record)

    def _begin(self) -> None:
        """A new file. The one that is there, of an earlier start or full, becomes FILE.1."""
        if self.path.is_file() and self.path.stat().st_size:
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))
        self._file, self._size = self.path.open("wb", buffering=0), 0

    def _append(self, record: list[object]) -> None:
        """One line, whole or not at all: neither a killed server nor a full disk leaves half of one in between."""
        assert self._file is not None
        lines = [self.header, record] if self._size == 0 else [record]
        data = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines).encode()
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError:
            with suppress(OSError):  # a device
                self._file.truncate(self._size)
                self._file.seek(self._size)
            raise
        self._size += len(data)


def record_of(took: TimedStep, spent: list[tuple[int, float]], verdicts: Iterable[VerifiedExit]) -> list[object]:
    """A line of the log, as `read_steps` reads it."""
    exits = [
        [
            zlib.crc32(verdict.request_id.encode()),
            verdict.exit.depth,
            verdict.exit.draft_step,
            round(verdict.exit.confidence, 4),
            TAKEN[verdict.exit.decision],
            int(verdict.agrees),
            None if regret is None or not math.isfinite(regret) else round(regret, 3),
        ]
        for verdict, regret in ((verdict, verdict.regret_nats) for verdict in verdicts)
        if verdict.exit.greedy and not verdict.exit.lookup_length
    ]
    draft_steps = [[num_tokens, round(ms, 3)] for num_tokens, ms in spent]
    return [took.num_requests, took.num_tokens, round(took.verify_ms, 3), draft_steps, exits]


def _open(path: Path) -> TextIO:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open()


def read_header(path: Path) -> dict[str, Any]:
    """Raises FeedbackError with the file and what is wrong."""
    try:
        with _open(path) as file:
            header: dict[str, Any] = json.loads(file.readline())
        version = header["schema_version"]
    except OSError as error:
        raise FeedbackError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError, EOFError, zlib.error):
        raise FeedbackError(f"{path} is not a feedback log: its first line is no header") from None
    if version != SCHEMA_VERSION:
        raise FeedbackError(f"{path}: schema version {version}, this is for {SCHEMA_VERSION}")
    return header


def read_steps(path: Path) -> Iterator[LoggedStep]:
    """All steps after the header; a last line that was cut off is left out. Raises FeedbackError."""
    try:
        with _open(path) as file:
            next(file)
            for number, line in enumerate(file, 2):
                if not line.endswith("\n"):
                    return
                try:
                    yield _step_of(json.loads(line))
                except (ValueError, TypeError, RecursionError):
                    raise FeedbackError(f"{path}:{number}: not an engine step") from None
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FeedbackError(f"damaged {path}: {error}") from None


def _step_of(record: Any) -> LoggedStep:
    """Raises ValueError or TypeError for what no engine has written."""
    requests, num_tokens, ms, draft_steps, exits = record
    proposed = [LoggedExit(a, d, n, c, taken, bool(ok), regret) for a, d, n, c, taken, ok, regret in exits]
    step = LoggedStep(requests, num_tokens, ms, [(n, t) for n, t in draft_steps], proposed)
    whole = [requests, num_tokens, *(n for n, _ in step.draft_steps)]
    places = [number for one in proposed for number in (one.depth, one.draft_step)]
    if not (
        all(type(number) is int and number >= 1 for number in whole)
        and all(type(number) is int and number >= 0 for number in places)
        and 0.0 < ms < math.inf
        and all(0.0 <= t < math.inf for _, t in step.draft_steps)
        and all(0.0 <= one.confidence <= 1.0 and one.taken in TAKEN.values() for one in proposed)
        and all(one.regret_nats is None or math.isfinite(one.regret_nats) for one in proposed)
    ):
        raise ValueError
    return step
