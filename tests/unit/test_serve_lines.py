"""What a terminal shows of a server, and when vLLM's log goes to a file."""

import io
import os
import socket
import sys

import pytest
from rich.console import Console

from apparate_llm import serve_lines
from apparate_llm.cli import FIRST_STEPS, build_parser, main, spelt_out
from apparate_llm.config import parse_config
from apparate_llm.serve_lines import ServeLines, exits_line, hides_log, log_file


def lines_of(*flags: str, host: str | None = None, port: int = 8000, **options) -> ServeLines:
    return ServeLines("/models/mine", parse_config(options), host=host, port=port, vllm_flags=list(flags))


def test_a_server_is_told_in_six_lines_with_that_of_its_log():
    lines = lines_of("--served-model-name", "mine")
    shown = [*lines.first(), "the log's", *lines.ready(14.2)]
    assert len(shown) == 6
    assert shown[0] == "Model: mine"
    assert shown[1] == "Exits: on, accuracy bound 0.01: at most 1 % of tokens differ from the full model's."
    assert shown[3] == "API: http://localhost:8000/v1, ready after 14 s. Ctrl-C ends the server."
    assert shown[4].startswith("Page: http://localhost:8000/early_exit/")
    assert shown[5].startswith("Docs: http://localhost:8000/docs has all routes, /") and "docs/serving.md" in shown[5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"policy": "off"}, "off (--policy off)"),
        ({"accuracy_bound": 0}, "on, lossless"),
        ({"accuracy_bound": 0.025}, "at most 2.5 % of tokens"),
        ({"bound_kind": "regret"}, "0.01 nats per token (regret)"),
    ],
)
def test_the_bound_is_said_in_words(options, says):
    assert says in exits_line(parse_config(options))


@pytest.mark.parametrize(
    ("flags", "host", "says"),
    [
        ((), "0.0.0.0", "http://localhost:8000/v1"),
        ((), "10.0.0.1", "http://10.0.0.1:8000/v1"),
        ((), "::1", "http://[::1]:8000/v1"),
        (("--ssl-keyfile=key.pem",), None, "https://localhost:8000/v1"),
        (("--uds", "/tmp/s"), None, "/v1 on the socket /tmp/s"),
    ],
)
def test_the_address_is_one_that_clients_can_use(flags, host, says):
    assert says in lines_of(*flags, host=host).ready(1)[0]


def test_what_a_server_does_not_have_is_not_shown(monkeypatch, tmp_path):
    assert not any("early_exit" in line for line in lines_of(policy="off").ready(1))
    monkeypatch.setattr(serve_lines, "GUIDE", tmp_path / "none")
    assert lines_of().ready(1)[-1] == "Docs: http://localhost:8000/docs has all routes."
    assert not any("Docs" in line for line in lines_of("--disable-fastapi-docs").ready(1))


@pytest.mark.parametrize("is_unix", [False, True])
def test_it_is_ready_when_it_listens_and_that_is_said_once(is_unix, tmp_path, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=200)
    server = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET)
    server.bind(str(tmp_path / "s") if is_unix else ("127.0.0.1", 0))
    flags = ("--uds", str(tmp_path / "s")) if is_unix else ()
    lines = lines_of(*flags, host="127.0.0.1", port=8000 if is_unix else server.getsockname()[1])
    lines.beat(console)
    assert out.getvalue() == ""
    server.listen()
    lines.beat(console)
    shown = out.getvalue()
    lines.beat(console)
    server.close()
    assert shown.startswith("API: ") and out.getvalue() == shown


def test_a_long_start_says_now_and_then_that_it_goes_on(monkeypatch):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(serve_lines.time, "monotonic", lambda: now[0])
    lines = lines_of(port=1)
    for now[0] in (1.0, 19.0, 21.0, 50.0, 79.0, 81.0):
        lines.beat(Console(file=out, width=200))
    shown = out.getvalue().splitlines()
    assert [line.split(".")[0] for line in shown] == [f"Still loading after {took} s" for took in (21, 81)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("changed", "hides"),
    [
        ({}, True),
        ({"verbose": True}, False),
        ({"port": 0}, False),
        ({"vllm_flags": ["--headless"]}, False),
        ({"vllm_flags": ["--grpc"]}, False),
        ({"vllm_flags": ["--max-model-len", "100"]}, True),
    ],
)
def test_the_log_goes_to_a_file_where_a_person_looks_on(changed, hides, monkeypatch):
    given = {"verbose": False, "port": 8000, "vllm_flags": []} | changed
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    assert hides_log(**given) == hides
    for name in ("stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, io.StringIO())
            assert not hides_log(**given)
    monkeypatch.setattr(os, "getpid", lambda: 1)  # what a container runs
    assert not hides_log(**given)


def test_a_ports_log_is_kept_until_the_start_after_the_next(monkeypatch, tmp_path):
    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path))
    for text in ("first", "second", "third"):
        log = log_file(8000)
        assert log is not None and log.parent == tmp_path / "logs" and not log.exists()
        log.write_text(text)
    logs = {path.name: path.read_text() for path in log.parent.iterdir()}
    assert logs == {"serve-8000.log": "third", "serve-8000.previous.log": "second"}
    monkeypatch.setenv("APPARATE_CACHE", "/proc/nowhere")
    assert log_file(8000) is None


def test_without_a_command_the_first_steps_are_shown(capsys):
    assert main([]) == 2  # as argparse has it where a command is missing
    out, err = capsys.readouterr()
    assert out == "" and err == FIRST_STEPS + "\n" and len(err.splitlines()) <= 10
    named = [line.split()[1] for line in err.splitlines() if line.startswith("  apparate-llm")]
    assert named == ["demo", "serve", "chat", "prepare", "eval", "doctor"]
    for line in err.splitlines()[1:7]:
        argv = line.split("  ")[1].split()[1:]
        assert build_parser().parse_known_args(spelt_out(argv))[1] == []


@pytest.mark.parametrize("flags", [["--verbose"], ["--no-verbose"], []])
def test_the_log_can_be_asked_for(flags):
    args, rest = build_parser().parse_known_args(spelt_out(["serve", *flags]))
    assert args.verbose == (flags == ["--verbose"]) and rest == []


def test_help_is_ours_and_with_a_section_vllms(capsys):
    for argv in (["serve", "-h"], ["serve", "--help"], ["serve", "--help", "--port", "1"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        out = capsys.readouterr().out
        assert end.value.code == 0 and "--accuracy-bound" in out and "--max-model-len" not in out
    with pytest.raises(SystemExit) as end:
        main(["serve", "--help=max-model-len"])
    assert end.value.code == 0 and "--max-model-len" in capsys.readouterr().out
