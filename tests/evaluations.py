"""Small evaluations over fake servers, and what comes of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from apparate_llm.eval.evaluate import Evaluation
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.schema import Ratio, Run
from apparate_llm.eval.store import Block, Store
from apparate_llm.eval.summary import Summary, cells_of, ratios_of, runs_of
from apparate_llm.eval.systems import System
from apparate_llm.eval.workloads import closed


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": text}]) for text in texts]


def evaluation_of(folder: Path, systems: list[System], asked: list[Prompt], **changes: Any) -> Evaluation:
    loads = [closed(len(asked), clients, max_tokens=9, length="free") for clients in (1, 2)]
    store = Store(folder)
    store.open({"loads": [[load.name, False] for load in loads]}, fresh=False)
    made = Evaluation(Path("fake"), systems, asked, loads, repeat=2, store=store, start_timeout_s=5.0)
    return replace(made, **changes)


def results_of(
    evaluation: Evaluation, phases: tuple[tuple[str, int], ...] = ()
) -> tuple[list[Run], list[Ratio], list[Block]]:
    blocks = list(evaluation.store.blocks())
    cells = cells_of(blocks, evaluation.systems, evaluation.loads)
    summary = Summary(Path("fake"), 4, evaluation.prompts, phases, {"tpt": 55.0}, evaluation.sampling)
    runs = runs_of(cells, summary)
    return runs, ratios_of(cells, runs), blocks
