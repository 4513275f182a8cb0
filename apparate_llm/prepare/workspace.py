"""The folder a preparation works in: every stage leaves its result there, so that a killed run goes on."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from apparate_llm.files import PART, private_folder, read_object, replacing, write_atomically
from apparate_llm.renamed import of_any_preparation

Result = TypeVar("Result", bound=Mapping[str, object])


def save_state(state: Any, path: Path, *, private: bool = False) -> None:
    """By `torch.save`, atomically; raises OSError where there is no room, as torch itself does not."""
    import torch

    with replacing(path, private=private) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


class Workspace:
    """`out/work`. A stage's result is one JSON file that also says what it was made from (`inputs`): it is used again
    only where those are the same. Prompts and answers are in it, so only its owner can read it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / "work"
        private_folder(self.folder)

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, stage: str, inputs: Mapping[str, object]) -> Any:
        """The stage's result, as `write` was given it; None if it is still to be made (again)."""
        record = self._record(stage)
        return record["result"] if record is not None and self.made_from(stage, inputs) else None

    def made_from(self, stage: str, inputs: Mapping[str, object]) -> bool:
        """Whether the result on disk was made from just these."""
        return bool(self.inputs(stage) == json.loads(json.dumps(inputs)))

    def inputs(self, stage: str) -> dict[str, object] | None:
        """What the result on disk was made from."""
        record = self._record(stage)
        return None if record is None else record["inputs"]

    def write(self, stage: str, inputs: Mapping[str, object], result: Result) -> Result:
        write_atomically(
            self.path(f"{stage}.json"), json.dumps({"inputs": inputs, "result": result}).encode(), private=True
        )
        return result

    def _record(self, stage: str) -> dict[str, Any] | None:
        """Raises ValueError for a damaged one."""
        path = self.path(f"{stage}.json")
        if not path.is_file():
            return None
        record: dict[str, Any] = of_any_preparation(read_object(path))
        if not isinstance(record.get("inputs"), dict) or not isinstance(record.get("result"), dict):
            raise ValueError(f"damaged {path}: no inputs and result; delete it, and what it is of is made again")
        return record

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Raises RuntimeError if another preparation works here."""
        with self.path("lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"another preparation is at work in {self.out}") from None
            for pattern in (f".*{PART}", ".tmp*"):  # of a run that was killed while it wrote; the latter safetensors'
                for leftover in self.folder.rglob(pattern):
                    leftover.unlink(missing_ok=True)
            try:
                yield
            finally:
                private_folder(self.folder)  # files that stages made in ways of their own
