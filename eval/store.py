"""What an evaluation has measured so far, block by block on disk: an interrupted one goes on from there."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from apparate_llm.eval.client import Completion
from apparate_llm.eval.statistics import output_tokens
from apparate_llm.files import private_folder, read_object, write_atomically
from apparate_llm.renamed import counts_of_any_version


class BlockKey(NamedTuple):
    load: int  # number of the load
    repeat: int
    block: int
    system: str


@dataclass(slots=True)
class Block:
    """One system's answers to one block of requests."""

    key: BlockKey
    completions: list[Completion]
    wall_s: float  # from the first of them to the end of the last
    counts: dict[str, Any] | None  # exits during the block, None for a system without; of all requests, as the next two
    cpu_s: float | None
    energy_j: float | None  # of the whole machine
    peak_memory_gib: float | None  # since the server's start
    probe_ms: float  # a fixed piece of work just before the block: how fast the machine was
    stolen_frac: float  # of processor time, taken by other machines on the same host
    began_s: float | None = None  # since 1970, to find it in what a monitor recorded
    uncounted: list[Completion] = field(default_factory=list)  # others meanwhile, as far as they came

    @property
    def tokens_in_time(self) -> int:
        """Output tokens of all requests that came in `wall_s`."""
        began_s = min((done.started_s for done in self.completions), default=0.0)
        others = (done.tokens_until(began_s + self.wall_s) - done.tokens_until(began_s) for done in self.uncounted)
        return output_tokens(self.completions) + sum(others)

    @property
    def served_tokens(self) -> int:
        """Output tokens of all requests; where others were cut off and the server counts, as it does."""
        if self.uncounted and self.counts is not None:
            return int(self.counts["emitted"])
        return output_tokens(self.completions) + sum(done.tokens_until(math.inf) for done in self.uncounted)


def file_name(system: str) -> str:
    """What stands for a system's name in those of its files."""
    return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in system)


class Store:
    """`plan.json`: the settings that all blocks share; `blocks/`: one file each; `logs/`: the servers' own. Answers are
    in these two, and maybe prompts, so only their owner can read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"

    def open(self, plan: Mapping[str, object], *, fresh: bool) -> int:
        """Returns how many blocks are there already; raises ValueError if they were measured with other settings."""
        path = self.folder / "plan.json"
        ours = path.exists()
        if fresh and ours:
            shutil.rmtree(self.folder / "blocks", ignore_errors=True)
        elif ours:
            kept = read_object(path)
            plan = json.loads(json.dumps(plan))
            different = sorted(name for name in plan.keys() | kept.keys() if plan.get(name) != kept.get(name))
            if different:
                raise ValueError(
                    f"{self.folder} holds an evaluation with other settings ({', '.join(different)}): "
                    "go on with the same ones, or choose another --out, or give --fresh to throw it away"
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no evaluation: choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        private_folder(self.folder / "blocks")
        private_folder(self.logs)
        write_atomically(path, (json.dumps(plan, indent=1) + "\n").encode())
        return sum(1 for _ in self.blocks())

    def plan(self) -> dict[str, Any]:
        """Raises ValueError where there is no evaluation."""
        path = self.folder / "plan.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no evaluation (no plan.json)")
        plan = read_object(path)
        loads = plan.get("loads")
        if not isinstance(loads, list) or not all(isinstance(load, list) and len(load) == 2 for load in loads):
            raise ValueError(f"damaged {path}: `loads` must be a list of pairs")
        return plan

    def has(self, key: BlockKey) -> bool:
        return self._path(key).exists()

    def add(self, block: Block) -> None:
        record = {name: getattr(block, name) for name in Block.__slots__}
        record["key"] = block.key._asdict()
        for name in ("completions", "uncounted"):
            record[name] = [done.as_record() for done in record[name]]
        write_atomically(self._path(block.key), json.dumps(record).encode(), private=True)

    def blocks(self) -> Iterator[Block]:
        """In the order of their keys; raises ValueError for a damaged one."""
        blocks = map(_read, (self.folder / "blocks").glob("*.json"))
        return iter(sorted(blocks, key=lambda block: block.key))

    @property
    def measured_s(self) -> float:
        """How long its blocks took."""
        return sum(block.wall_s for block in self.blocks())

    def _path(self, key: BlockKey) -> Path:
        system = file_name(key.system)
        return self.folder / "blocks" / f"{key.load:02}-{key.repeat:02}-{key.block:04}-{system}.json"


def _read(path: Path) -> Block:
    record = read_object(path)
    try:
        key = BlockKey(**record.pop("key"))
        if [type(part) for part in key] != [int, int, int, str]:
            raise TypeError(f"a key of {key}")
        for name in ("completions", "uncounted"):  # the latter not in old blocks
            record[name] = [Completion.of_record(done) for done in record.get(name, [])]
        if record["counts"] is not None:
            record["counts"] = counts_of_any_version(record["counts"])
        return Block(key=key, **record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged {path}: {type(error).__name__}: {error}") from None
