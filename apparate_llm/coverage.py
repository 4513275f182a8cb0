"""What a start found of its batch invariance, kept for `doctor`: one small file for each model, dtype, threads and
kernels."""

import json
from pathlib import Path
from typing import TypedDict

from apparate_llm.files import write_atomically

FOLDER = "batch_invariance"  # in the cache folder
VLLM_KERNELS = "stock"  # what `--kernels` calls vLLM's own


class Found(TypedDict):
    """Of one start."""

    model: str
    dtype: str
    threads: int
    sentence: str
    holds: bool
    kernels: str


def keep(
    cache: Path, model: str, dtype: str, num_threads: int, sentence: str, holds: bool, kernels: str = VLLM_KERNELS
) -> None:
    """Raises OSError where it cannot be written."""
    folder = cache / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    record = Found(model=model, dtype=dtype, threads=num_threads, sentence=sentence, holds=holds, kernels=kernels)
    others = [] if kernels == VLLM_KERNELS else [kernels]
    name = "-".join([model.replace("/", "--"), dtype, str(num_threads), *others])
    write_atomically(folder / f"{name}.json", json.dumps(record).encode())


def kept(cache: Path) -> list[Found]:
    """Of every model that was started here; a damaged file is left out."""
    records = []
    for path in sorted((cache / FOLDER).glob("*.json")):
        try:
            one = {"kernels": VLLM_KERNELS} | json.loads(path.read_text())
            records.append(
                Found(
                    model=one["model"],
                    dtype=one["dtype"],
                    threads=one["threads"],
                    sentence=one["sentence"],
                    holds=one["holds"],
                    kernels=one["kernels"],
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return records
