"""Who reads what where engines in this process log into a file. Streams go for good, so each test is a process."""

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

BEGIN = """
import logging, os, subprocess, sys, signal, time
from pathlib import Path
from apparate_llm.quiet_log import log_of_engines
path = Path(sys.argv[1])
"""
NOISE = """
logging.basicConfig(stream=sys.stdout)
logging.warning("logged by python")
os.write(1, b"written by a library to stdout\\n")
os.write(2, b"written by a library to stderr\\n")
subprocess.run([sys.executable, "-c", "print('printed by a child')"])
"""


def start(code: str, log: Path | str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(code), str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(code: str, log: Path) -> tuple[int, str, str]:
    process = start(code, log)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_the_user_reads_what_we_say_and_the_log_has_all_else(tmp_path):
    log = tmp_path / "vllm.log"
    log.write_text("of an earlier run\n")
    log.chmod(0o644)
    code, out, err = run(
        f"""
        with log_of_engines(path) as console:
            console.print("said")
            {textwrap.indent(NOISE, " " * 12).strip()}
        print("a result")
        print("a note", file=sys.stderr)
        """,
        log,
    )
    assert (code, out) == (0, "a result\n")
    assert err.splitlines() == [f"vLLM's log: {log}", "said", "a note"]
    text = log.read_text()
    assert text.startswith("of an earlier run\n") and "said" not in text and "a result" not in text
    for noise in ("logged by python", "library to stdout", "library to stderr", "printed by a child"):
        assert text.count(noise) == 1
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_what_a_library_writes_at_the_very_end_of_the_interpreter_is_kept_from_the_user(tmp_path):
    log = tmp_path / "vllm.log"
    code, out, err = run(
        """
        import atexit, ctypes
        atexit.register(os.write, 2, b"nanobind: leaked 1 instances!\\n")
        with log_of_engines(path):
            pass
        """,
        log,
    )
    assert (code, out, err.count("nanobind")) == (0, "", 0)
    assert "nanobind: leaked" in log.read_text()


def test_a_failure_shows_the_end_of_this_runs_log_and_its_traceback(tmp_path):
    log = tmp_path / "vllm.log"
    log.write_text("of an earlier run\n")
    code, out, err = run(
        """
        with log_of_engines(path):
            for number in range(30):
                print("line", number)
            raise LookupError("something broke")
        """,
        log,
    )
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[1:3] == [f"the last lines of {log}:", "  line 15"] and lines[16] == "  line 29"
    assert lines[-1] == "LookupError: something broke" and "earlier" not in err


def test_a_temporary_log_stays_only_where_something_failed(tmp_path):
    for failure, stays in (("pass", False), ("raise ValueError", False), ("raise LookupError", True)):
        folder = tmp_path / failure
        folder.mkdir()
        _, _, err = run(
            f"""
            import tempfile
            tempfile.tempdir = str(path)
            with log_of_engines():
                print("noise", flush=True)
                {failure}
            """,
            folder,
        )
        assert err.startswith(f"vLLM's log: {folder}/apparate-llm-")
        assert bool(list(folder.iterdir())) == stays, failure


def test_bad_input_is_told_without_the_log(tmp_path):
    _, _, err = run(
        """
        with log_of_engines(path):
            print("noise", flush=True)
            raise ValueError("wrong")
        """,
        tmp_path / "vllm.log",
    )
    assert "noise" not in err.replace('print("noise', "") and err.splitlines()[-1] == "ValueError: wrong"


def test_without_a_stdout_it_works_as_well(tmp_path):
    code = BEGIN + "with log_of_engines(path) as console:\n    print('noise', flush=True)\nprint('gone')"
    command = f'exec "{sys.executable}" -c "$0" "$1" >&-'
    done = subprocess.run(["sh", "-c", command, code, str(tmp_path / "log")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text() == "noise\n"


def test_a_terminal_keeps_its_bars(tmp_path):
    """The console for the user asks its own stream whether it is a terminal."""
    main, other = os.openpty()
    code = BEGIN + "with log_of_engines(path) as console:\n    console.print(console.is_terminal, os.isatty(2))"
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=other, env=environment | {"TERM": "xterm"})
    os.close(other)
    shown = os.read(main, 4096).decode()
    os.close(main)
    assert done.returncode == 0 and "True" in shown and "False" in shown


def stopped_by(number: int, tmp_path: Path) -> tuple[int, str]:
    """A command under way in the CLI, ended by a signal."""
    process = start(
        """
        from apparate_llm import cli
        from apparate_llm.lifeline import exit_on_sigterm

        def command(args):
            exit_on_sigterm()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            with log_of_engines(path):
                (path.parent / "ready").touch()
                time.sleep(60)

        class Parser:
            def parse_known_args(self, argv):
                import argparse
                return argparse.Namespace(command="prepare", run=command, goes_on=True), []

        cli.build_parser = Parser
        sys.exit(cli.main(["prepare"]))
        """,
        tmp_path / "log",
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    return process.returncode, err.splitlines()[-1]


def test_a_signal_ends_it_with_one_line_and_its_exit_code(tmp_path):
    again = "the same command goes on where it stopped"
    assert stopped_by(signal.SIGTERM, tmp_path) == (143, f"apparate-llm: stopped by SIGTERM; {again}")
    (tmp_path / "ready").unlink()
    assert stopped_by(signal.SIGINT, tmp_path) == (130, f"apparate-llm: stopped by SIGINT; {again}")


def test_a_preparation_keeps_its_log_beside_its_work_and_ends_with_what_to_do_next(tiny_llama, tmp_path):
    code = """
        from apparate_llm import cli
        from apparate_llm.prepare import pipeline

        def prepare(plan, console):
            os.write(2, b"of vLLM's\\n")
            console.print("said")

        pipeline.prepare = prepare
        model, out = sys.argv[1].split(":")
        sys.exit(cli.main(["prepare", model, "--out", out]))
        """
    out = tmp_path / "my ramps"
    process = start(code, f"{tiny_llama}:{out}")
    stdout, err = process.communicate(timeout=120)
    assert process.returncode == 0 and stdout == ""
    lines = err.splitlines()
    assert lines[:2] == [f"vLLM's log: {out}/work/vllm.log", "said"]
    assert lines[-1] == f"next: apparate-llm serve {tiny_llama} --ramps '{out}'"
    assert (out / "work" / "vllm.log").read_text() == "of vLLM's\n"
