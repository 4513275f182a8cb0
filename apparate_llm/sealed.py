"""Model folders that are made once and kept: complete, with a sum of every file, or not there."""

import glob
import json
import math
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from apparate_llm.files import read_object
from apparate_llm.lifeline import undone_by_sigterm
from apparate_llm.progress import Progress, Stage
from apparate_llm.ramps.checkpoint import sha256_of

COMPLETE = "apparate-complete.json"  # written last: name -> sha256 of every file


def is_complete(folder: Path) -> bool:
    """Whether every file of the folder is there with the content it was written with."""
    try:
        sums = read_object(folder / COMPLETE)
        return bool(sums) and all(sha256_of(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


@contextmanager
def becoming(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; it becomes `folder` at the end, which must not be there then, or vanishes if the
    block fails. Who may read its files is up to the umask."""
    work = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    work.mkdir()
    try:
        yield work
        for path in work.iterdir():  # safetensors writes files for their owner only
            path.chmod(work.stat().st_mode & 0o666)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def made_once(folder: Path, make: Callable[[Path, Stage], None], *, name: str, facts: str) -> Path:
    """The folder; where it is not complete, whatever there is of it makes room for what `make` writes into an empty
    folder. Several processes may ask for it. name, facts: of the work, as it is told of meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(file=sys.stderr)  # as it is now: `make` may redirect it
    lock = FileLock(str(folder.with_name(f".{folder.name}.lock")))
    with (
        undone_by_sigterm(),
        Progress(console) as progress,
        progress.stage(name, total=math.inf, facts=facts) as stage,
        lock,
    ):
        if is_complete(folder):
            return folder
        for left_over in folder.parent.glob(glob.escape(f".{folder.name}.") + "*/"):  # by a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        with becoming(folder) as work:
            make(work, stage)
            sums = {path.name: sha256_of(path) for path in sorted(work.iterdir())}
            (work / COMPLETE).write_text(json.dumps(sums, indent=1))
            if folder.exists():
                shutil.rmtree(folder)
    return folder
