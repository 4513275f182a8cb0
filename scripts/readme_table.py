#!/usr/bin/env python3
"""Prints a results file of `apparate-llm eval quick` as the README's table: python -m scripts.readme_table FILE"""

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    results = json.loads(path.read_text())
    ratios = {(item["system"], item["concurrency"]): item for item in results["ratios"]}
    lines = [
        "| system | concurrency | TPT mean, ms | p50 | p99 | tokens/s | exits held, accepted | same outputs "
        "| TPT / plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        exits, item = run["exits"], ratios.get((run["system"], run["concurrency"]))
        cells = [
            run["system"],
            str(run["concurrency"]),
            *(f"{run['tpt_ms'][key]:.1f}" for key in ("mean", "p50", "p99")),
            f"{run['output_tokens_per_s']:.1f}",
            f"{exits['held']}, {exits['accepted']}" if exits else "",
            f"{run['identical_frac']:.2f}" if run["identical_frac"] is not None else "",
            f"{item['tpt_mean']:.2f} ({', '.join(f'{v:.2f}' for v in item['tpt_mean_by_repeat'])})" if item else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
