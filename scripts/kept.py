"""Results in docs/results, and how their figures stand in tables."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from apparate_llm.eval.compare import load_results
from apparate_llm.eval.schema import Ratio, Run, SteadyRatio, SteadyResults, SteadyRun
from apparate_llm.eval.steady import clients_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
QWEN, SMOLLM = "Qwen2.5-Coder-0.5B", "SmolLM2-135M"


class Measured(NamedTuple):
    """One system under one load."""

    run: Run | SteadyRun
    ratios: dict[str, Ratio | SteadyRatio]  # by baseline

    def over(self, baselines: Sequence[str]) -> Ratio | SteadyRatio | None:
        """To the first of these that was measured."""
        return next((self.ratios[name] for name in baselines if name in self.ratios), None)


@cache
def measured(path: Path) -> dict[tuple[str, str], Measured]:
    """By load and system, of `eval tpt` or `eval steady`."""
    data = json.loads(path.read_text())
    if "levels" in data:
        levels = SteadyResults.model_validate(data).levels
        return {
            (clients_text(level.clients), run.system): Measured(
                run, {ratio.baseline: ratio for ratio in level.ratios if ratio.system == run.system}
            )
            for level in levels
            for run in level.runs
        }
    results = load_results(path)
    ratios: dict[tuple[str, str], dict[str, Ratio | SteadyRatio]] = {}
    for ratio in results.ratios:
        ratios.setdefault((ratio.load, ratio.system), {})[ratio.baseline] = ratio
    return {(run.load, run.system): Measured(run, ratios.get((run.load, run.system), {})) for run in results.runs}


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Nothing where there are no rows."""
    if not rows:
        return ""
    lines = [f"|{'|'.join(row)}|\n" for row in [head, ["---"] * len(head), *rows]]
    return "".join(lines)


def is_kept(file: str) -> bool:
    return (RESULTS / file).is_file()


def link(name: str, file: str, folder: Path) -> str:
    """folder: of the results, as seen from the page."""
    return f"[{name}]({folder / file})"


def read(file: str) -> Any:
    return json.loads((RESULTS / file).read_text())
