"""GGUF files as folders that vLLM serves: converted once, by transformers, and kept."""

import io
import re
import shutil
from contextlib import redirect_stderr
from logging import CRITICAL
from pathlib import Path
from typing import Any, NamedTuple

from apparate_llm.config import ConfigError
from apparate_llm.machine import available_memory_bytes, cache_folder, writable_cache
from apparate_llm.ramps.checkpoint import sha256_of
from apparate_llm.sealed import is_complete, made_once

FOLDER = "gguf"  # in the cache folder
MAGIC = b"GGUF"
PART = re.compile(r"-\d{5}-of-\d{5}$")  # end of the name of one file of several
LONGEST_STEM = 200  # letters of a file's name that its folder's keeps
NO_ARCHITECTURES = {"general", "tokenizer"}  # parts of a file, in transformers' table of architectures
BYTES_PER_WEIGHT = 2  # bfloat16, on disk
PEAK_BYTES_PER_WEIGHT = 4  # in memory: the weights that are read, and the model that takes them


class GgufError(ValueError):
    """A GGUF file that cannot be converted. The message is one line for the user."""


class Contents(NamedTuple):
    """What the conversion must know of a file."""

    num_weights: int
    head_dim: int | None  # None: as the architecture has it


def check_gguf(file: Path) -> None:
    """What a first look can say; raises GgufError."""
    with file.open("rb") as opened:
        begins = opened.read(len(MAGIC))
    if begins != MAGIC:
        raise GgufError(f"neither a model folder nor a GGUF file, which begins with {MAGIC!r}: {file}")
    if PART.search(file.stem):
        raise GgufError(f"{file} is one of several files: join them first (llama-gguf-split --merge)")


def gguf_folder(file: Path) -> Path:
    """Folder of the file's model, converted on the first call, known by the file's content. Raises GgufError,
    ConfigError where it cannot be written."""
    check_gguf(file)
    name = f"{file.stem[:LONGEST_STEM]}-{sha256_of(file)[:16]}"
    folder = cache_folder() / FOLDER / name
    if is_complete(folder):  # in a cache that need not be writable
        return folder
    writable_cache()
    return convert_once(file, folder, file.name)


def convert_once(source: Path, folder: Path, name: str) -> Path:
    """The folder, whole. name: of the work, as it is told of meanwhile."""
    facts = f"converting once to {folder}"
    return made_once(folder, lambda work, stage: convert(source, work), name=name, facts=facts)


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF model as bf16 safetensors with tokenizer and chat template. Raises GgufError, ConfigError."""
    from safetensors import SafetensorError

    contents = contents_of(gguf)
    check_room(contents.num_weights, out)
    try:
        tokenizer, model = _loaded(gguf, contents.head_dim)
    except Exception as error:  # each reader of a damaged file fails in its own way
        raise GgufError(f"cannot convert {gguf}: {_short(error)}") from None
    if (num_weights := sum(parameter.numel() for parameter in model.parameters())) != contents.num_weights:
        raise GgufError(
            f"cannot convert {gguf}: transformers makes a model of {num_weights:,} weights of it, and it has "
            f"{contents.num_weights:,}"
        )
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write the converted model to {out.parent}: {_short(error)}") from None


def contents_of(gguf: Path) -> Contents:
    """Raises GgufError for a file that is damaged, or has what its conversion would leave out."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        reader = GGUFReader(gguf)
        architecture = str(reader.fields["general.architecture"].contents())
        scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
        scaled = scaling is not None and scaling.contents() != "none"
        key_length = reader.fields.get(f"{architecture}.attention.key_length")
        head_dim = None if key_length is None else int(key_length.contents())
        tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    except Exception as error:  # no two kinds of damage are the same to the reader
        raise GgufError(f"damaged GGUF file {gguf}: {_short(error)}") from None
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise GgufError(
            f"transformers converts no GGUF files of architecture {architecture} "
            f"(it does: {', '.join(sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - NO_ARCHITECTURES))}): {gguf}"
        )
    if scaled or "rope_freqs.weight" in tensors:
        raise GgufError(
            f"cannot convert {gguf}: it scales positions (RoPE), which transformers leaves out: name the folder or the "
            "hub's name of the model that it was made of"
        )
    return Contents(sum(tensors.values()), head_dim)


def check_room(num_weights: int, out: Path) -> None:
    """Raises ConfigError where disk or memory is too small."""
    for what, needed, free in (
        (f"free on the disk of {out.parent}", BYTES_PER_WEIGHT * num_weights, shutil.disk_usage(out).free),
        ("of free memory", PEAK_BYTES_PER_WEIGHT * num_weights, available_memory_bytes()),
    ):
        if free < needed:
            raise ConfigError(
                f"the conversion needs {needed / 2**30:.1f} GiB {what}, and there are {free / 2**30:.1f} GiB"
            )


def _loaded(gguf: Path, head_dim: int | None) -> tuple[Any, Any]:
    """(tokenizer, model), nothing said meanwhile."""

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):  # one bar cannot be disabled
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            config: Any = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            if head_dim is not None and hasattr(config, "head_dim"):  # transformers reads it for some families only
                config.head_dim = head_dim
            model: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, config=config, dtype=torch.bfloat16
            )
    finally:
        logging.set_verbosity(verbosity)
    # The weights are plain now; transformers still remembers that they came quantized.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    return tokenizer, model


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
