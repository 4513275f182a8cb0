"""How much the policies depend on their constants: what `python -m scripts.sweep_constants` found, as a picture."""

import json
from math import ceil, floor, log2
from typing import NamedTuple

from scripts.results_table import RESULTS
from scripts.svg import Drawing, Panel, Point, Theme

FILE = "sensitivity.json"
WIDTH, HEIGHT = 680, 540
LEFT, GAP, TOPS, PANEL_HEIGHT = 44, 22, (136, 334), 144


class Measure(NamedTuple):
    title: str
    key: str  # of a point in the result
    scale: float
    step: float  # of the axis


MEASURES = (
    Measure("Time per output token / plain", "tpt_ratio", 1, 0.2),
    Measure("Divergences, % of tokens", "divergence_frac", 100, 2),
)
Lines = dict[str, list[dict[str, float]]]  # name -> points


def draw(theme: Theme) -> str:
    sweep = json.loads((RESULTS / FILE).read_text())
    logs: dict[str, Lines] = sweep["logs"]
    limits = (1.0, 100 * sweep["accuracy_bound"])  # plain; the bound
    drawing = Drawing(
        WIDTH, HEIGHT, theme, title="TPT and divergences over the policies' constants", desc=description(logs)
    )
    names = list(next(iter(logs.values())))
    drawing.legend((22, 32), names[:2])
    drawing.legend((22, 58), names[2:], first=2)
    width = (WIDTH - LEFT - 16 - GAP * (len(logs) - 1)) / len(logs)
    for measure, top, limit in zip(MEASURES, TOPS, limits, strict=True):
        low, high = span(logs, measure, limit)
        drawing.text((LEFT, top - 10), measure.title, color=theme.soft)
        for number, lines in enumerate(logs.values()):
            panel = Panel(LEFT + number * (width + GAP), top, width, PANEL_HEIGHT, low, high)
            draw_panel(drawing, panel, lines, measure, limit, is_first=number == 0)
    for number, log in enumerate(logs):
        left = LEFT + number * (width + GAP)
        drawing.text((left, TOPS[0] - 34), log, bold=True)
        drawing.text((left + width / 2, HEIGHT - 16), "constant / default", color=theme.soft, anchor="middle")
    return drawing.svg()


def span(logs: dict[str, Lines], measure: Measure, limit: float) -> tuple[float, float]:
    """Ends of the axis: whole steps around all values and the limit."""
    values = [measure.scale * p[measure.key] for lines in logs.values() for points in lines.values() for p in points]
    values.append(limit)
    return measure.step * floor(min(values) / measure.step), measure.step * ceil(max(values) / measure.step)


def draw_panel(drawing: Drawing, panel: Panel, lines: Lines, measure: Measure, limit: float, *, is_first: bool) -> None:
    steps = round((panel.high - panel.low) / measure.step)
    panel.grid(drawing, [panel.low + measure.step * k for k in range(steps + 1)], labels=is_first)
    at = panel.y(limit)
    drawing.line([(panel.left, at), (panel.right, at)], color=drawing.theme.soft, width=1.5, dash="5 4")
    if is_first:
        name, below = ("plain", 16) if measure.scale == 1 else ("bound", -5)
        drawing.text((panel.left + 6, at + below), name, color=drawing.theme.soft, size=13)
    factors = [point["factor"] for point in next(iter(lines.values()))]
    for number, points in enumerate(lines.values()):
        places = [place(panel, factors, p["factor"], measure.scale * p[measure.key]) for p in points]
        drawing.line(places, color=drawing.theme.series[number], width=2)
        for at_point in places:
            drawing.mark(at_point, number, color=drawing.theme.series[number], radius=4)
    for factor in factors:
        x, _ = place(panel, factors, factor, panel.low)
        drawing.text((x, panel.bottom + 20), f"{factor:g}", color=drawing.theme.soft, anchor="middle")


def place(panel: Panel, factors: list[float], factor: float, value: float) -> Point:
    """On a logarithmic axis from the first factor to the last."""
    first, last = log2(factors[0]), log2(factors[-1])
    return panel.left + 14 + (panel.width - 28) * (log2(factor) - first) / (last - first), panel.y(value)


def description(logs: dict[str, Lines]) -> str:
    sentences = []
    for log, lines in logs.items():
        for name, points in lines.items():
            tpt = [point["tpt_ratio"] for point in points]
            share = max(point["divergence_frac"] for point in points)
            sentences.append(
                f"{log}, {name}: TPT ratio {min(tpt):.2f} to {max(tpt):.2f}, divergences up to {share:.1%}."
            )
    return " ".join(sentences)
