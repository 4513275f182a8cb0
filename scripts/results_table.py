#!/usr/bin/env python3
"""The tables of README.md, docs/benchmarks.md, controller.md and prepare.md, out of the results in docs/results:

python -m scripts.results_table        # writes all of them anew

A table stands in its page behind `<!-- table: NAME -->`; TABLES says what each is made of. A row is left out while its
result is not kept. `python -m scripts.draw` makes the pictures of the same results.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from apparate_llm.eval.prompt_lengths import length_of
from apparate_llm.eval.schema import Ratio, SteadyRatio
from apparate_llm.eval.tables import number, with_interval
from scripts.kept import QWEN, RESULTS, ROOT, SMOLLM, Measured, is_kept, link, measured, table_of
from scripts.other_tables import OTHERS

PAGES = (ROOT / "README.md", *(ROOT / "docs" / page for page in ("benchmarks.md", "controller.md", "prepare.md")))
MARK = re.compile(r"^<!-- table: ([\w-]+) -->\n(?:\|.*\n)*", re.M)
PLAIN = ("vllm-tuned",)  # plain vLLM with this machine used as ours use it
LLAMA = ("llama.cpp bf16", "llama.cpp Q8_0")  # in the precision of ours
SMALLEST = ("llama.cpp Q4_0 n-gram",)
LOSSLESS, BOUND = "lossless", "early-exit-0.05"

AnyRatio = Ratio | SteadyRatio | None


class Rows(NamedTuple):
    """What a result file gives to a table."""

    name: str  # model and prompts
    file: str
    loads: tuple[str, ...]


class Column(NamedTuple):
    title: str
    system: str
    cell: Callable[[Measured, AnyRatio], str]
    over: tuple[str, ...] = PLAIN


class Table(NamedTuple):
    rows: tuple[Rows, ...]
    columns: tuple[Column, ...]


def ratio_of(measure: str) -> Callable[[Measured, AnyRatio], str]:
    """With its interval."""

    def cell(_: Measured, ratio: AnyRatio) -> str:
        return with_interval(getattr(ratio, measure, None), getattr(ratio, f"{measure}_ci95", None))

    return cell


def mean_of(measure: str) -> Callable[[Measured, AnyRatio], str]:
    def cell(one: Measured, _: AnyRatio) -> str:
        return number(getattr(getattr(one.run, measure), "mean", None), 1)

    return cell


TPT, TTFT = ratio_of("tpt_mean"), ratio_of("ttft_mean")
QWEN_BF16 = Rows(f"{QWEN}, code", "tpt-qwen-code.json", ("1 client", "4 clients"))
QWEN_INT8 = Rows(f"{QWEN} in int8, code", "tpt-qwen-int8-code.json", ("1 client", "4 clients"))
QWEN_DRAWN = Rows(f"{QWEN}, code, temperature 0.7", "tpt-qwen-code-drawn.json", ("1 client", "4 clients"))
SMOLLM_BF16 = Rows(f"{SMOLLM}, Spec-Bench", "tpt-smollm2-spec-bench.json", ("1 client", "4 clients"))
MANY = (
    Rows(f"{QWEN}, code", "steady-qwen-code.json", ("16 clients",)),
    Rows(f"{SMOLLM}, Spec-Bench", "steady-smollm2-spec-bench.json", ("16 clients",)),
)
FIRST_TOKENS = Rows(QWEN, "ttft-qwen.json", tuple(f"1 client, {n}-token prompts" for n in (100, 600, 2100)))
TABLES: dict[str, Table] = {
    "readme": Table(
        (QWEN_BF16, MANY[0], SMOLLM_BF16, MANY[1]),
        (
            Column("lossless", LOSSLESS, TPT),
            Column("bound 0.05", BOUND, TPT),
            Column("vLLM n-gram", "ngram-tuned", TPT),
            Column("llama.cpp bf16", "llama.cpp bf16", TPT),
        ),
    ),
    "tpt": Table(
        (QWEN_BF16, QWEN_INT8, QWEN_DRAWN, SMOLLM_BF16),
        (
            Column("lossless, ms", LOSSLESS, mean_of("tpt_ms")),
            Column("/ plain vLLM", LOSSLESS, TPT),
            Column("/ llama.cpp, same precision", LOSSLESS, TPT, LLAMA),
            Column("/ llama.cpp Q4_0, n-gram", LOSSLESS, TPT, SMALLEST),
            Column("bound 0.05 / lossless", BOUND, TPT, (LOSSLESS,)),
        ),
    ),
    "many-clients": Table(
        MANY,
        tuple(
            Column(f"{title} / {name}", LOSSLESS, ratio_of(measure), over)
            for name, over in (("plain vLLM", PLAIN), ("llama.cpp bf16", LLAMA))
            for title, measure in (("throughput", "throughput"), ("TPT mean", "tpt_mean"), ("p99", "tpt_p99"))
        ),
    ),
    "first-tokens": Table(
        (FIRST_TOKENS,),
        (
            Column("lossless, ms", LOSSLESS, mean_of("ttft_ms")),
            Column("/ plain vLLM", LOSSLESS, TTFT),
            Column("/ llama.cpp bf16", LOSSLESS, TTFT, LLAMA),
        ),
    ),
}


def made(name: str, folder: Path) -> str:
    """A table by its name. folder: the results, as seen from the page."""
    if name in OTHERS:
        return OTHERS[name].made(folder)
    table = TABLES[name]
    rows = []
    for one in table.rows:
        if not is_kept(one.file):
            continue
        by_load = measured(RESULTS / one.file)
        loads = {load for load, _ in by_load}
        for load in one.loads:
            assert load in loads, f"{one.file}: no load {load!r} among {sorted(loads)}"
            cells = [_cell(column, by_load.get((load, column.system))) for column in table.columns]
            rows.append([link(one.name, one.file, folder), length_of(load) or load, *cells])
    return table_of(["model, prompts", "load", *(column.title for column in table.columns)], rows)


def _cell(column: Column, one: Measured | None) -> str:
    return number(None) if one is None else column.cell(one, one.over(column.over))


def files_of(name: str) -> list[str]:
    """Results that a table is made of."""
    return [*OTHERS[name].files.values()] if name in OTHERS else [rows.file for rows in TABLES[name].rows]


def freshened(page: Path) -> str:
    """The text of a page with all of its tables made anew."""
    return with_tables(page.read_text(), RESULTS.relative_to(page.parent))


def with_tables(text: str, folder: Path) -> str:
    return MARK.sub(lambda mark: f"<!-- table: {mark[1]} -->\n{made(mark[1], folder)}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(freshened(page))
        missing = [file for name in MARK.findall(page.read_text()) for file in files_of(name) if not is_kept(file)]
        if missing:
            print(f"{page.name}: without {', '.join(missing)}, which docs/results does not hold", file=sys.stderr)
