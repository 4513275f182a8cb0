"""What a start found of its batch invariance, kept for `doctor`: one small file for each model and dtype."""

import json
from pathlib import Path
from typing import Any

from apparate_llm.files import write_atomically

FOLDER = "batch_invariance"  # in the cache folder


def keep(cache: Path, model: str, dtype: str, num_threads: int, sentence: str, holds: bool) -> None:
    """Raises OSError where it cannot be written."""
    folder = cache / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    found = {"model": model, "dtype": dtype, "threads": num_threads, "sentence": sentence, "holds": holds}
    write_atomically(folder / f"{model}-{dtype}-{num_threads}.json", json.dumps(found).encode())


def kept(cache: Path) -> list[dict[str, Any]]:
    """Of every model that was started here; a damaged file is left out."""
    found = []
    for path in sorted((cache / FOLDER).glob("*.json")):
        try:
            one = json.loads(path.read_text())
            found.append({name: one[name] for name in ("model", "dtype", "threads", "sentence", "holds")})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
