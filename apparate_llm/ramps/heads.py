"""Ramp heads: one depth's hidden state -> next token of the ramp vocabulary.

In a verification pass `enter` makes the state that the first draft step starts from; each of them then calls the head:
    hidden  [num_tokens, hidden_size]  residual stream of the newest token after `depth` blocks (depth 0: its embedding)
    state   [num_tokens, hidden_size]  from `enter`, or the head's own output state of the draft step before
    lookup                             what the lookup feature proposes for each row, see `LookupFeature`
-> (scores [num_tokens, ramp_vocab], and where the head reads the lookup feature one more column for the proposed token;
    output state [num_tokens, hidden_size]).
"""

from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from apparate_llm.ramps.checkpoint import HeadShape
from apparate_llm.ramps.lookup import MAX_FEATURE_LENGTH


class LookupFeature(NamedTuple):
    """The lookup feature's proposals (ramps/lookup.py) as a head reads them."""

    embedding: torch.Tensor  # [num_tokens, hidden_size] of the proposed tokens
    lengths: torch.Tensor  # [num_tokens] int64, of the n-grams that they followed; 0: no proposal
    outside: torch.Tensor  # [num_tokens] bool, proposes a token that the ramp vocabulary lacks


class Head(Protocol):
    """What every head is, as written at the top of this module."""

    reads_lookup: bool

    def enter(self, final: torch.Tensor, aux: list[torch.Tensor]) -> torch.Tensor: ...

    def __call__(
        self, hidden: torch.Tensor, state: torch.Tensor, lookup: LookupFeature | None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def empty_parameter(*shape: int) -> nn.Parameter:
    """NaN until loaded, so that a forgotten weight cannot pass unseen."""
    return nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)


class LensHead(nn.Module):
    """The model's own final norm and lm_head on the auxiliary hidden state (the logit lens); nothing is trained."""

    reads_lookup = False

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.eps = shape.eps
        self.norm = empty_parameter(shape.hidden_size)
        self.head = empty_parameter(shape.ramp_vocab, shape.hidden_size)

    def enter(self, final: torch.Tensor, aux: list[torch.Tensor]) -> torch.Tensor:
        return final

    def forward(
        self, hidden: torch.Tensor, state: torch.Tensor, lookup: LookupFeature | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(rms_norm(hidden, self.norm, self.eps), self.head), state


class FusedHead(nn.Module):
    """Trained head: reads the newest token together with what the full model made of the tokens before it.

    As in the EAGLE draft heads (Li et al., ICML 2024; EAGLE-3, 2025) the state carries over from one draft step to
    the next, and the first one joins auxiliary hidden states of several depths. There is no attention of its own: the
    lookup feature stands in, and the extra column of the scores lets the head pick its token where that is not of the
    ramp vocabulary.
    """

    reads_lookup = True
    dropout = 0.0  # while training only

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        size = shape.hidden_size
        self.eps = shape.eps
        self.enter_weight = empty_parameter(size, (1 + shape.num_aux_layers) * size)
        self.fuse = empty_parameter(size, 3 * size)
        # By length of the lookup feature's n-gram; ramp folders have it by this name.
        self.match = empty_parameter(MAX_FEATURE_LENGTH + 1, size)
        self.gate_up = empty_parameter(2 * shape.intermediate_size, size)
        self.down = empty_parameter(size, shape.intermediate_size)
        self.norm = empty_parameter(size)
        self.pointer = empty_parameter(1, size)
        self.head = empty_parameter(shape.ramp_vocab, size)

    def enter(self, final: torch.Tensor, aux: list[torch.Tensor]) -> torch.Tensor:
        """First state [num_tokens, hidden_size]: final [num_tokens, hidden_size] full-depth hidden states after the
        final norm, aux [num_tokens, hidden_size] each, residual streams of the same tokens."""
        parts = [rms_norm(part, None, self.eps) for part in (final, *aux)]
        return F.linear(torch.cat(parts, dim=-1), self.enter_weight)

    def forward(
        self, hidden: torch.Tensor, state: torch.Tensor, lookup: LookupFeature
    ) -> tuple[torch.Tensor, torch.Tensor]:
        proposed = rms_norm(lookup.embedding, None, self.eps) * (lookup.lengths > 0)[:, None]
        parts = [rms_norm(hidden, None, self.eps), rms_norm(state, None, self.eps), proposed.to(state.dtype)]
        read = F.dropout(torch.cat(parts, dim=-1), self.dropout, self.training)
        fused = F.linear(read, self.fuse) + F.embedding(lookup.lengths, self.match)
        gate, up = F.linear(rms_norm(fused, None, self.eps), self.gate_up).chunk(2, dim=-1)
        state = fused + F.linear(F.dropout(F.silu(gate) * up, self.dropout, self.training), self.down)
        normed = rms_norm(state, self.norm, self.eps)
        pointed = F.linear(normed, self.pointer).masked_fill(~lookup.outside[:, None], float("-inf"))
        return torch.cat([F.linear(normed, self.head), pointed], dim=-1), state


HEADS: dict[str, type[LensHead] | type[FusedHead]] = {"lens": LensHead, "fused": FusedHead}

# Weights that come out of the base model instead of the ramp folder: `head` is rows of its lm_head; a lens also takes
# the final norm.
BASE_WEIGHTS: dict[str, tuple[str, ...]] = {"lens": ("norm", "head"), "fused": ("head",)}
