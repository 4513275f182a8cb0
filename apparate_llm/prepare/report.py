"""`report.json` and `report.html`: what the ramps are worth and why."""

import json
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from apparate_llm.drawing import COLORS, GREY, Axes, data_uri
from apparate_llm.files import write_atomically
from apparate_llm.prepare.plan import Made
from apparate_llm.prepare.predict import predict_both, predicted_for, users_are_given
from apparate_llm.prepare.records import Advice, DepthReport, Predicted, Profiled, Report, TptRatio
from apparate_llm.ramps.checkpoint import BaseModelInfo

PAYS = 0.98  # of plain TPT
USERS_PROMPTS = "users' prompts"
SEVERAL = ("4", "16")  # clients that the advice names
Line = Sequence[tuple[str | float, float | None]]  # of points
KIND_NAMES = {"open": "open chat", "code": "code", "passage": "texts to work on", "user": "your prompts"}


def write_report(out: Path, base: BaseModelInfo, model_name: str, made: Made, profiled: Profiled) -> Report:
    """Write both files into `out`; returns what report.json holds. The figures are of the conversations that are there
    to report from, which nothing was trained on or chosen by."""
    depths = [of_depth(made, depth, profiled, base.num_hidden_layers) for depth in made.trained]
    known = next(iter(made.conversations.values()))
    report: Report = {
        "schema_version": 4,
        "model": model_name,
        "base_model": base.model_dump(),
        "answer_tokens": made.rows["tokens"],
        "synthesis_seconds": made.rows["seconds"],
        "ceiling": next(iter(made.measured.values()))["ceiling"],
        "profile": profiled,
        "predicted_for": predicted_for(known),
        "depths": depths,
        "advice": advice(depths, whose="prompts like yours" if users_are_given(known) else USERS_PROMPTS),
    }
    write_pages(out, report)
    return report


def of_depth(made: Made, depth: int, profiled: Profiled, num_layers: int) -> DepthReport:
    """What one depth's ramp agrees to, and what it will bring."""
    trained, measured, calibrated = made.trained[depth], made.measured[depth], made.calibration[depth]
    rates = zip(calibrated["acceptance_rates"], calibrated["rows"], strict=True)
    return {
        "depth": depth,
        "positions": [
            {"position": number, "acceptance_rate": rate, "rows": rows} for number, (rate, rows) in enumerate(rates)
        ],
        "accepted_per_step": measured["held_out_accepted_per_step"],
        "calibration_error": calibrated["calibration_error"],
        "reliability": calibrated["reliability"],
        "coverage": calibrated["coverage"],
        "by_kind": calibrated["by_kind"],
        "vocabulary_coverage": measured["vocabulary_coverage"],
        "training": {
            "rows": trained["rows"],
            "steps": trained["steps"],
            "seconds": trained["seconds"],
            "settings": trained["settings"],
        },
        "predicted": predict_both(made.conversations[depth], profiled, depth=depth, num_layers=num_layers),
    }


