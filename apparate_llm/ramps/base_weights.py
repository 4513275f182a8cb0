"""What ramps need of the model they are for, taken out of its weights as they pass by."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from apparate_llm.ramps.dequantise import dequantised
from apparate_llm.ramps.fingerprint import MISTRAL_NAMES, Fingerprint, WeightsError, checkpoint_tensors

NORM, HEAD, EMBEDDING = "model.norm", "lm_head", "model.embed_tokens"
WEIGHT = "weight"


class BaseWeights:
    """Fingerprint, final norm, head and embedding; the last two are kept as they are stored until they are asked
    for."""

    def __init__(self) -> None:
        self._fingerprint = Fingerprint()
        self._parts: dict[str, dict[str, torch.Tensor]] = {NORM: {}, HEAD: {}, EMBEDDING: {}}

    @classmethod
    def of(cls, model_dir: Path, load_format: str = "auto") -> "BaseWeights":
        """Of a model folder; raises WeightsError."""
        weights = cls()
        for _ in weights.watch(checkpoint_tensors(model_dir, load_format)):
            pass
        return weights

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights`, each looked at in passing."""
        for name, tensor in weights:
            self._fingerprint.add(name, tensor)
            layer, _, part = MISTRAL_NAMES.get(name, name).rpartition(".")
            if layer in self._parts:
                self._parts[layer][part] = tensor
            yield name, tensor

    @property
    def fingerprint(self) -> str:
        return self._fingerprint.hexdigest()

    @property
    def norm(self) -> torch.Tensor:
        """[hidden_size] of the final norm; raises WeightsError."""
        if WEIGHT not in self._parts[NORM]:
            raise WeightsError(f"the weights have no {NORM}.{WEIGHT}")
        return self._parts[NORM][WEIGHT]

    def embedding(self) -> torch.Tensor:
        """[vocab_size, hidden_size]; raises WeightsError."""
        return self._table(EMBEDDING)

    def head(self) -> torch.Tensor:
        """[vocab_size, hidden_size], the embedding where the two are tied; raises WeightsError."""
        return self._table(HEAD if self._parts[HEAD] else EMBEDDING)

    @property
    def head_is_quantised(self) -> bool:
        return not _is_plain(self._parts[HEAD] or self._parts[EMBEDDING])

    def _table(self, layer: str) -> torch.Tensor:
        parts = self._parts[layer]
        if _is_plain(parts):
            return parts[WEIGHT]
        try:
            return dequantised(parts, len(self.norm), self.norm.dtype)
        except WeightsError as error:
            raise WeightsError(f"{layer} is {error}") from None


def _is_plain(parts: dict[str, torch.Tensor]) -> bool:
    return WEIGHT in parts and parts[WEIGHT].is_floating_point() and "weight_scale" not in parts
