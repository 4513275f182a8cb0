#!/usr/bin/env python3
"""Prints a results file of `apparate-llm eval quick` or `scripts.compare` as the README's table:

python -m scripts.readme_table FILE
"""

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


def comparison(path: Path) -> str:
    lines = [
        "| concurrency | system | TPT mean, ms | p99 | tokens | exits held, accepted, released | divergences "
        "| same outputs | TPT / plain | throughput / plain |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(path.read_text())["rows"]:
        counts, plain = row["counts"], row["system"] == "vllm"
        cells = [
            str(row["concurrency"]),
            row["system"],
            *(f"{row['tpt_ms'][key]:.1f}" for key in ("mean", "p99")),
            str(row["output_tokens"]),
            ", ".join(str(counts[key]) for key in ("held", "accepted", "released")) if counts else "",
            str(counts["diverged"]) if counts else "",
            "" if plain else f"{row['identical_frac']:.2f}",
            "" if plain else f"{row['tpt_ratio']:.2f}",
            "" if plain else f"{row['throughput_ratio']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    print((comparison if "rows" in json.loads(file.read_text()) else table)(file))
