"""Models by their names on a Hugging Face hub: in huggingface_hub's own cache, by its token and its offline rules."""

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging import CRITICAL
from pathlib import Path

from rich.console import Console

from apparate_llm.config import ConfigError
from apparate_llm.lifeline import ended_at_once
from apparate_llm.progress import Progress, on_terminal

CONFIG = "config.json"
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")  # all but weights
LEFT_OUT = ("onnx/*", "openvino/*", "original/*", "checkpoint-*/*", "runs/*")
NO_WEIGHTS = ("*/*", "training_args.bin", "optimizer.*", "scheduler.*")
MISTRAL, SAFETENSORS, PICKLED = "consolidated*.safetensors", "*.safetensors", ("*.bin", "*.pt")
INDEX = "model.safetensors.index.json"
# vLLM's --load-format -> the weights that it looks for, the first that there are; other formats: as `hf`.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "auto": (MISTRAL, SAFETENSORS, *PICKLED),
    "hf": (SAFETENSORS, *PICKLED),
    "mistral": (MISTRAL,),
    "npcache": ("*.bin",),
    "pt": ("*.pt",),
}
DUMMY = "dummy"  # the format that reads no weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How a name is looked up. The first four are vLLM's flags of these names."""

    revision: str | None = None
    download_dir: str | None = None  # in the place of huggingface_hub's cache
    hf_token: str | bool | None = None  # None, True: the one that huggingface_hub finds
    load_format: str = "auto"
    with_exits: bool = True  # which want safetensors


def fetch_model(name: str, origin: Origin, check: Callable[[Path], None]) -> Path:
    """Folder of ORG/MODEL with all that serving needs, weights last. check: is given the folder before them, and may
    raise. Raises ConfigError with one line on why it cannot be had."""
    with _showing(name):
        folder = _snapshot(name, origin, SMALL, LEFT_OUT, may_lack_some=True)
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"{name} has no {CONFIG}; if it has GGUF files, name one: {name}:Q4_K_M")
        check(folder)
        if origin.load_format == DUMMY:
            return folder
        pinned = replace(origin, revision=folder.name)
        for patterns in weights_of(folder, origin):
            _snapshot(name, pinned, patterns, NO_WEIGHTS)
            if any(file for pattern in patterns for file in folder.glob(pattern)):
                return folder
    needs = "early exits read weights as safetensors" if origin.with_exits else f"--load-format {origin.load_format}"
    raise ConfigError(f"{name} has no weights to load ({needs})")


def fetch_gguf(name: str, kind: str, origin: Origin) -> Path:
    """The one GGUF file of ORG/MODEL with weights of this kind, such as Q4_K_M. Raises ConfigError."""
    patterns = sorted({f"*[-._]{spelt}.gguf" for spelt in (kind, kind.upper(), kind.lower())})
    with _showing(name):
        folder = _snapshot(name, origin, patterns)
    files = sorted({file for pattern in patterns for file in folder.rglob(pattern)})
    if len(files) != 1:
        several = ", ".join(str(file.relative_to(folder)) for file in files) or "none"
        raise ConfigError(f"{name}:{kind}: one GGUF file named so is wanted, got {several}")
    return files[0]


def weights_of(folder: Path, origin: Origin) -> Iterator[Sequence[str]]:
    """Patterns of weight files to try, one after the other."""
    for pattern in WEIGHTS.get(origin.load_format, WEIGHTS["hf"]):
        if not (origin.with_exits and pattern in PICKLED):
            yield (_indexed(folder) or (pattern,)) if pattern == SAFETENSORS else (pattern,)


def _indexed(folder: Path) -> tuple[str, ...]:
    """Files that the index names; none without a readable one."""
    try:
        return tuple(sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def _snapshot(
    name: str, origin: Origin, patterns: Sequence[str], left_out: Sequence[str] = (), *, may_lack_some: bool = False
) -> Path:
    """The snapshot's folder with its files of these patterns. may_lack_some: in a cache that others filled, where the
    hub cannot be asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client it is built on

    try:
        folder = snapshot_download(
            name,
            revision=origin.revision,
            cache_dir=origin.download_dir,
            token=origin.hf_token,
            allow_patterns=[*patterns],
            ignore_patterns=[*left_out],
            library_name="apparate-llm",
        )
        return Path(folder)
    except (HTTPError, OSError, ValueError) as error:
        partial = getattr(error, "snapshot_path", None)
        if may_lack_some and partial is not None and (Path(partial) / CONFIG).is_file():
            return Path(partial)
        raise ConfigError(problem_of(name, origin, error)) from None


def problem_of(name: str, origin: Origin, error: Exception) -> str:
    """One line on why huggingface_hub has not brought the model."""
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, origin.download_dir or constants.HF_HUB_CACHE
    cause = error
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        cause = error.__cause__
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"{name}: no such folder, not complete in the cache {cache}, and HF_HUB_OFFLINE allows no download"
    if isinstance(cause, errors.GatedRepoError):
        return f"{name} is gated: ask for access at {hub}/{name}, then set HF_TOKEN or run `hf auth login`"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"{name}: no such folder, and no such model on {hub}, or a private one: set HF_TOKEN if it is yours"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{name} has no revision {origin.revision}"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        hint = ": is the token right (HF_TOKEN)?" if status in (401, 403) else ""
        return f"{name}: {hub} answers HTTP {status}{hint}"
    if isinstance(cause, OSError) and cause.strerror is not None:
        return f"cannot write {name} to {cache}: {cause.strerror}"
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
    if isinstance(cause, ValueError | OSError):
        return f"{name}: {reason}"
    return f"{name}: no such folder, not complete in the cache {cache}, and {hub} cannot be reached ({reason})"


@contextmanager
def _showing(name: str) -> Iterator[None]:
    """huggingface_hub's bars on a terminal, a line every half minute in a log. Its warnings are ours to say."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    console, verbosity = Console(file=sys.stderr), logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        with warnings.catch_warnings(), ended_at_once():
            warnings.simplefilter("ignore")
            if on_terminal(console):
                yield
                return
            disable_progress_bars()
            with Progress(console) as progress, progress.stage(f"download {name}", total=math.inf, often_brief=True):
                yield
    finally:
        logging.set_verbosity(verbosity)
