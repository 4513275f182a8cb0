#!/usr/bin/env python3
"""The tables of README.md and docs/benchmarks.md, out of the results in docs/results:

python -m scripts.results_table                               # writes all of them anew
python -m scripts.results_table --texts RESULTS.json NAME     # the rows of docs/serving.md: whose text an answer has

A table stands in its page behind `<!-- table: NAME -->`; TABLES says what each is made of. `python -m scripts.draw`
makes the pictures of the same results.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from apparate_llm.eval.compare import load_results
from apparate_llm.eval.schema import Ratio, Run, SteadyLevel, SteadyRatio
from apparate_llm.eval.tables import at_worst_frac, number, percent, with_interval
from apparate_llm.renamed import depth_of_any_evaluation, system_of_old

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MARK = re.compile(r"^<!-- table: ([\w-]+) -->\n(?:\|.*\n)*", re.M)
BOUND = "early-exit-0.05"
TEXTS_OF = ("vllm", "off", "lossless", "ngram")  # rows of the table of texts
QWEN, SMOLLM = "Qwen2.5-Coder-0.5B", "SmolLM2-135M"


class Measured(NamedTuple):
    """One system under one load; None where it was not measured."""

    ratio: Ratio | SteadyRatio | None
    run: Run | None


NOTHING = Measured(None, None)


class Rows(NamedTuple):
    """What a result file gives to a table."""

    name: str  # model and prompts
    file: str
    loads: tuple[str, ...]


Column = tuple[str, str, Callable[[Measured], str]]  # heading, system, cell


class Table(NamedTuple):
    rows: tuple[Rows, ...]
    columns: tuple[Column, ...]


def tpt(item: Measured) -> str:
    ratio = item.ratio
    return number(None) if ratio is None else with_interval(ratio.tpt_mean, ratio.tpt_mean_ci95)


def ratio_of(measure: str) -> Callable[[Measured], str]:
    return lambda item: number(getattr(item.ratio, measure, None))


def mean_ms(item: Measured) -> str:
    return number(item.run.tpt_ms.mean if item.run else None, 1)


def exits_share(item: Measured) -> str:
    run = item.run
    if run is None or run.exits is None:
        return number(None)
    return percent((run.exits.accepted + run.exits.released) / run.tokens_at_server)


def at_worst(item: Measured) -> str:
    return percent(at_worst_frac(item.run) if item.run else None)


TPT_COLUMNS: tuple[Column, ...] = (
    ("lossless", "lossless", tpt),
    ("bound 0.05", BOUND, tpt),
    ("vLLM n-gram", "ngram", tpt),
)
FEW = (
    Rows(f"{QWEN}, code", "tpt-qwen-code-zen5-7.json", ("1 client", "4 clients")),
    Rows(f"{QWEN}, Spec-Bench", "tpt-qwen-spec120-zen5-2.json", ("1 client",)),
    Rows(f"{SMOLLM}, Spec-Bench", "tpt-smollm2-zen5-18.json", ("1 client",)),
    Rows(f"{SMOLLM}, Spec-Bench", "tpt-smollm2-zen5-17.json", ("4 clients",)),
    Rows(f"{SMOLLM}, Spec-Bench", "tpt-smollm2-zen5-varied-3.json", ("4 clients, varied lengths",)),
    Rows(f"{SMOLLM}, Spec-Bench", "open-smollm2-zen5-3.json", ("2 requests/s, varied lengths",)),
)
MANY = (
    Rows(f"{QWEN}, Spec-Bench", "steady16-qwen-zen5-3.json", ("16 clients",)),
    Rows(f"{QWEN}, Spec-Bench", "steady-qwen-zen5-6.json", ("32 clients",)),
    Rows(f"{SMOLLM}, Spec-Bench", "steady16-smollm2-zen5.json", ("16 clients",)),
    Rows(f"{SMOLLM}, Spec-Bench", "steady-smollm2-zen5-6.json", ("32 clients",)),
)
TABLES: dict[str, Table] = {
    "readme": Table(
        (FEW[0], MANY[0], *FEW[2:4], MANY[2]),
        TPT_COLUMNS,
    ),
    "tpt": Table(
        FEW,
        (("plain, ms", "vllm", mean_ms), *TPT_COLUMNS, ("HF `assistant_early_exit`", "hf-early-exit", tpt)),
    ),
    "beside": Table(
        FEW,
        (
            ("TTFT, lossless", "lossless", ratio_of("ttft_mean")),
            ("TTFT, 0.05", BOUND, ratio_of("ttft_mean")),
            ("throughput, lossless", "lossless", ratio_of("throughput")),
            ("throughput, 0.05", BOUND, ratio_of("throughput")),
            ("exits, lossless", "lossless", exits_share),
            ("divergences at worst, 0.05", BOUND, at_worst),
        ),
    ),
    "many-clients": Table(
        MANY,
        (
            ("TPT, lossless", "lossless", tpt),
            ("n-gram", "ngram", tpt),
            ("TTFT, lossless", "lossless", ratio_of("ttft_mean")),
            ("n-gram", "ngram", ratio_of("ttft_mean")),
            ("throughput, lossless", "lossless", ratio_of("throughput")),
            ("n-gram", "ngram", ratio_of("throughput")),
        ),
    ),
}
RAMPS = (
    (f"{QWEN}, code", "ramps-qwen-code.json"),
    (f"{QWEN}, Spec-Bench", "ramps-qwen-spec-bench.json"),
    (f"{SMOLLM}, Spec-Bench", "ramps-smollm2-spec-bench.json"),
)


@cache
def measured(file: str) -> dict[tuple[str, str], Measured]:
    """By load and system, of `eval tpt` or `eval steady`."""
    data = json.loads((RESULTS / file).read_text())
    if "levels" in data:
        levels = data["levels"]
        return {
            (f"{level['clients']} clients", ratio.system): Measured(ratio, None)
            for level in levels
            for ratio in steady_ratios(level)
        }
    results = load_results(RESULTS / file)
    ratios = {(item.load, item.system): item for item in results.ratios}
    return {(run.load, run.system): Measured(ratios.get((run.load, run.system)), run) for run in results.runs}


def steady_ratios(level: dict[str, Any]) -> list[SteadyRatio]:
    """Also of a level that was written before these results had a schema."""
    if "ratios" in level:
        return SteadyLevel.model_validate(level).ratios
    keys = {
        name: name.removesuffix("_ci95") + "_ratio" + "_ci95" * name.endswith("_ci95")
        for name in SteadyRatio.model_fields
    }
    keys |= {"tpt": "ratio", "tpt_ci95": "ci95"}
    ratios = []
    for run in level["systems"]:
        if values := {name: run[key] for name, key in keys.items() if key in run}:
            ratios.append(SteadyRatio(system=system_of_old(run["system"]), baseline="vllm", **values))
    return ratios


def made(name: str, folder: Path) -> str:
    """A table by its name. folder: the results, as seen from the page."""
    if name == "ramps":
        return ramps_table(folder)
    table = TABLES[name]
    rows = []
    for one in table.rows:
        by_cell = measured(one.file)
        loads = {load for load, _ in by_cell}
        for load in one.loads:
            assert load in loads, f"{one.file}: no load {load!r} among {sorted(loads)}"
            cells = [cell(by_cell.get((load, system), NOTHING)) for _, system, cell in table.columns]
            rows.append([f"[{one.name}]({folder / one.file})", load, *cells])
    return as_table(["model, prompts", "load", *(title for title, _, _ in table.columns)], rows)


def ramps_table(folder: Path) -> str:
    """Acceptance rates of the ramps that ship."""
    head = ["model, prompts", "depth", *(f"position {k}" for k in range(4)), "accepted tokens per step"]
    rows = []
    for name, file in RAMPS:
        for item in map(depth_of_any_evaluation, json.loads((RESULTS / file).read_text())["depths"]):
            rates = [number(part["acceptance_rate"], 3) for part in item["positions"]]
            rows.append([f"[{name}]({folder / file})", str(item["depth"]), *rates, number(item["accepted_per_step"])])
    return as_table(head, rows)


def as_table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, *rows]).replace("\n", f"\n{'|---' * len(head)}|\n", 1)


def freshened(page: Path) -> str:
    """The text of a page with all of its tables made anew."""
    return with_tables(page.read_text(), RESULTS.relative_to(page.parent))


def with_tables(text: str, folder: Path) -> str:
    return MARK.sub(lambda mark: f"<!-- table: {mark[1]} -->\n{made(mark[1], folder)}", text)


def texts(path: Path, name: str) -> str:
    """A row for each system: of its answers, in percent, those with the text of `off` under the same load, for each
    load; and those with its own text under the first load, for each later one."""
    results = load_results(path)
    lines = []
    for system in TEXTS_OF:
        runs = [run for run in results.runs if run.system == system]
        shares = [run.same_as_off_frac for run in runs] + [run.same_as_first_load_frac for run in runs[1:]]
        cells = [f"[{name}](results/{path.name})", system, *(percent(share).removesuffix(" %") for share in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--texts"]:
        print(texts(Path(sys.argv[2]), sys.argv[3]))
    else:
        for page in PAGES:
            page.write_text(freshened(page))
