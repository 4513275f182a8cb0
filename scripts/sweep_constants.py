#!/usr/bin/env python3
"""How much the policies depend on their constants, on the shipped feedback logs.

    python -m scripts.sweep_constants docs/results/sensitivity.json

Each line varies one constant, in multiples of its default. `python -m scripts.draw` makes a picture of it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from apparate_llm.config import EarlyExitConfig, PolicyName
from apparate_llm.controller.feedback import LoggedStep, read_header, read_steps
from apparate_llm.controller.policies import make_policy
from apparate_llm.controller.replay import LogCosts, replay
from apparate_llm.replay import shipped_logs

BOUND = 0.05
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# policy, constant, default
CONSTANTS: tuple[tuple[PolicyName, str, float], ...] = (
    ("apparate", "window", 16),
    ("apparate", "adjust_every", 128),
    ("adaptive", "max_regret_nats", 1.0),
    ("adaptive", "memory_verdicts", 100.0),
)


def sweep(steps: list[LoggedStep], costs: LogCosts, num_layers: int) -> dict[str, list[dict[str, float]]]:
    """Line -> its points."""
    lines: dict[str, list[dict[str, float]]] = {}
    depths = tuple(sorted(costs.draft_steps))
    for name, constant, default in CONSTANTS:
        config = EarlyExitConfig(policy=name, accuracy_bound=BOUND, max_batch_tokens=64)
        points = []
        for factor in FACTORS:
            varied = {constant: type(default)(default * factor)}
            policy = make_policy(config, depth=depths[0], depths=depths, num_layers=num_layers, parameters=varied)
            result = replay(steps, costs, policy, accuracy_bound=BOUND, kind="agreement")
            points.append(
                {
                    "factor": factor,
                    "tpt_ratio": round(result.tpt_ratio, 4),
                    "divergence_frac": round(result.divergence_frac, 5),
                }
            )
        lines[f"{name}: {constant} ({default:g})"] = points
        print(name, constant, points, flush=True)
    return lines


def main() -> None:
    out, logs = Path(sys.argv[1]), {}
    for name, path in shipped_logs().items():
        steps = list(read_steps(path))
        logs[name] = sweep(steps, LogCosts(steps), read_header(path)["num_layers"])
    result: dict[str, Any] = {
        "command": f"python -m scripts.sweep_constants {out}",
        "accuracy_bound": BOUND,
        "logs": logs,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
