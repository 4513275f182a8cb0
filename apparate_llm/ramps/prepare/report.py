"""`report.json` and `report.html`: what the ramps are worth and why."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from apparate_llm.files import write_atomically
from apparate_llm.ramps.checkpoint import BaseModelInfo
from apparate_llm.ramps.prepare.predict import tpt_ratio

KIND_NAMES = {"open": "open chat", "code": "code", "passage": "texts to work on", "user": "your prompts"}


def write_report(
    out: Path,
    base: BaseModelInfo,
    model_name: str,
    rows_record: dict[str, Any],
    trained: dict[int, dict[str, Any]],
    calibration: dict[int, dict[str, Any]],
    profiled: dict[str, Any],
) -> dict[str, Any]:
    """Write both files into `out`; returns what report.json holds."""
    depths = []
    for depth, record in trained.items():
        item = calibration[depth]
        round_ms = profiled["round_ms"][str(depth)]
        predicted = {
            batch: dict(
                zip(
                    ("tpt_ratio", "exits"),
                    tpt_ratio(item["agreement"], profiled["completion_ms"], round_ms, int(batch)),
                    strict=True,
                )
            )
            for batch in profiled["completion_ms"]
        }
        depths.append(
            {
                "depth": depth,
                "rounds": [
                    {"round": number, "agreement": agreement, "rows": rows}
                    for number, (agreement, rows) in enumerate(zip(item["agreement"], item["rows"], strict=True), 1)
                ],
                "tokens_per_cycle": record["held_out_tokens_per_cycle"],
                "calibration_error": item["calibration_error"],
                "reliability": item["reliability"],
                "coverage": item["coverage"],
                "by_kind": item["by_kind"],
                "vocabulary_coverage": record["vocabulary_coverage"],
                "training": {key: record[key] for key in ("rows", "steps", "seconds", "settings")},
                "predicted": predicted,
            }
        )
    report = {
        "schema_version": 1,
        "model": model_name,
        "base_model": base.model_dump(),
        "answer_tokens": rows_record["tokens"],
        "synthesis_seconds": rows_record["seconds"],
        "ceiling": next(iter(trained.values()))["ceiling"],
        "profile": profiled,
        "depths": depths,
        "advice": advice(depths),
    }
    write_atomically(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(out / "report.html", render(report).encode())
    return report


def advice(depths: list[dict[str, Any]]) -> dict[str, Any]:
    """The depth with the lowest predicted TPT at batch 1, in one sentence."""
    best = min(depths, key=lambda item: (item["predicted"]["1"]["tpt_ratio"], item["depth"]))
    predicted = best["predicted"]
    saved = round(100 * (1 - predicted["1"]["tpt_ratio"]))
    paying = [int(batch) for batch, item in predicted.items() if item["tpt_ratio"] < 0.98]
    if not paying:
        sentence = "These ramps do not pay on this machine: serve with --policy off, or prepare with more tokens."
    else:
        sentence = f"Use depth {best['depth']}; expect about {saved} % lower TPT at batch 1"
        if max(paying) > 1:
            last = max(paying)
            sentence += f" and {round(100 * (1 - predicted[str(last)]['tpt_ratio']))} % at batch {last}"
        kinds = sorted(best["by_kind"], key=lambda kind: best["by_kind"][kind])
        if len(kinds) > 1:
            sentence += f"; the gain is largest for {KIND_NAMES[kinds[-1]]}, smallest for {KIND_NAMES[kinds[0]]}"
        sentence += "."
    return {"depth": best["depth"], "sentence": sentence}


def render(report: dict[str, Any]) -> str:
    """A page that needs nothing from elsewhere."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html").render(
        report=report, figures=figures(report), kind_names=KIND_NAMES, batches=list(report["profile"]["completion_ms"])
    )


def figures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(caption, data URI of an SVG) each; the lines are legible on white and on black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = []
    colors = ["#2a7fde", "#d9822b", "#2e9e5b", "#b04fc9", "#c23b4a"]

    def figure(caption: str, x_label: str, y_label: str, draw: Any) -> None:
        with plt.rc_context(_style("#808890")):
            fig, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
            draw(ax)
            ax.set_xlabel(x_label)
            ax.set_ylabel(y_label)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(frameon=False)
            buffer = io.BytesIO()
            fig.savefig(buffer, format="svg", transparent=True)
            plt.close(fig)
        drawn.append((caption, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()))

    def agreement(ax: Any) -> None:
        for color, item in zip(colors, report["depths"], strict=False):
            rounds = [part["round"] for part in item["rounds"]]
            ax.plot(
                rounds,
                [part["agreement"] for part in item["rounds"]],
                "o-",
                color=color,
                label=f"depth {item['depth']}",
            )
        ax.set_ylim(0, 1)
        ax.set_xticks(range(1, 5))

    def coverage(ax: Any) -> None:
        for color, item in zip(colors, report["depths"], strict=False):
            ax.plot(
                [100 * wrong for _, wrong in item["coverage"]],
                [100 * covered for covered, _ in item["coverage"]],
                color=color,
                label=f"depth {item['depth']}",
            )
        ax.set_xlim(left=0)
        ax.set_ylim(0, 100)

    def calibration(ax: Any) -> None:
        ax.plot([0, 1], [0, 1], "--", color="#808890", linewidth=1)
        for color, item in zip(colors, report["depths"], strict=False):
            points = item["reliability"]
            label = f"depth {item['depth']}, error {item['calibration_error']:.3f}"
            ax.plot([p for p, _, _ in points], [a for _, a, _ in points], "o-", color=color, label=label)

    def ratios(ax: Any) -> None:
        for color, item in zip(colors, report["depths"], strict=False):
            batches = list(item["predicted"])
            ax.plot(
                batches,
                [item["predicted"][batch]["tpt_ratio"] for batch in batches],
                "o-",
                color=color,
                label=f"depth {item['depth']}",
            )
        ax.axhline(1.0, linestyle="--", color="#808890", linewidth=1)
        ax.set_ylim(bottom=0)

    figure("Agreement with the full model, round by round", "round", "agreement", agreement)
    figure(
        "Tokens that can exit (first round) against tokens that exit wrongly",
        "wrong exits, % of all tokens",
        "exits, % of all tokens",
        coverage,
    )
    figure("Calibration: what the ramp says against what happens", "calibrated confidence", "agreement", calibration)
    figure("Predicted TPT with exits / without, by batch size", "requests at once", "ratio", ratios)
    return drawn


def _style(color: str) -> dict[Any, Any]:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {"svg.fonttype": "none", "font.size": 10, **dict.fromkeys(names, color)}
