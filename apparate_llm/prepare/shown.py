"""What the `ramps` commands print of ramps."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from apparate_llm.prepare.records import TptRatio, Verified
from apparate_llm.ramps.checkpoint import RampManifest
from apparate_llm.renamed import of_any_preparation

if TYPE_CHECKING:
    from apparate_llm.prepare.evaluate import Evaluation


def held_out_table(manifest: RampManifest) -> Table:
    """Of conversations that the ramps were not trained on; a calibration has an entry for each position."""
    positions = range(max(map(len, manifest.calibration.values())))
    columns = [f"position {position}" for position in positions]
    table = Table("depth", *columns, "calibration error", title="Held-out acceptance rate")
    for depth in manifest.depths:
        record = of_any_preparation(manifest.training.get("depths", {}).get(str(depth), {}))
        rates = dict(enumerate(record.get("held_out_acceptance_rates", [])))
        name = f"{depth} (default)" if depth == manifest.default_depth else str(depth)
        figures = [*map(rates.get, positions), record.get("held_out_calibration_error")]
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in figures))
    return table


def print_verified(verified: Verified) -> None:
    table = Table(title="TPT with exits / plain vLLM, with 95 % intervals")
    for column in ("clients", "predicted", "measured", "measured / predicted", "within the prediction"):
        table.add_column(column, justify="right")

    def cell(item: TptRatio) -> str:
        if item["tpt_ratio"] is None:
            return "-"
        interval = "" if item["ci95"] is None else f" ({item['ci95'][0]:.2f} to {item['ci95'][1]:.2f})"
        return f"{item['tpt_ratio']:.2f}{interval}"

    for number, item in verified["clients"].items():
        off = "-" if item["off_frac"] is None else f"{1 + item['off_frac']:.2f}"
        within = {True: "yes", False: "NO", None: "-"}[item["within"]]
        table.add_row(number, cell(item["predicted"]), cell(item["measured"]), off, within)
    console = Console()
    console.print(table)
    console.print(verified["sentence"], soft_wrap=True)


def print_evaluation(result: "Evaluation") -> None:
    numbers = range(len(result.depths[0].positions))
    table = Table("depth", "category", *(f"position {number}" for number in numbers), title="Acceptance rate")

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for item in result.depths:
        for name, rates in item.by_category.items():
            table.add_row(str(item.depth), name, *(cell(rates.get(str(number))) for number in numbers))
        name = "mean over categories" if item.by_category else "all"
        table.add_row(
            str(item.depth),
            name,
            *(cell(part.acceptance_rate) for part in item.positions),
            style="bold",
            end_section=True,
        )
    console = Console()
    console.print(table)
    for item in result.depths:
        gain = f"{item.accepted_per_step:.2f} accepted tokens per step"
        line = f"depth {item.depth}: {gain}, calibration error {item.calibration_error:.3f}"
        console.print(line, soft_wrap=True)
    ceiling = ", ".join(f"{name} {value:.2f}" for name, value in result.ceiling.items())
    console.print(f"{result.prompts} prompts, {result.answer_tokens} answer tokens; ceiling: {ceiling}", soft_wrap=True)
