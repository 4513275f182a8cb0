"""One small function per figure, `(ax, points, ...)`: what is drawn was measured before, so it can be drawn again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from apparate_llm.drawing import COLORS, GREY, Axes, data_uri
from apparate_llm.eval.intervals import Samples
from apparate_llm.eval.schema import Results, Run, TimelinePoint
from apparate_llm.eval.tables import bounds_of, load_name, loads_of, systems_of

MAX_STEPS = 400  # of a CDF; more cannot be seen
SHORTEST_GAP_MS = 0.1  # chunks that came at once have none, which a logarithmic axis cannot show

Key = tuple[str, str, bool]  # system, load, fixed_length


@dataclass(frozen=True, slots=True)
class Points:
    """The values behind the distributions of a `Run`."""

    tpt_ms: dict[Key, list[float]] = field(default_factory=dict)  # one per request
    gap_ms: dict[Key, list[float]] = field(default_factory=dict)  # one per chunk but the first


class Figure(NamedTuple):
    caption: str
    image: str  # data URI of an SVG


def figures(results: Results, points: Points) -> list[Figure]:
    """Every figure there is something to show for."""
    colors = system_colors(results)
    made = []
    for fixed_length in (False, True):
        runs = [run for run in results.runs if run.fixed_length == fixed_length and run.tpt_ms.mean is not None]
        closed = [run for run in runs if run.concurrency is not None]
        if len({run.concurrency for run in closed}) > 1:
            caption = load_name("Time per output token by number of clients, with 95 % CI", fixed_length)
            made.append(_figure(caption, partial(tpt_by_concurrency, runs=closed, colors=colors)))
        known = [run for run in runs if run.output_tokens_per_s is not None]
        if known:
            caption = load_name("Throughput and time per output token, by load", fixed_length)
            made.append(_figure(caption, partial(throughput_latency, runs=known, colors=colors)))
    for load in loads_of(results):
        made += _of_load(results, points, load, colors)
    exits = [run for run in results.runs if run.exits is not None and run.exits.by_depth and run.tokens_at_server]
    if exits:
        height = 1.3 + 0.34 * len(exits)
        made.append(_figure("Tokens that left early, by depth", partial(exits_by_depth, runs=exits), height))
    return made


def _of_load(results: Results, points: Points, load: tuple[str, bool], colors: dict[str, str]) -> list[Figure]:
    name, made = load_name(*load), []
    tpt, gaps = ({s: v for s in colors if (v := of.get((s, *load)))} for of in (points.tpt_ms, points.gap_ms))
    timelines = {
        run.system: run.timeline
        for run in results.runs
        if (run.load, run.fixed_length) == load and any(at.divergence_frac is not None for at in run.timeline)
    }
    if tpt:
        caption = f"Time per output token of the requests, {name}"
        made.append(_figure(caption, partial(tpt_cdf, values=tpt, colors=colors)))
    if gaps:
        made.append(_figure(f"Gaps between tokens, {name}", partial(gap_cdf, values=gaps, colors=colors)))
    if timelines:
        draw = partial(divergence, timelines=timelines, colors=colors, bounds=bounds_of(results))
        made.append(_figure(f"Divergences as the tokens went by, {name}", draw))
    return made


def system_colors(results: Results) -> dict[str, str]:
    """The same in all figures."""
    return {system: COLORS[index % len(COLORS)] for index, system in enumerate(systems_of(results))}


def tpt_cdf(ax: Axes, values: dict[str, list[float]], colors: dict[str, str]) -> None:
    _cdf(ax, values, colors)
    ax.set_xlabel("time per output token, ms")
    ax.set_ylabel("requests at or below, %")


def gap_cdf(ax: Axes, values: dict[str, list[float]], colors: dict[str, str]) -> None:
    _cdf(ax, {system: [max(gap, SHORTEST_GAP_MS) for gap in gaps] for system, gaps in values.items()}, colors)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel(f"gap between chunks with tokens, ms ({SHORTEST_GAP_MS:g}: that or less)")
    ax.set_ylabel("gaps at or below, %")


def numbers(values: Sequence[float | None]) -> Samples:
    """What is unknown is left out of a drawing as NaN."""
    return np.array(values, dtype=float)


def tpt_by_concurrency(ax: Axes, runs: list[Run], colors: dict[str, str]) -> None:
    for system, own in _by_system(runs):
        own.sort(key=lambda run: run.concurrency or 0)
        means = [run.tpt_ms.mean or 0.0 for run in own]
        intervals = [run.tpt_ms.mean_ci95 or (mean, mean) for run, mean in zip(own, means, strict=True)]
        errors = [(mean - low, high - mean) for mean, (low, high) in zip(means, intervals, strict=True)]
        ax.errorbar(
            numbers([run.concurrency for run in own]),
            means,
            yerr=np.clip(np.array(errors).T, 0, None),
            marker="o",
            capsize=3,
            color=colors[system],
            label=system,
        )
    levels = sorted({run.concurrency for run in runs if run.concurrency is not None})
    ax.set_xscale("log", base=2)
    ax.set_xticks(levels, [str(level) for level in levels])
    ax.set_xlabel("clients")
    ax.set_ylabel("time per output token, mean, ms")
    ax.set_ylim(bottom=0)


def throughput_latency(ax: Axes, runs: list[Run], colors: dict[str, str]) -> None:
    """Better is right and below. Points along the number of clients are joined; other loads stand alone."""
    for system, own in _by_system(runs):
        own.sort(key=lambda run: run.concurrency or 0)
        label: str | None = system
        for joined in (True, False):
            part = [run for run in own if (run.concurrency is not None) == joined]
            if not part:
                continue
            x = numbers([run.output_tokens_per_s for run in part])
            y = numbers([run.tpt_ms.mean for run in part])
            ax.plot(x, y, "o-" if joined else "D", color=colors[system], label=label)
            label = None
            for run, at in zip(part, zip(x, y, strict=True), strict=True):
                text = str(run.concurrency) if joined else run.load
                ax.annotate(text, at, (5, 4), textcoords="offset points", fontsize=8, color=colors[system])
    closed = any(run.concurrency is not None for run in runs)
    ax.set_xlabel("output tokens per second" + " (labels: clients)" * closed)
    ax.set_ylabel("time per output token, mean, ms")
    ax.margins(0.1)
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)


def divergence(
    ax: Axes, timelines: dict[str, list[TimelinePoint]], colors: dict[str, str], bounds: dict[str, float]
) -> None:
    """Share of all tokens so far, shaded up to what it is at worst; a dashed line where the bound is."""
    for system, points in timelines.items():
        known = [point for point in points if point.divergence_frac is not None]
        shares = [100 * (point.divergence_frac or 0.0) for point in known]
        ax.plot(
            [point.output_tokens for point in known], shares, "o-", markersize=3, color=colors[system], label=system
        )
        worst = [100 * (point.divergences_at_worst_frac or 0.0) for point in known]
        if any(high > share for high, share in zip(worst, shares, strict=True)):  # exits without a verdict
            ax.fill_between(
                [point.output_tokens for point in known], shares, worst, color=colors[system], alpha=0.25, linewidth=0
            )
        if bounds.get(system):
            ax.axhline(100 * bounds[system], linestyle="--", linewidth=1, color=colors[system])
    if any(bounds.get(system) for system in timelines):
        ax.plot([], [], "--", linewidth=1, color=GREY, label="accuracy bound")
    ax.set_xlabel("output tokens so far")
    ax.set_ylabel("divergences, % of tokens")
    ax.margins(x=0.02, y=0.15)
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    spans = _phases(max(timelines.values(), key=len))
    if len(spans) > 1:
        for index, (phase, start, end) in enumerate(spans):
            ax.axvspan(start, end, color=GREY, alpha=0.16 if index % 2 else 0.05, linewidth=0)
            at = ((start + end) / 2, 1.0)
            ax.annotate(
                phase,
                at,
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )


def exits_by_depth(ax: Axes, runs: list[Run]) -> None:
    """One bar per system and load; what is missing to 100 % went through all layers."""
    from matplotlib import colormaps

    names = [f"{run.system}, {load_name(run.load, run.fixed_length)}" for run in runs]
    depths = sorted(
        {depth for run in runs if run.exits for depth in run.exits.by_depth}, key=lambda text: (len(text), text)
    )
    left = np.zeros(len(runs))
    for index, depth in enumerate(depths):
        shares = np.array(
            [100 * (run.exits.by_depth.get(depth, 0) if run.exits else 0) / run.tokens_at_server for run in runs]
        )
        color = colormaps["plasma"](0.4 + 0.4 * index / max(1, len(depths) - 1))
        ax.barh(range(len(runs)), shares, left=left, height=0.65, color=color, label=f"depth {depth}")
        left += shares
    ax.set_yticks(range(len(runs)), names)
    ax.invert_yaxis()
    ax.set_xlabel("exits sent, % of output tokens")
    ax.set_xlim(left=0)


def _by_system(runs: list[Run]) -> Iterator[tuple[str, list[Run]]]:
    for system in dict.fromkeys(run.system for run in runs):
        yield system, [run for run in runs if run.system == system]


def _cdf(ax: Axes, values: dict[str, list[float]], colors: dict[str, str]) -> None:
    for system, known in values.items():
        ordered = np.sort(known)
        shown = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), MAX_STEPS)).round().astype(int))
        x = np.concatenate([ordered[:1], ordered[shown]])
        y = np.concatenate([[0.0], 100 * (shown + 1) / len(ordered)])
        ax.step(x, y, where="post", color=colors[system], label=system)
    ax.set_ylim(0, 102)


def _phases(points: list[TimelinePoint]) -> list[tuple[str, int, int]]:
    """(name, first, last token) of each."""
    spans: list[tuple[str, int, int]] = []
    for point in points:
        if spans and spans[-1][0] == point.phase:
            spans[-1] = (point.phase, spans[-1][1], point.output_tokens)
        else:
            spans.append((point.phase, spans[-1][2] if spans else 0, point.output_tokens))
    return spans


def _figure(caption: str, draw: Callable[[Axes], None], height: float = 3.6) -> Figure:
    return Figure(caption, data_uri(draw, height))
