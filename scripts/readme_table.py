#!/usr/bin/env python3
"""Prints the results of an evaluation as the README's table:

python -m scripts.readme_table RESULTS.json
"""

import sys
from pathlib import Path

from apparate_llm.eval.compare import load_results
from apparate_llm.eval.tables import divergence_frac, key_of, number, percent, ratios_by_run, with_interval

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
        cells = [
            run.load,
            run.system,
            *(number(value, 1) for value in (run.tpt_ms.mean, run.tpt_ms.p99, run.ttft_ms.mean)),
            number(run.output_tokens_per_s, 1),
            percent(taken),
            percent(share),
            with_interval(ratio.tpt_mean, ratio.tpt_mean_ci95) if ratio else number(None),
            number(ratio.throughput if ratio else None),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
