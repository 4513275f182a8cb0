"""What of a server's log reaches the terminal: errors, with the end of their trace, and warnings of ours."""

import io
import logging
import time

import pytest

from apparate_llm.log_watch import LOGGER, LogReader, LogWatch, Message, errors_in, sign_our_lines

AT = "11-30 15:52:57"
FAILED = f"""\
(APIServer pid=1) INFO {AT} [api_utils.py:286] non-default args: {{'port': 8123}}
(APIServer pid=1) WARNING {AT} [system_utils.py:255] Found ulimit of 20000
(EngineCore pid=2) ERROR {AT} [core.py:1510] EngineCore failed to start.
(EngineCore pid=2) ERROR {AT} [core.py:1510] Traceback (most recent call last):
(EngineCore pid=2) ERROR {AT} [core.py:1510]   File "core.py", line 1, in run
(EngineCore pid=2) ERROR {AT} [core.py:1510]     raise ValueError(
(EngineCore pid=2) ERROR {AT} [core.py:1510] ValueError: No available memory
(EngineCore pid=2) ERROR {AT} [multiproc_executor.py:315] Worker proc died
Process EngineCore:
Traceback (most recent call last):
  File "process.py", line 314, in _bootstrap
    self.run()
ValueError: No available memory

words of a library
(APIServer pid=1) INFO {AT} [x.py:1] after it
"""


def read(text: str) -> list[Message]:
    reader = LogReader()
    return [message for line in text.splitlines() for message in reader.take(line)] + reader.end()


def test_of_a_failed_start_the_reasons_are_told_once():
    assert read(FAILED) == [
        Message("error", "EngineCore failed to start.\nValueError: No available memory"),
        Message("error", "Worker proc died"),
    ]
    assert errors_in(FAILED) == ["EngineCore failed to start.", "ValueError: No available memory", "Worker proc died"]


def test_colours_and_carriage_returns_change_nothing():
    line = (
        f"\x1b[0;36m(Worker pid=3)\x1b[0;0m \x1b[31mERROR\x1b[0m \x1b[90m{AT}\x1b[0m \x1b[90m[a.py:3]\x1b[0m broken\r"
    )
    assert read(line) == [Message("error", "broken")]


def test_warnings_are_told_where_they_are_ours():
    lines = [f"(Worker pid=3) WARNING {AT} [{name}state.py:46] ignored" for name in ("", "apparate_llm/")]
    assert read(lines[0]) == [] and read("\n".join(lines)) == [Message("warning", "ignored")]


def test_an_error_of_the_http_server_is_told_with_the_end_of_its_trace():
    text = f"""\
(APIServer pid=1) INFO:     Application startup complete.
ERROR:    Exception in ASGI application
Traceback (most recent call last):
  File "a.py", line 1, in b
KeyError: 'x'
INFO:     127.0.0.1:1 - "POST /v1/completions HTTP/1.1" 500 Internal Server Error
(APIServer pid=1) INFO {AT} [x.py:1] goes on
"""
    assert read(text) == [Message("error", "Exception in ASGI application\nKeyError: 'x'")]


@pytest.mark.parametrize("text", ["", "plain words", "INFO:     fine", "a line: ERROR in its middle", "  ERROR:  x"])
def test_other_lines_are_not_told(text):
    assert read(text) == []


def test_an_engine_that_ends_because_the_server_does_is_no_error():
    dead = f"(APIServer pid=1) ERROR {AT} [a.py:9] output_handler failed.\n"
    dead += f"(APIServer pid=1) ERROR {AT} [a.py:9] Traceback (most recent call last):\n"
    dead += f"(APIServer pid=1) ERROR {AT} [a.py:9] vllm.v1.engine.exceptions.EngineDeadError: died\n"
    ending = f"(EngineCore pid=2) INFO {AT} [core.py:1454] [shutdown] EngineCore: trigger received signal=SIGINT\n"
    assert len(read(dead)) == 1 and read(ending + dead) == []


def test_what_is_repeated_is_told_again_only_after_many_others():
    def line(number: int) -> str:
        return f"(Worker pid=3) ERROR 11-30 15:52:{number % 60:02d} [a.py:3] broken {number % 40}"

    assert len(read("\n".join([line(1)] * 3))) == 1
    assert [m.text for m in read("\n".join(line(n) for n in range(80)))].count("broken 1") == 2


def test_lines_of_ours_are_signed_in_vllms_log_and_others_are_not(caplog):
    from vllm.logging_utils import NewLineFormatter

    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        NewLineFormatter("(P pid=1) %(levelname)s %(asctime)s [%(fileinfo)s:%(lineno)d] %(message)s", "%m-%d %H:%M:%S")
    )
    ours, other = logging.getLogger(LOGGER), logging.getLogger("vllm.other")
    for _ in range(2):
        sign_our_lines()
    for logger in (ours, other):
        caplog.set_level(logging.WARNING, logger=logger.name)
        logger.addHandler(handler)
        logger.warning("written by %s\nin two lines", logger.name)
        logger.removeHandler(handler)
    assert out.getvalue().count("[apparate_llm/test_log_watch.py:") == 2
    assert read(out.getvalue()) == [Message("warning", f"written by {LOGGER}\nin two lines")]


def test_a_log_is_followed_while_it_is_written_and_to_its_end(tmp_path):
    log, messages, beats = tmp_path / "log", [], []
    log.write_text(f"ERROR {AT} [a.py:1] of an earlier start\n")
    watch = LogWatch(log, log.stat().st_size, messages.append, lambda: beats.append(1))
    watch.start()
    with log.open("a", buffering=1) as out:
        out.write(f"ERROR {AT} [a.py:1] fir")
        time.sleep(0.5)
        assert messages == []
        out.write("st\n")
        deadline = time.monotonic() + 10
        while not messages and time.monotonic() < deadline:
            time.sleep(0.05)
        assert messages == [Message("error", "first")] and beats
        out.write(f"ERROR {AT} [a.py:1] second, without an end of line")
    watch.stop()
    assert messages[1:] == [Message("error", "second, without an end of line")] and watch.num_errors == 2
