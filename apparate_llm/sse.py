"""Server-sent events out of the bytes of a stream, read as the HTML standard says.

Lines end with \\n, \\r\\n or \\r and nothing else: a JSON text may hold U+2028, U+0085 and other characters at which
`str.splitlines` and readers that are built on it split. `bytes.splitlines` does not.
"""

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator
from typing import NamedTuple

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Event(NamedTuple):
    name: str  # "" where the event has none
    data: str | None  # None where the block is no event: a comment, or a stray blank line
    raw: bytes  # as it came, its blank line included


class EventReader:
    """Whole events out of parts of any size: a part may end within a character, or between \\r and \\n."""

    def __init__(self) -> None:
        self._raw: list[bytes] = []  # of the event under way
        self._line: list[bytes] = []  # parts of the line under way
        self._name = ""
        self._data: list[str] = []
        self._is_first = True  # line of the stream
        self._after_return = False  # a \n that comes next ends no line

    def feed(self, part: bytes) -> list[Event]:
        """The events that end in this part."""
        events: list[Event] = []
        if self._after_return and part.startswith(b"\n"):
            self._raw.append(b"\n")  # of the event before it, where that is out already
            part = part[1:]
            self._after_return = False
        if part:
            self._after_return = part.endswith(b"\r")
        for line in part.splitlines(keepends=True):
            self._raw.append(line)
            text = line.rstrip(b"\r\n")
            self._line.append(text)
            if len(text) < len(line) and (event := self._end_line()) is not None:
                events.append(event)
        return events

    def end(self) -> list[Event]:
        """What is left when the stream has ended: servers may leave out the last blank line."""
        if self._line:
            self._end_line()
        return [self._end_event()] if self._raw else []

    def _end_line(self) -> Event | None:
        line = b"".join(self._line)
        self._line.clear()
        if self._is_first:
            self._is_first = False
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line:
            return self._end_event()
        field, _, value = line.decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        return None

    def _end_event(self) -> Event:
        data = "\n".join(self._data) if self._data else None
        event = Event(self._name, data, b"".join(self._raw))
        self._raw, self._data, self._name = [], [], ""
        return event


def event_data(parts: Iterable[bytes]) -> Iterator[str]:
    """Of each event that has any."""
    reader = EventReader()
    for part in parts:
        yield from (event.data for event in reader.feed(part) if event.data is not None)
    yield from (event.data for event in reader.end() if event.data is not None)


async def event_data_async(parts: AsyncIterable[bytes]) -> AsyncGenerator[str, None]:
    """Of each event that has any."""
    reader = EventReader()
    async for part in parts:
        for event in reader.feed(part):
            if event.data is not None:
                yield event.data
    for event in reader.end():
        if event.data is not None:
            yield event.data
