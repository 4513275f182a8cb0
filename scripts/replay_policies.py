#!/usr/bin/env python3
"""The policies on a feedback log, for the table in docs/controller.md:

    python -m scripts.replay_policies LOG OUT        # e.g. smollm2-135m docs/results/replay-smollm2.json

LOG is a shipped log or a file. A policy whose speed hangs on its settings is tried with several; all are in the result.
Then `python -m scripts.results_table` writes the table anew.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from apparate_llm.config import EarlyExitConfig, PolicyName
from apparate_llm.controller.feedback import read_header, read_steps
from apparate_llm.controller.replay import LogCosts
from apparate_llm.replay import Row, find_log, one_row, oracle_row

BOUNDS = (0.01, 0.05)
MOST_EXITS = 4  # that the shipped logs hold of a step
ROWS = (4, 1024)  # values of max_batch_tokens: its default, and no limit
THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 0.99)
SETTINGS: dict[PolicyName, list[dict[str, object]]] = {
    "adaptive": [{}],
    "static": [
        {"max_exits": MOST_EXITS, "max_batch_tokens": rows, "threshold": threshold}
        for rows in ROWS
        for threshold in THRESHOLDS
    ],
    "apparate": [{"max_exits": MOST_EXITS, "max_batch_tokens": rows} for rows in ROWS],
}


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    log, out = argv
    try:
        rows = rows_of(find_log(log))
    except (OSError, ValueError) as error:
        print(f"cannot replay {log}: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "scripts.replay_policies", log, out])
    Path(out).write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    print(f"kept: {out}")
    return 0


def rows_of(path: Path) -> list[Row]:
    """Lossless and the oracle's first, then every setting of every policy with each bound."""
    num_layers, steps = read_header(path)["num_layers"], list(read_steps(path))
    costs, lossless = LogCosts(steps), EarlyExitConfig(accuracy_bound=0.0)
    rows = [one_row(lossless, {}, num_layers, steps, costs), oracle_row(lossless, steps, costs)]
    for bound in BOUNDS:
        for policy, settings in SETTINGS.items():
            config = EarlyExitConfig(policy=policy, accuracy_bound=bound)
            rows += [one_row(config, parameters, num_layers, steps, costs) for parameters in settings]
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
