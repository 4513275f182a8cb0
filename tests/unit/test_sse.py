"""Server-sent events, cut into parts in every way a network may cut them."""

import asyncio
import json

import pytest

from apparate_llm.sse import EventReader, event_data, event_data_async
from tests.fake_server import SPLITTERS


def data_of(stream: bytes, size: int) -> list[str]:
    parts = [stream[at : at + size] for at in range(0, len(stream), size)]

    async def as_they_come():
        for part in parts:
            yield part

    async def collected():
        return [data async for data in event_data_async(as_they_come())]

    data = list(event_data(parts))
    assert asyncio.run(collected()) == data
    reader = EventReader()
    raw = [event.raw for part in parts for event in reader.feed(part)] + [event.raw for event in reader.end()]
    assert b"".join(raw) == stream  # nothing is lost and nothing moved
    return data


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_whole_whatever_their_text_and_however_they_are_cut(end, size):
    text = f"a{SPLITTERS}b \N{GRINNING FACE} \u65e5\u672c"
    chunk = json.dumps({"text": text}, ensure_ascii=False)
    assert "\u2028" in chunk and "\x85" in chunk
    lines = [f"data: {chunk}", "", ": ping", "", "event: x", "data: 1", "data:2", "", "data:[DONE]", "", ""]
    first, several, last = data_of(end.join(lines).encode(), size)
    assert json.loads(first) == {"text": text} and several == "1\n2" and last == "[DONE]"


def test_a_blank_after_the_colon_is_one_at_most_and_none_is_needed():
    assert data_of(b"data:{}\n\ndata:  a\n\ndata\n\n", 1000) == ["{}", " a", ""]


def test_a_last_event_without_its_blank_line_counts():
    for ending in (b"", b"\n", b"\n\n"):
        assert data_of(b"data: 1\n\ndata: [DONE]" + ending, 5) == ["1", "[DONE]"]


def test_names_fields_and_a_byte_order_mark():
    stream = b"\xef\xbb\xbfevent: a\ndata: 1\n\nid: 7\nretry: 5\nevent:b\ndata: 2\n\nevent: c\n\ndata: 3\n\n"
    events = [(event.name, event.data) for event in EventReader().feed(stream)]
    assert events == [("a", "1"), ("b", "2"), ("c", None), ("", "3")]


def test_a_long_line_in_many_parts_takes_time_by_its_length():
    """Each part is looked at once."""
    reader = EventReader()
    for _ in range(200_000):
        assert reader.feed(b"x") == []
    assert len(reader.feed(b"\n\n")[0].raw) == 200_002
