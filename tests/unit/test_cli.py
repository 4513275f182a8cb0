"""Whatever a command cannot read, write or start ends it with one line and exit code 2."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from apparate_llm import chat, doctor, launch, replay, serve
from apparate_llm.cli import build_parser, main
from apparate_llm.eval import run as evaluation
from apparate_llm.prepare import command as prepare

SHIPPED = Path(serve.__file__).parent / "assets" / "smollm2-135m-instruct"
COMMANDS = {
    "serve": (serve, "check_files", ["serve"]),
    "doctor": (doctor, "examine", ["doctor"]),
    "chat": (chat, "ChatClient", ["chat"]),
    "replay": (replay, "find_log", ["replay"]),
    "ramps": (prepare, "run_show", ["ramps", "show", "x"]),
    "prepare": (launch, "check_build", ["prepare", "--out", "x"]),
    "eval": (evaluation, "load_results", ["eval", "report", "."]),
}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.EROFS, errno.EIO], ids=os.strerror)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_of_the_system_is_one_line(name, code, monkeypatch, capsys):
    def fail(*_):
        raise OSError(code, os.strerror(code), "/some/file")

    module, function, argv = COMMANDS[name]
    monkeypatch.setattr(module, function, fail)
    assert main(argv) == 2
    assert capsys.readouterr().err == f"apparate-llm: error: /some/file: {os.strerror(code)}\n"


def test_places_that_cannot_be_read_or_written_are_one_line(tiny_llama, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "results.json").write_text("{")
    for argv in (
        ["replay", "/nowhere/log"],
        ["replay", str(tmp_path)],
        ["replay", str(bad)],
        ["replay", "--json", "/proc/nowhere.json"],
        ["eval", "report", "/nowhere"],
        ["eval", "compare", "/nowhere", str(tmp_path)],
        ["eval", "report", str(tmp_path)],
        ["eval", "tpt", str(tiny_llama), "--out", "/proc/nowhere", "--systems", "vllm"],
        ["eval", "quick", "--prompts", str(bad)],
        ["ramps", "show", "/dev/null"],
        ["serve", "--tenants", str(bad)],
        ["serve", "--feedback-log", "/proc/nowhere/log"],
        ["serve", "/dev/null"],
        ["serve", "--port", "70000", str(tiny_llama), "--policy", "off"],
    ):
        assert main(argv) == 2, argv
        err = capsys.readouterr().err
        assert err.startswith("apparate-llm") and err.count("\n") == 1, err


def test_a_folder_with_weights_for_torch_only_is_one_line(tiny_llama, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for argv in (["serve", str(tmp_path)], ["eval", "quick", str(tmp_path)]):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert "no *.safetensors file" in err and "pytorch_model.bin" in err and err.count("\n") == 1


def test_a_reader_that_has_enough_is_no_error(monkeypatch, capfd):
    def fail():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(doctor, "examine", fail)
    assert main(["doctor"]) == 1
    assert capfd.readouterr().err == ""


def test_errors_of_vllms_settings_are_one_line(monkeypatch, capsys):
    from vllm.config.load import LoadConfig

    monkeypatch.setattr(doctor, "examine", lambda: LoadConfig(load_format=3))
    assert main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "valid string" in err


def test_help_names_what_a_long_command_costs(capsys):
    helps = {}
    for argv in (["prepare"], ["ramps", "evaluate"], ["ramps", "calibrate"], ["eval", "tpt"]):
        with pytest.raises(SystemExit):
            main([*argv, "--help"])
        helps[" ".join(argv)] = help_ = capsys.readouterr().out
        assert all(len(line) <= 120 for line in help_.splitlines())
    for flag in ("--time-budget", "--tokens", "--depths", "--ramp-vocab", "--prompts"):
        assert f"\n  {flag}  " in helps["prepare"].partition("what it costs")[2]
    assert "ten minutes" in " ".join(helps["eval tpt"].partition("what it costs")[2].split())
    assert "answers all prompts" in helps["ramps evaluate"] and "answers all prompts" in helps["ramps calibrate"]


def test_a_preparation_ends_with_the_command_that_serves_it():
    from apparate_llm.prepare.command import what_next

    assert what_next(None, Path("ramps"))[-1] == "next: apparate-llm serve --ramps ramps"
    last = what_next("/models/my model", Path("/tmp/my ramps"))[-1]
    assert last == "next: apparate-llm serve '/models/my model' --ramps '/tmp/my ramps'"
    args, rest = build_parser().parse_known_args(shlex.split(last)[2:])
    assert args.ramps == "/tmp/my ramps" and rest == ["/models/my model"]


def test_what_a_library_says_at_the_very_end_of_a_command_is_not_heard_and_a_full_disk_is(tmp_path):
    code = """
import os, sys
class Late:
    def __del__(self, write=os.write): write(2, b"nanobind: leaked 1 instances!")
sys.late = Late()
from apparate_llm.cli import main
sys.exit(main())
"""
    command = [sys.executable, "-c", code, "ramps", "show", str(SHIPPED)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Held-out acceptance rate" in done.stdout and done.stderr == ""
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr
