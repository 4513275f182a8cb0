"""TPT over plain vLLM's against clients: the table of README as a picture."""

import re
from itertools import groupby, pairwise
from math import ceil
from typing import NamedTuple

from scripts.results_table import NOTHING, TABLES, Column, measured
from scripts.svg import Drawing, Panel, Theme

TABLE = "readme"
CLIENTS = re.compile(r"(\d+) clients?")
WIDTH, HEIGHT = 680, 350
TOP, BOTTOM, LEFT, GAP = 84, 286, 44, 22
DODGE = 9  # between the systems of one load
STEP = 0.25  # of the axis
WIDE = 84  # between two loads: room for "16 clients"


class Value(NamedTuple):
    mean: float
    interval: tuple[float, float] | None


class Load(NamedTuple):
    """A row of the table."""

    model: str
    prompts: str
    clients: int
    values: tuple[Value | None, ...]  # by system; None where it was not measured


def loads() -> list[Load]:
    """Those of the table with a number of clients, by model, prompts and clients; the first two in its order."""
    table, rows = TABLES[TABLE], []
    for source in table.rows:
        model, _, prompts = source.name.partition(", ")
        of = measured(source.file)
        for name in source.loads:
            if clients := CLIENTS.fullmatch(name):
                ratios = [of.get((name, system), NOTHING).ratio for _, system, _ in table.columns]
                values = [Value(r.tpt_mean, r.tpt_mean_ci95) if r and r.tpt_mean else None for r in ratios]
                rows.append(Load(model, prompts, int(clients[1]), tuple(values)))
    models, texts = [row.model for row in rows], [row.prompts for row in rows]
    return sorted(rows, key=lambda row: (models.index(row.model), texts.index(row.prompts), row.clients))


def draw(theme: Theme) -> str:
    rows, columns = loads(), TABLES[TABLE].columns
    models = {model: list(part) for model, part in groupby(rows, key=lambda row: row.model)}
    drawing = Drawing(
        WIDTH,
        HEIGHT,
        theme,
        title="Time per output token over plain vLLM's, by clients",
        desc=description(rows, columns),
    )
    drawing.text((16, 28), "Time per output token / plain vLLM's", bold=True, size=16)
    drawing.text((WIDTH - 16, 28), "lower is better", color=theme.soft, anchor="end")
    drawing.legend((22, 54), [title for title, _, _ in columns])
    highest = STEP * ceil(max(top for row in rows for value in row.values if value for top in ends(value)) / STEP)
    width = (WIDTH - LEFT - 16 - GAP * (len(models) - 1)) / len(models)
    for number, (model, part) in enumerate(models.items()):
        panel = Panel(LEFT + number * (width + GAP), TOP, width, BOTTOM - TOP, 0, highest)
        draw_model(drawing, panel, model, part, is_first=number == 0)
    return drawing.svg()


def ends(value: Value) -> tuple[float, float]:
    return value.interval or (value.mean, value.mean)


def draw_model(drawing: Drawing, panel: Panel, model: str, rows: list[Load], *, is_first: bool) -> None:
    theme = drawing.theme
    panel.grid(drawing, [STEP * k for k in range(round(panel.high / STEP) + 1)], labels=is_first)
    drawing.line([(panel.left, panel.y(1)), (panel.right, panel.y(1))], color=theme.soft, width=1.5, dash="5 4")
    drawing.text((panel.left + 6, panel.bottom - 10), model, bold=True)
    if is_first:
        drawing.text((panel.left + 6, panel.y(1) - 6), "plain vLLM", color=theme.soft, size=13)
    pitch = panel.width / len(rows)
    places = {row: panel.left + pitch * (number + 0.5) for number, row in enumerate(rows)}
    for prompts, group in groupby(rows, key=lambda row: row.prompts):
        part = list(group)
        for system in range(len(part[0].values)):
            shift = DODGE * (system - (len(part[0].values) - 1) / 2)
            values = [(places[row] + shift, row.values[system]) for row in part]
            draw_system(drawing, panel, values, drawing.theme.series[system], system)
        for row in part:
            name = f"{row.clients} client" + "s" * (row.clients != 1) if pitch > WIDE else str(row.clients)
            drawing.text((places[row], panel.bottom + 22), name, anchor="middle")
        first, last = places[part[0]], places[part[-1]]
        half = min(36, pitch / 2 - 6)
        drawing.line([(first - half, panel.bottom + 32), (last + half, panel.bottom + 32)], color=theme.soft)
        drawing.text(((first + last) / 2, panel.bottom + 50), prompts, color=theme.soft, anchor="middle")


def draw_system(
    drawing: Drawing, panel: Panel, values: list[tuple[float, Value | None]], color: str, system: int
) -> None:
    """Points with their intervals, joined where neighbours were measured."""
    for (x, value), (next_x, following) in pairwise(values):
        if value and following:
            drawing.line([(x, panel.y(value.mean)), (next_x, panel.y(following.mean))], color=color, width=1.5)
    for x, value in values:
        if value:
            low, high = ends(value)
            drawing.line([(x, panel.y(low)), (x, panel.y(high))], color=color, width=2.5)
            drawing.mark((x, panel.y(value.mean)), system, color=color)


def description(rows: list[Load], columns: tuple[Column, ...]) -> str:
    """All of the picture's values as a sentence for each load."""
    sentences = []
    for row in rows:
        values = [f"{name} {v.mean:.2f}" for (name, _, _), v in zip(columns, row.values, strict=True) if v]
        sentences.append(f"{row.model}, {row.prompts}, clients {row.clients}: {', '.join(values)}.")
    return " ".join(sentences)
