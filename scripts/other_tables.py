"""Tables whose rows are not one system's under several loads: texts, targets, shares of the gain, passes, int8."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from apparate_llm.eval.compare import load_results
from apparate_llm.eval.tables import at_worst_frac, number, percent, share_rows
from scripts.kept import QWEN, RESULTS, SMOLLM, is_kept, link, read, table_of

BOTH = (QWEN, SMOLLM)
PASS_LINES = ("worker: blocks", "worker: lm_head")  # of scripts.profile_step


class Other(NamedTuple):
    files: dict[str, str]  # by model
    head: tuple[str, ...]  # behind the model
    rows: Callable[[str], list[list[str]]]  # of a file, without the model

    def made(self, folder: Path) -> str:
        rows = [
            [link(name, file, folder), *row]
            for name, file in self.files.items()
            if is_kept(file)
            for row in self.rows(file)
        ]
        return table_of(("model", *self.head), rows)


def texts(file: str) -> list[list[str]]:
    """Of each system: answers with the text of `off` under the same load, and with its own under the first one."""
    results = load_results(RESULTS / file)
    rows = []
    for system in results.systems:
        runs = [run for run in results.runs if run.system == system]
        shares = [run.same_as_off_frac for run in runs] + [run.same_as_first_load_frac for run in runs[1:]]
        rows.append([system, *map(percent, shares)])
    return rows


def targets(file: str) -> list[list[str]]:
    """Of each system with exits."""
    return [
        [
            run.system,
            number(run.tpt_ms.mean, 1),
            percent(run.within_target_frac),
            percent(at_worst_frac(run)),
        ]
        for run in load_results(RESULTS / file).runs
        if run.exits
    ]


def shares(file: str) -> list[list[str]]:
    """Each part over those before it."""
    return [[load, system, ratio, share] for load, system, _, ratio, share in share_rows(load_results(RESULTS / file))]


def passes(file: str) -> list[list[str]]:
    """Of our server without exits: a pass of so many rows, over the time its weights take to be read."""
    cells = {}
    for found in read(file)["results"]:
        lines = [(found["lines"][line], found["bytes_per_call"][line]) for line in PASS_LINES]
        took_ms = sum(line["ms"] for line, _ in lines)
        floor_ms = sum(line["calls"] * read for line, read in lines) / found["bytes_per_ms"]
        cells[found["batch"]] = f"{number(took_ms, 1)} ({number(took_ms / floor_ms)})"
    return [[cells[rows] for rows in (1, 2, 4, 8)]]


OTHERS: dict[str, Other] = {
    "texts": Other(
        {QWEN: "texts-qwen.json", SMOLLM: "texts-smollm2.json"},
        ("system", "as off, 1 client", "4", "16", "as its own with 1, 4 clients", "16"),
        texts,
    ),
    "targets": Other(
        {SMOLLM: "targets-smollm2.json"}, ("system", "TPT, ms", "within the target", "divergences at worst"), targets
    ),
    "shares": Other(
        {QWEN: "shares-qwen.json", SMOLLM: "shares-smollm2.json"},
        ("load", "part", "TPT over those before", "share of the gain"),
        shares,
    ),
    "passes": Other(
        {QWEN: "passes-qwen.json", SMOLLM: "passes-smollm2.json"}, tuple(f"{n}, ms" for n in (1, 2, 4, 8)), passes
    ),
}
