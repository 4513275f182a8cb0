"""Where a preparation keeps its rows: files that only grow, read through memory maps.

`index.json` says how much of each file counts. A kill or a full disk leaves bytes beyond that at worst; the next append
writes over them.
"""

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch

from apparate_llm.files import private_folder, private_opener, read_object, write_atomically
from apparate_llm.prepare.rows import Conversation, Rows, rows_of
from apparate_llm.renamed import ROW_COLUMNS

INDEX = "index.json"
COUNTS = ("rows", "conversations", "prompt_tokens", "answer_tokens")


class Text(NamedTuple):
    """What a finished conversation says."""

    prompt: list[int]
    answer: list[int]
    split: int
    kind: int


class Column(TypedDict):
    """What its file holds."""

    count: str  # which of COUNTS it is as long as
    dtype: str
    width: int  # of an element; 0: a single number


def _column(made: Mapping[str, Any]) -> Column:
    return {"count": made["count"], "dtype": made["dtype"], "width": int(made["width"])}


class RowStore:
    """One file per column of `folder`; every column is as long as one of COUNTS says. Raises ValueError where the
    index is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        private_folder(folder)
        self._maps: list[mmap.mmap] = []
        self.counts = dict.fromkeys(COUNTS, 0)
        self.columns: dict[str, Column] = {}  # by name
        self.facts: dict[str, int] = {}  # what the writer wants to find again
        self.ended: list[int] = []  # numbers of drafts that the last conversations came of
        if (path := folder / INDEX).is_file():
            self._take(path)

    def _take(self, path: Path) -> None:
        index = read_object(path)
        try:
            self.counts, self.facts = {name: int(index["counts"][name]) for name in COUNTS}, dict(index["facts"])
            self.ended = [int(number) for number in index.get("ended", ())]  # not in older ones
            self.columns = {ROW_COLUMNS.get(name, name): _column(made) for name, made in index["columns"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"damaged {path}: {type(error).__name__}: {error}") from None

    def append(self, conversations: list[Conversation], *, ended: Sequence[int] = (), **facts: int) -> None:
        """All of it counts at once, or nothing: OSError where there is no room."""
        self.facts |= facts
        self.ended = list(ended)
        if conversations:
            counts = dict(self.counts)
            for name, (count, tensor) in _columns_of(conversations, self.counts["conversations"]).items():
                self._write(name, count, tensor)
                counts[count] = self.counts[count] + len(tensor)
            self.counts = counts
        document = {"counts": self.counts, "columns": self.columns, "facts": self.facts, "ended": self.ended}
        write_atomically(self.folder / INDEX, json.dumps(document).encode(), private=True)

    def _write(self, name: str, count: str, tensor: torch.Tensor) -> None:
        """A column keeps the dtype that it was begun in, though another machine may serve the model in another one."""
        if (begun := self.columns.get(name)) is not None and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, begun["dtype"]))
        width = tensor.shape[1] if tensor.dim() > 1 else 0
        made: Column = {"count": count, "dtype": str(tensor.dtype).removeprefix("torch."), "width": width}
        assert self.columns.setdefault(name, made) == made, f"column {name} changed"
        data = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        path = self._path(name)
        with open(path, "r+b" if path.exists() else "x+b", opener=private_opener) as file:
            file.seek(self.counts[count] * (max(1, width) * tensor.element_size()))
            file.write(data.data)
            file.truncate()

    def _path(self, name: str) -> Path:
        """The column's file, which an older version may have begun by another name."""
        paths = [self.folder / old for old, new in ROW_COLUMNS.items() if new == name]
        return next((path for path in paths if path.is_file()), self.folder / name)

    def column(self, name: str, length: int) -> torch.Tensor:
        """The first `length` elements; they stay on disk until they are touched."""
        made = self.columns[name]
        dtype = getattr(torch, made["dtype"])
        shape = (length, made["width"]) if made["width"] else (length,)
        if not length:
            return torch.empty(shape, dtype=dtype)
        size = length * max(1, made["width"]) * dtype.itemsize
        with self._path(name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def rows(self, *, depths: tuple[int, ...], num_rows: int | None = None) -> Rows:
        """The first `num_rows` rows (all by default) with the states at `depths`."""
        length = self.counts["rows"] if num_rows is None else num_rows
        fields = {name: self.column(name, length) for name in Rows._fields if name != "states"}
        return Rows(**fields, states={depth: self.column(f"states.{depth}", length) for depth in depths})

    def kinds(self) -> torch.Tensor:
        """[conversations] int8."""
        return self.column("kinds", self.counts["conversations"])

    def splits(self) -> set[int]:
        """That have a conversation."""
        number = self.counts["conversations"]
        return set(self.column("splits", number).tolist()) if number else set()

    def texts(self) -> Iterator[Text]:
        number = self.counts["conversations"]
        if not number:
            return
        parts = [
            self.column(f"{part}_ids", self.counts[f"{part}_tokens"]).split(
                self.column(f"{part}_lengths", number).tolist()
            )
            for part in ("prompt", "answer")
        ]
        splits, kinds = self.column("splits", number).tolist(), self.kinds().tolist()
        for prompt, answer, split, kind in zip(*parts, splits, kinds, strict=True):
            yield Text(prompt.tolist(), answer.tolist(), split, kind)

    def release(self) -> None:
        """Give mapped memory back; what is touched again is read again."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())


def _columns_of(conversations: list[Conversation], first_number: int) -> dict[str, tuple[str, torch.Tensor]]:
    rows = rows_of(conversations, first_number=first_number)
    columns = {name: ("rows", value) for name, value in rows._asdict().items() if name != "states"}
    columns |= {f"states.{depth}": ("rows", value) for depth, value in rows.states.items()}
    for part in ("prompt", "answer"):
        ids = [getattr(conversation, part) for conversation in conversations]
        columns[f"{part}_ids"] = (f"{part}_tokens", _ints([token for one in ids for token in one]))
        columns[f"{part}_lengths"] = ("conversations", _ints([len(one) for one in ids]))
    columns["splits"] = ("conversations", torch.tensor([one.split for one in conversations], dtype=torch.int8))
    columns["kinds"] = ("conversations", torch.tensor([one.kind for one in conversations], dtype=torch.int8))
    return columns


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
