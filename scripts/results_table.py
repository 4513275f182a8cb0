#!/usr/bin/env python3
"""Prints the results of an evaluation as a table of docs/tables.md, or as rows of the README's:

python -m scripts.results_table RESULTS.json [NAME OF THE ROWS]
python -m scripts.results_table --texts RESULTS.json MODEL     # the rows of docs/operate.md: whose text an answer has
"""

import sys
from pathlib import Path

from apparate_llm.eval.compare import load_results
from apparate_llm.eval.schema import Run
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


def texts(path: Path, model: str) -> str:
    """A row for each system that was started for it: answers under each load, and the share with plain vLLM's text,
    with that of `off`, and with the system's own under the first load, load by load."""
    results = load_results(path)
    by_system: dict[str, list[Run]] = {}
    for run in results.runs:
        if not results.systems[run.system].startswith("at "):
            by_system.setdefault(run.system, []).append(run)
    lines = []
    for system, runs in by_system.items():
        shares = ([run.identical_frac for run in runs], [run.same_as_off_frac for run in runs])
        own = [run.same_as_first_load_frac for run in runs[1:]]
        cells = [f"[{model}](results/{path.name})", system, str(runs[0].requests), *map(in_turn, (*shares, own))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_turn(shares: list[float | None]) -> str:
    """`70.8, 91.7 %`."""
    if None in shares:
        return number(None)
    return ", ".join(percent(share).removesuffix(" %") for share in shares) + " %"


if __name__ == "__main__":
    if sys.argv[1] == "--texts":
        print(texts(Path(sys.argv[2]), sys.argv[3]))
    else:
        path = Path(sys.argv[1])
        print(summary(path, sys.argv[2]) if len(sys.argv) > 2 else table(path))
