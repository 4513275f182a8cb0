"""From a ramp folder to a ramp that predicts."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from apparate_llm.ramps.checkpoint import VOCABULARY, WEIGHTS, RampError, RampManifest, load_tensors
from apparate_llm.ramps.heads import BASE_WEIGHTS, HEADS, Head, LookupFeature


class Proposals(NamedTuple):
    """What the lookup feature proposes for each row, see ramps/lookup.py."""

    tokens: torch.Tensor  # [num_tokens] int64
    lengths: torch.Tensor  # [num_tokens] int64
    embedding: torch.Tensor  # [num_tokens, hidden_size] of the tokens


class Prediction(NamedTuple):
    token_ids: torch.Tensor  # [num_tokens] int64, ids of the base model's vocabulary
    confidences: list[float]  # [num_tokens] calibrated probability of agreeing with the full model
    state: torch.Tensor  # [num_tokens, hidden_size] input state of the next draft step


class RampSet(nn.Module):
    """The ramp in use: one head at one depth with its vocabulary and calibration."""

    vocabulary: torch.Tensor  # [ramp_vocab] int64
    in_vocabulary: torch.Tensor  # [vocab of the base model] bool
    head: Head

    def __init__(
        self,
        *,
        head: Head,
        vocabulary: torch.Tensor,
        base_vocab: int,
        depth: int,
        aux_layers: tuple[int, ...],
        calibration: list[tuple[float, float]],
    ) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        in_vocabulary = torch.zeros(base_vocab, dtype=torch.bool)
        in_vocabulary[vocabulary] = True
        self.register_buffer("in_vocabulary", in_vocabulary, persistent=False)
        self.depth = depth
        self.aux_layers = aux_layers
        self.calibration = calibration

    def predict(
        self, hidden: torch.Tensor, state: torch.Tensor, proposals: Proposals | None, *, draft_step: int
    ) -> Prediction:
        """The ramp's token and confidence for each row.

        hidden, state: as for the head (ramps/heads.py); proposals: needed where the head reads the lookup feature;
        draft_step: counts from 0 and selects the calibration.
        """
        lookup = None
        if proposals is not None:
            outside = (proposals.lengths > 0) & ~self.in_vocabulary[proposals.tokens]
            lookup = LookupFeature(proposals.embedding, proposals.lengths, outside)
        scores, state = self.head(hidden, state, lookup)
        # By numpy, which takes a fraction of torch's time for so little.
        values = scores.float().numpy()
        best = values.argmax(axis=1)
        log_probability = -np.log(np.exp(values - values.max(axis=1, keepdims=True)).sum(axis=1))
        scale, offset = self.calibration[min(draft_step, len(self.calibration) - 1)]
        return Prediction(
            token_ids=self._tokens(torch.from_numpy(best), proposals),
            confidences=[calibrated(value, scale, offset) for value in log_probability.tolist()],
            state=state,
        )

    def _tokens(self, columns: torch.Tensor, proposals: Proposals | None) -> torch.Tensor:
        tokens = self.vocabulary[columns.clamp(max=len(self.vocabulary) - 1)]
        if proposals is None:
            return tokens
        return torch.where(columns == len(self.vocabulary), proposals.tokens, tokens)


def calibrated(log_probability: float, scale: float, offset: float) -> float:
    """sigmoid(scale * logit(p) + offset) for p = exp(log_probability)."""
    p = min(max(math.exp(log_probability), 1e-6), 1.0 - 1e-6)
    logit = scale * math.log(p / (1.0 - p)) + offset
    return 1.0 / (1.0 + math.exp(-logit)) if logit > -700.0 else 0.0  # exp would overflow


def calibrated_all(confidence: torch.Tensor, scale: float, offset: float) -> torch.Tensor:
    """`calibrated` of probabilities [n], not of their logarithms."""
    return torch.sigmoid(scale * torch.logit(confidence.double(), eps=1e-6) + offset)


def load_ramps(
    folder: Path, manifest: RampManifest, *, depth: int, base_weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> RampSet:
    """Build the ramp of one depth. `base_weights`: the base model's `norm` [H] and `head` [vocab, H]."""
    tensors = load_tensors(folder)
    head = HEADS[manifest.kind](manifest.head_shape())
    try:
        vocabulary = tensors[VOCABULARY].long()
        values = {
            name: tensors[f"{depth}.{name}"]
            for name, _ in head.named_parameters()
            if name not in BASE_WEIGHTS[manifest.kind]
        }
    except KeyError as error:
        raise RampError(f"damaged {folder / WEIGHTS}: no tensor {error}") from None
    for name in BASE_WEIGHTS[manifest.kind]:
        values[name] = base_weights["head"][vocabulary] if name == "head" else base_weights[name]
    head.to(dtype).eval()
    for name, parameter in head.named_parameters():
        if values[name].shape != parameter.shape:
            raise RampError(
                f"damaged {folder / WEIGHTS}: {name} has shape {tuple(values[name].shape)}, "
                f"expected {tuple(parameter.shape)}"
            )
        parameter.data.copy_(values[name])
        if not torch.isfinite(parameter).all():
            raise RampError(f"damaged {folder / WEIGHTS}: {name} of depth {depth} holds values that are not finite")
    return RampSet(
        head=head,
        vocabulary=vocabulary,
        base_vocab=manifest.base_model.vocab_size,
        depth=depth,
        aux_layers=tuple(manifest.aux_layers),
        calibration=manifest.calibration[depth],
    )
