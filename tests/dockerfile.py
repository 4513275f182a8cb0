"""The Dockerfile, read as far as tests ask."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, the rest) of each, lines that go on joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines.splitlines() if line.strip()]


def last_stage() -> dict[str, str]:
    """What the image is started with, by instruction."""
    every = instructions(DOCKERFILE)
    start = max(number for number, (name, _) in enumerate(every) if name == "FROM")
    return {name: rest for name, rest in every[start:] if name not in ("RUN", "COPY")}


def command_of(instruction: str) -> list[str]:
    """Of an instruction in the form that starts no shell; raises ValueError for another one."""
    words: list[str] = json.loads(instruction[instruction.index("[") :])
    return words


def sent_to_docker() -> set[str]:
    """Names at the top that .dockerignore lets through."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*", lines[0]
    return {line[1:] for line in lines if line.startswith("!")}
