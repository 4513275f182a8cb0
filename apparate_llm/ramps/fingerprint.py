"""Which base model a ramp folder belongs to: a hash over its checkpoint as stored on disk."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

SAMPLE_VALUES = 1024


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


def checkpoint_tensors(model_dir: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of every *.safetensors file in a model folder."""
    from safetensors import safe_open

    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors file in {model_dir}")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, tensors.get_tensor(name)


def fingerprint_of(model_dir: Path) -> str:
    fingerprint = Fingerprint()
    for name, tensor in checkpoint_tensors(model_dir):
        fingerprint.add(name, tensor)
    return fingerprint.hexdigest()
