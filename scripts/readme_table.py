#!/usr/bin/env python3
"""Prints the results of an evaluation as the README's table:

python -m scripts.readme_table RESULTS.json
"""

import sys
from pathlib import Path

from apparate_llm.eval.compare import load_results
from apparate_llm.eval.tables import divergence_frac, key_of, ratios_by_run

COLUMNS = (
    "load|system|TPT mean, ms|p99|TTFT mean, ms|tokens/s|exits emitted|tokens that differ|TPT / plain (95 % CI)"
    "|throughput / plain"
)


def table(path: Path) -> str:
    results = load_results(path)
    ratios = ratios_by_run(results)
    columns = COLUMNS.split("|")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for run in sorted(results.runs, key=lambda run: [other.load for other in results.runs].index(run.load)):
        exits, ratio, share = run.exits, ratios.get(key_of(run)), divergence_frac(run)
        taken = None if exits is None else (exits.accepted + exits.released) / run.output_tokens
        faster = "" if ratio is None else number(ratio.tpt_mean, 2)
        if ratio is not None and ratio.tpt_mean_ci95 is not None:
            faster += " ({:.2f}-{:.2f})".format(*ratio.tpt_mean_ci95)
        cells = [
            run.load,
            run.system,
            *(number(value, 1) for value in (run.tpt_ms.mean, run.tpt_ms.p99, run.ttft_ms.mean)),
            number(run.output_tokens_per_s, 1),
            percent(taken),
            percent(share),
            faster,
            "" if ratio is None else number(ratio.throughput, 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