def write_pages(out: Path, report: Report) -> None:
    write_atomically(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(out / "report.html", render(report).encode())


def advice(depths: list[DepthReport], *, whose: str = USERS_PROMPTS) -> Advice:
    """The depth with the lowest TPT expected with one client on users' prompts, in one sentence."""
    known = [item for item in depths if not any(math.isnan(_users_ratio(part)) for part in item["predicted"].values())]
    if not known:
        return {
            "depth": depths[0]["depth"],
            "sentence": "Too few test conversations to predict the gain: prepare with more tokens or time.",
        }
    best = min(known, key=lambda item: (_users_ratio(item["predicted"]["1"]), item["depth"]))
    predicted = best["predicted"]
    paying = [number for number, item in predicted.items() if _users_ratio(item) < PAYS]
    if not paying:
        return {
            "depth": best["depth"],
            "sentence": "These ramps do not pay on this machine: serve with --policy off, or prepare with more tokens.",
        }
    sentence = f"Use depth {best['depth']}; on {whose} expect about {_lower_tpt(predicted['1']['users'])} lower TPT"
    sentence += " with 1 client"
    several = [number for number in SEVERAL if number in predicted]
    if several:
        sentence += "".join(f", {_lower_tpt(predicted[number]['users'])} with {number}" for number in several)
    sentence += f"; on prompts like its own {_lower_tpt(predicted['1'])} with 1 client"
    kinds = sorted(best["by_kind"], key=lambda kind: best["by_kind"][kind])
    if len(kinds) > 1:
        sentence += f". The gain is largest for {KIND_NAMES[kinds[-1]]}, smallest for {KIND_NAMES[kinds[0]]}"
    return {"depth": best["depth"], "sentence": sentence + "."}


def _users_ratio(predicted: Predicted) -> float:
    """Expected on users' prompts; no number where it is not known."""
    ratio = predicted["users"]["tpt_ratio"]
    return math.nan if ratio is None else ratio


def _lower_tpt(predicted: TptRatio) -> str:
    """`41 % (35 to 46)`."""
    ratio, interval = predicted["tpt_ratio"], predicted["ci95"]
    assert ratio is not None and interval is not None, f"nothing is known of {predicted}"
    high, low = interval
    return f"{_saved(ratio)} % ({_saved(low)} to {_saved(high)})"


def _saved(ratio: float) -> int:
    return round(100 * (1 - ratio))


def render(report: Report) -> str:
    """A page that needs nothing from elsewhere."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html").render(
        report=report,
        figures=figures(report),
        kind_names=KIND_NAMES,
        batches=list(report["profile"]["verify_ms"]),
        clients=list(report["depths"][0]["predicted"]),
    )


def figures(report: Report) -> list[tuple[str, str]]:
    """(caption, data URI of an SVG) each."""
    depths = report["depths"]
    names = [f"depth {item['depth']}" for item in depths]
    rates = [[(str(part["position"]), part["acceptance_rate"]) for part in item["positions"]] for item in depths]
    coverage = [[(100 * divergences, 100 * covered) for covered, divergences in item["coverage"]] for item in depths]
    reliability = [[point[:2] for point in item["reliability"]] for item in depths]
    errors = [f"{name}, error {item['calibration_error']:.3f}" for name, item in zip(names, depths, strict=True)]
    ratios = [[(number, value["users"]["tpt_ratio"]) for number, value in item["predicted"].items()] for item in depths]
    diagonal, level = [(0.0, 0.0), (1.0, 1.0)], [(batch, 1.0) for batch in depths[0]["predicted"]]
    return [
        _figure("Acceptance rate by position", ("position", "acceptance rate"), names, rates),
        _figure(
            "Tokens that can exit (position 0) against divergences",
            ("divergences, % of all tokens", "exits, % of all tokens"),
            names,
            coverage,
            marker="",
        ),
        _figure(
            "Calibration: what the ramp says against what happens",
            ("calibrated confidence", "agreement"),
            errors,
            reliability,
            guide=diagonal,
        ),
        _figure(
            "TPT with exits / without, expected on users' prompts",
            ("clients", "ratio"),
            names,
            ratios,
            guide=level,
        ),
    ]


def _figure(
    caption: str,
    axes: tuple[str, str],
    labels: list[str],
    lines: Sequence[Line],
    *,
    guide: Line | None = None,
    marker: str = "o",
) -> tuple[str, str]:
    """One line of points (x, y) for each label, a dashed `guide` behind them."""

    def draw(ax: Axes) -> None:
        if guide:
            ax.plot(*zip(*guide, strict=True), "--", color=GREY, linewidth=1)
        for color, label, points in zip(cycle(COLORS), labels, lines, strict=False):
            x, y = zip(*points, strict=True) if points else ((), ())
            ax.plot(x, [math.nan if value is None else value for value in y], marker=marker, color=color, label=label)
        ax.set_xlabel(axes[0])
        ax.set_ylabel(axes[1])
        ax.set_ylim(0, 1.05 * ax.get_ylim()[1])  # a margin of the range is too little where that is small

    return caption, data_uri(draw)
