"""What matters of vLLM's log, for a terminal that does not show the rest: errors, and warnings of ours."""

import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LOGGER = "vllm.apparate"  # of all our modules
SIGN = "apparate_llm/"  # before the name of the file, in lines of ours
PROCESS = r"^(?:\([^()]* pid=\d+\) )?"
OF_VLLM = re.compile(PROCESS + r"(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[(?P<file>[^\]]+):\d+\] ?(?P<text>.*)$")
OF_UVICORN = re.compile(PROCESS + r"(?P<level>[A-Z]+): +(?P<text>.*)$")
TRACEBACK = "Traceback (most recent call last):"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
ERRORS = ("ERROR", "CRITICAL")
ENDING = "trigger received signal"  # what an engine writes that is told to end
ENGINE_ENDED = "EngineDeadError"  # what its other processes then make of it
REMEMBERED = 20  # messages that are not repeated: a trace often comes from each process above
POLL_S = 0.2


class Message(NamedTuple):
    level: str  # error or warning
    text: str


def sign_our_lines() -> None:
    """Let vLLM's log show which lines are ours. Called in each process."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(one, _Sign) for one in logger.filters):
        logger.addFilter(_Sign())


class _Sign(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not record.filename.startswith(SIGN):
            record.filename = SIGN + record.filename
        return True


class LogReader:
    """Out of the lines of a log, one after the other, the messages that matter. Of one with a trace, its first line and
    its last."""

    def __init__(self) -> None:
        self._head: str | None = None  # of the message under way; "": of one whose further lines have none
        self._level = self._first = self._last = ""
        self._is_indented = False  # its line before
        self._is_ending = False
        self._recent: deque[str] = deque(maxlen=REMEMBERED)

    def take(self, line: str) -> list[Message]:
        """The messages that end where this line begins."""
        line = COLOURS.sub("", line).rstrip()
        match = OF_VLLM.match(line)
        head = line[: match.start("text")].rstrip() if match else ""
        text = match["text"] if match else line
        self._is_ending |= ENDING in text
        if self._head is not None and head == self._head and not (match is None and OF_UVICORN.match(line)):
            if text and not text[0].isspace() and (head or self._is_indented):
                self._last = text  # of a bare trace: what stands behind its calls, and no line after it
            self._is_indented = text[:1].isspace()
            return []
        ended = self.end()
        if match is not None:
            if match["level"] in ERRORS:
                self._begin(head, "error", text)
            elif match["level"] == "WARNING" and match["file"].startswith(SIGN):
                self._begin(head, "warning", text)
        elif other := OF_UVICORN.match(line):
            if other["level"] in ERRORS:
                self._begin("", "error", other["text"])
        elif line.startswith(TRACEBACK):
            self._begin("", "error", "")
        return ended

    def end(self) -> list[Message]:
        """The message under way, if there is one that was not told just before."""
        head, self._head = self._head, None
        if head is None or (self._is_ending and ENGINE_ENDED in self._last):
            return []
        texts = [text for text in (self._first, self._last) if text and text not in self._recent]
        self._recent.extend(texts)
        return [Message(self._level, "\n".join(dict.fromkeys(texts)))] if texts else []

    def _begin(self, head: str, level: str, text: str) -> None:
        self._head, self._level, self._first, self._last, self._is_indented = head, level, text, "", False


def errors_in(text: str) -> list[str]:
    """Of a whole log, the lines that say what went wrong."""
    reader = LogReader()
    messages = [message for line in text.splitlines() for message in reader.take(line)] + reader.end()
    return [line for message in messages if message.level == "error" for line in message.text.splitlines()]


class LogWatch(threading.Thread):
    """Reads a log as it is written, from byte `began` on. say: is given what matters; beat: called at each look."""

    def __init__(self, log: Path, began: int, say: Callable[[Message], None], beat: Callable[[], None]) -> None:
        super().__init__(name="log-watch", daemon=True)
        self.num_errors = 0
        self._file = log.open("rb")
        self._file.seek(began)
        self._rest = b""
        self._reader = LogReader()
        self._say, self._beat = say, beat
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.wait(POLL_S):
            self._look()
            with suppress(OSError):  # the terminal is gone: the server is not
                self._beat()

    def stop(self) -> None:
        """After a last look."""
        self._ends.set()
        self.join()
        self._look()
        self._tell(self._reader.take(self._rest.decode(errors="replace")) if self._rest else [])
        self._tell(self._reader.end())
        self._file.close()

    def _look(self) -> None:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            self._tell(self._reader.take(line.decode(errors="replace")))
        if not lines:  # nothing has come since the last look: what began there is whole
            self._tell(self._reader.end())

    def _tell(self, messages: list[Message]) -> None:
        for message in messages:
            self.num_errors += message.level == "error"
            with suppress(OSError):
                self._say(message)
