#!/usr/bin/env python3
"""Prints the results of an evaluation as a table of docs/tables.md, or as rows of the README's:

python -m scripts.results_table RESULTS.json [NAME OF THE ROWS]
python -m scripts.results_table --texts RESULTS.json NAME      # the rows of docs/serving.md: whose text an answer has
"""

import sys
from pathlib import Path

from apparate_llm.eval.compare import load_results
from apparate_llm.eval.tables import (
    at_worst_frac,
    divergence_frac,
    key_of,
    number,
    percent,
    ratios_by_run,
    with_interval,
)

COLUMNS = (
    "load|system|TPT mean, ms|p99|TTFT mean, ms|tokens/s|exits emitted|divergences|TPT / plain (95 % CI)"
    "|throughput / plain"
)
SUMMED_UP = ("lossless", "early-exit-0.05", "ngram", "hf-early-exit")  # columns of the README's table
OURS = SUMMED_UP[:2]
TEXTS_OF = ("vllm", "off", "lossless", "ngram")  # rows of the table of texts


def table(path: Path) -> str:
    results = load_results(path)
    ratios = ratios_by_run(results)
    columns = COLUMNS.split("|")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for run in sorted(results.runs, key=lambda run: [other.load for other in results.runs].index(run.load)):
        exits, ratio = run.exits, ratios.get(key_of(run))
        known, worst = percent(divergence_frac(run)), percent(at_worst_frac(run))
        taken = None if exits is None else (exits.accepted + exits.released) / run.tokens_at_server
        cells = [
            run.load,
            run.system,
            *(number(value, 1) for value in (run.tpt_ms.mean, run.tpt_ms.p99, run.ttft_ms.mean)),
            number(run.output_tokens_per_s, 1),
            percent(taken),
            known if known == worst else f"{known}, at worst {worst}",
            with_interval(ratio.tpt_mean, ratio.tpt_mean_ci95) if ratio else number(None),
            number(ratio.throughput if ratio else None),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(path: Path, name: str) -> str:
    """A row for each load: TPT / plain of each system; p99 TPT, mean TTFT and throughput / plain of ours."""
    lines = []
    ratios = load_results(path).ratios
    for concurrency in dict.fromkeys(item.concurrency for item in ratios):
        by_system = {item.system: item for item in ratios if item.concurrency == concurrency}
        ours = [by_system[system] for system in OURS]
        cells = [
            f"[{name}](docs/results/{path.name})",
            str(concurrency),
            *(
                with_interval(item.tpt_mean, item.tpt_mean_ci95) if (item := by_system.get(system)) else number(None)
                for system in SUMMED_UP
            ),
            *(
                ", ".join(number(value) for value in values)
                for values in zip(*((item.tpt_p99, item.ttft_mean, item.throughput) for item in ours), strict=True)
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    if sys.argv[1] == "--texts":
        print(texts(Path(sys.argv[2]), sys.argv[3]))
    else:
        path = Path(sys.argv[1])
        print(summary(path, sys.argv[2]) if len(sys.argv) > 2 else table(path))
