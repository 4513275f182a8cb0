#!/usr/bin/env python3
"""A result for docs/results: python -m scripts.keep_result OUT NAME

OUT is the folder of an evaluation, or a JSON file of a script. Every absolute path in it becomes its last name, as
folders of one's own tell readers nothing. Then `python -m scripts.results_table` writes the tables anew.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from scripts.kept import RESULTS

PATH = re.compile(r"(?<![\w.:/])/[\w.+@-]+(?:/[\w.+@-]+)+/?")  # of two names at least; no part of a URL
COMMANDS = ("apparate-llm ", "python -m scripts.")


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    source, name = Path(sys.argv[1]), sys.argv[2]
    try:
        kept = kept_form(json.loads((source / "results.json" if source.is_dir() else source).read_text()))
    except (OSError, ValueError) as error:
        print(f"cannot keep {source}: {error}", file=sys.stderr)
        return 2
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"kept: {path}")
    return 0


def kept_form(result: Any) -> Any:
    """Raises ValueError where it does not say how it was made, requests failed, or a system could not run."""
    if not isinstance(result, dict) or not str(result.get("command", "")).startswith(COMMANDS):
        raise ValueError(f"a result must hold its command, which begins with {' or '.join(COMMANDS)}")
    runs = [*result.get("runs", ()), *(run for level in result.get("levels", ()) for run in level["runs"])]
    if failed := {run["system"]: run["failed"] for run in runs if run["failed"]}:
        raise ValueError(f"requests failed: {failed}")
    if skipped := result.get("skipped"):
        raise ValueError(f"systems were skipped: {skipped}")
    return without_folders(result)


def without_folders(value: Any) -> Any:
    """Names of keys stay."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return PATH.sub(lambda path: path[0].rstrip("/").rpartition("/")[2], value) if isinstance(value, str) else value


if __name__ == "__main__":
    sys.exit(main())
