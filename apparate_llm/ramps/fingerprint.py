"""Which base model a ramp folder belongs to: a hash over its checkpoint as stored on disk."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch

SAMPLE_VALUES = 1024
MISTRAL_FILES = "consolidated*.safetensors"
# What Mistral's own files call the tensors that ramps need -> their names in all others.
MISTRAL_NAMES = {
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "tok_embeddings.weight": "model.embed_tokens.weight",
}


class WeightsError(ValueError):
    """A model folder whose weights cannot be read. The message is one line for the user."""


class Fingerprint:
    """Fed every (name, tensor) of a checkpoint in any order; names, shapes, dtypes and first values count."""

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        sample = tensor.flatten()[:SAMPLE_VALUES].contiguous().cpu().view(torch.uint8).numpy().tobytes()
        header = f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode()
        self._parts[name] = hashlib.sha256(header + sample).digest()

    def hexdigest(self) -> str:
        whole = hashlib.sha256()
        for name in sorted(self._parts):
            whole.update(self._parts[name])
        return whole.hexdigest()[:32]


def weight_files(model_dir: Path, load_format: str = "auto") -> list[Path]:
    """The files that vLLM loads of a model folder, see `DefaultModelLoader._prepare_weights`: Mistral's own format
    where there is any of it, and of several files those that the index names. Raises WeightsError."""
    if load_format == "auto" and any(model_dir.rglob(MISTRAL_FILES)):
        load_format = "mistral"
    pattern, index_name = "*.safetensors", "model.safetensors.index.json"
    if load_format == "mistral":
        pattern, index_name = MISTRAL_FILES, "consolidated.safetensors.index.json"
    files = set(model_dir.glob(pattern))
    if not files:
        others = sorted(path.name for ending in ("*.bin", "*.pt", "*.gguf") for path in model_dir.glob(ending))
        hint = f" (but {others[0]})" if others else ""
        raise WeightsError(f"no {pattern} file in {model_dir}{hint}: early exits read weights as safetensors only")
    index = model_dir / index_name
    if index.is_file():
        try:
            named = {model_dir / file for file in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"damaged {index}: {type(error).__name__}: {error}") from None
        if missing := sorted(path.name for path in named - files):
            raise WeightsError(f"{index} names files that are missing: {', '.join(missing)}")
        files = named
    return sorted(files)


def checkpoint_tensors(model_dir: Path, load_format: str = "auto") -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of a model folder, as vLLM loads it; raises WeightsError."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(model_dir, load_format):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise WeightsError(f"damaged {file}: {error}") from None


def fingerprint_of(model_dir: Path, load_format: str = "auto") -> str:
    fingerprint = Fingerprint()
    for name, tensor in checkpoint_tensors(model_dir, load_format):
        fingerprint.add(name, tensor)
    return fingerprint.hexdigest()
