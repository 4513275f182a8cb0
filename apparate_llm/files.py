"""Files that are either complete or not there, and those that are nobody else's business."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PART = ".part"  # suffix of a file that is being written; one that is left over belongs to a process that was killed
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary file to write; it takes `path`'s place at the end, or vanishes if the block fails.

    Who may read it is up to the umask, or nobody but its owner if it is private.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    open(temporary, "xb", opener=private_opener if private else None).close()
    mode = temporary.stat().st_mode & 0o777
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own in its place, for its owner only
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    with replacing(path, private=private) as temporary:
        temporary.write_bytes(data)


def read_object(path: Path) -> dict[str, Any]:
    """Of a JSON file; raises ValueError that names it for what is none, OSError where it cannot be read."""
    data = path.read_bytes()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged {path}: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"damaged {path}: an object is expected, got {type(document).__name__}")
    return document


def private_opener(path: str, flags: int) -> int:
    """For `open`: a new file that only its owner can read."""
    return os.open(path, flags, PRIVATE_FILE)


def private_folder(folder: Path) -> None:
    """Makes the folder, or takes it and all that is in it from others. It holds prompts, answers or keys."""
    folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    _restrict(folder.resolve(), PRIVATE_FOLDER)
    for path in folder.rglob("*"):
        _restrict(path, PRIVATE_FOLDER if path.is_dir() else PRIVATE_FILE)


def _restrict(path: Path, mode: int) -> None:
    with suppress(OSError):  # another's, on a file system that has no modes, or gone
        if not path.is_symlink() and path.stat().st_mode & 0o777 & ~mode:
            path.chmod(mode)
