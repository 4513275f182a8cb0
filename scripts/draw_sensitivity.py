#!/usr/bin/env python3
"""How much the policies depend on their constants, on the shipped feedback logs: python -m scripts.draw_sensitivity
OUT.svg

Each line varies one constant, in multiples of its default; the accuracy bound is 0.05.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apparate_llm.config import EarlyExitConfig, PolicyName
from apparate_llm.controller.feedback import LoggedStep, read_header, read_steps
from apparate_llm.controller.policies import make_policy
from apparate_llm.controller.replay import LogCosts, replay
from apparate_llm.replay import shipped_logs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BOUND = 0.05
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# policy, constant, default
CONSTANTS: tuple[tuple[PolicyName, str, float], ...] = (
    ("apparate", "window", 16),
    ("apparate", "adjust_every", 128),
    ("adaptive", "max_regret_nats", 1.0),
    ("adaptive", "memory_verdicts", 100.0),
)


def sweep(steps: list[LoggedStep], costs: LogCosts, num_layers: int) -> dict[str, list[tuple[float, float, float]]]:
    """Line -> (factor, TPT ratio, divergence share) of each point."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    depths = tuple(sorted(costs.draft_steps))
    for name, constant, default in CONSTANTS:
        config = EarlyExitConfig(policy=name, accuracy_bound=BOUND, max_batch_tokens=64)
        points = []
        for factor in FACTORS:
            varied: dict[str, Any] = {constant: type(default)(default * factor)}
            policy = make_policy(config, depth=depths[0], depths=depths, num_layers=num_layers, **varied)
            result = replay(steps, costs, policy, accuracy_bound=BOUND, kind="agreement")
            points.append((factor, result.tpt_ratio, result.divergence_frac))
        lines[f"{name}: {constant} ({default:g})"] = points
    return lines


def draw_line(ax: "Axes", points: list[tuple[float, float]], label: str) -> None:
    ax.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = shipped_logs()
    figure, axes = pyplot.subplots(
        2, len(logs), figsize=(5 * len(logs), 6.5), sharex=True, squeeze=False, layout="constrained"
    )
    for column, (name, path) in enumerate(logs.items()):
        steps = list(read_steps(path))
        for label, points in sweep(steps, LogCosts(steps), read_header(path)["num_layers"]).items():
            draw_line(axes[0][column], [(factor, tpt) for factor, tpt, _ in points], label)
            draw_line(axes[1][column], [(factor, 100 * share) for factor, _, share in points], label)
            print(name, label, " ".join(f"x{f:g}: {tpt:.3f}/{share:.3f}" for f, tpt, share in points), flush=True)
        axes[0][column].set_title(name)
        axes[1][column].set_xlabel("constant / default")
        axes[1][column].set_xscale("log", base=2)
        axes[1][column].axhline(100 * BOUND, color="grey", linestyle=":")
    axes[0][0].set_ylabel("time per output token / plain")
    axes[1][0].set_ylabel("divergent tokens, %")
    axes[0][0].legend(fontsize=8)
    figure.savefig(Path(sys.argv[1]), metadata={"Date": None} if sys.argv[1].endswith(".svg") else None)


if __name__ == "__main__":
    main()
