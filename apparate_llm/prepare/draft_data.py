"""What a head in training, or one that is measured, reads of the rows and of the base model."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from apparate_llm.prepare.rows import LEAD, TRAIN, Rows
from apparate_llm.ramps.heads import Head, LookupFeature

VOCABULARY_CHUNK = 1 << 18  # rows looked at together


class BaseParts(NamedTuple):
    """What training needs of the frozen base model."""

    embedding: torch.Tensor  # [vocab, H]
    lm_head: torch.Tensor  # [vocab, H]
    norm: torch.Tensor  # [H] final norm weight
    eps: float

    @classmethod
    def of(cls, model_dir: Path) -> "BaseParts":
        """Read the parts from a model folder."""
        from apparate_llm.ramps.base_weights import BaseWeights

        weights = BaseWeights.of(model_dir)
        config = json.loads((model_dir / "config.json").read_text())
        return cls(weights.embedding(), weights.head(), weights.norm, config["rms_norm_eps"])


def ramp_vocabulary(rows: Rows, size: int) -> torch.Tensor:
    """The `size` tokens with the most probability under the full model in training rows, sorted by id."""
    wanted = torch.zeros(0, dtype=torch.float64)
    for index in starts(rows, split=TRAIN).split(VOCABULARY_CHUNK):
        tokens, probabilities = rows.top_ids[index].long().flatten(), rows.top_logprobs[index].double().exp().flatten()
        counted = torch.bincount(tokens, weights=probabilities, minlength=len(wanted))
        counted[: len(wanted)] += wanted
        wanted = counted
    return wanted.topk(min(size, len(wanted))).indices.sort().values


def starts(rows: Rows, *, split: int) -> torch.Tensor:
    """Rows in which a first draft step can run: those of answers."""
    return torch.nonzero((rows.answer_index > LEAD) & (rows.split == split))[:, 0]


def thinned(index: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows, evenly spread."""
    return index[:: max(1, math.ceil(len(index) / most))]


def whole_conversations(
    rows: Rows, index: torch.Tensor, most: int, *, first: torch.Tensor | None = None, num_first: int = 0
) -> torch.Tensor:
    """Of the rows `index` those of some conversations, at most `most` rows or one conversation: a text with gaps says
    nothing of exits one after the other. They are drawn at random, `num_first` of the conversations `first` before all
    others."""
    owners, sizes = rows.conversations[index].unique(return_counts=True)
    if int(sizes.sum()) <= most:
        return index
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(0))
    if first is not None:
        is_first = torch.isin(owners[order], first.to(owners.dtype))
        is_first &= is_first.cumsum(0) <= num_first
        order = torch.cat([order[is_first], order[~is_first]])
    number = max(1, int((sizes[order].cumsum(0) <= most).sum()))
    return index[torch.isin(rows.conversations[index], owners[order[:number]])]


class DraftData:
    """Gathers one batch's inputs and targets from the rows."""

    def __init__(
        self, rows: Rows, base: BaseParts, *, depth: int, aux_layers: tuple[int, ...], vocabulary: torch.Tensor
    ) -> None:
        self.rows, self.depth, self.aux_layers = rows, depth, aux_layers
        self.embedding = base.embedding.to(rows.final.dtype)
        self.position = torch.full((base.lm_head.shape[0],), -1, dtype=torch.int64)
        self.position[vocabulary] = torch.arange(len(vocabulary))
        self.vocabulary_size = len(vocabulary)

    def enter(self, head: Head, index: torch.Tensor) -> torch.Tensor:
        """State of the first draft step in the rows `index`: that of the token before."""
        before = index - 1
        aux = [self.rows.states[depth][before] for depth in self.aux_layers]
        return head.enter(self.rows.final[before], aux)

    def inputs(self, index: torch.Tensor) -> tuple[torch.Tensor, LookupFeature]:
        """Hidden states and the lookup feature of a draft step in the rows `index`."""
        rows, embedding = self.rows, self.embedding
        if self.depth == 0:
            hidden = F.embedding(rows.tokens[index].long(), embedding)
        else:
            hidden = rows.states[self.depth][index]
        tokens, lengths = rows.lookup_tokens[index].long(), rows.lookup_lengths[index].long()
        outside = (lengths > 0) & (self.position[tokens] < 0)
        return hidden, LookupFeature(F.embedding(tokens, embedding), lengths, outside)

    def follows(self, index: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `number` places on, and whether those are of the same conversation."""
        later = (index + number).clamp(max=len(self.rows.tokens) - 1)
        return later, self.rows.conversations[later] == self.rows.conversations[index]

    def columns(self, index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Column of the scores of the rows `index` that stands for each of `tokens` [B, n], -1 for none."""
        column = self.position[tokens]
        points = (self.rows.lookup_tokens[index][:, None] == tokens) & (self.rows.lookup_lengths[index] > 0)[:, None]
        return torch.where((column < 0) & points, self.vocabulary_size, column)

    def targets(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns [B, TOP] and probabilities [B, TOP] of the full model's best tokens, 0 where there is no column."""
        column = self.columns(index, self.rows.top_ids[index].long())
        return column.clamp(min=0), self.rows.top_logprobs[index].float().exp() * (column >= 0)

    def best(self, index: torch.Tensor) -> torch.Tensor:
        """Column [B] of the full model's best token, -1 where there is none."""
        return self.columns(index, self.rows.top_ids[index, :1].long())[:, 0]
