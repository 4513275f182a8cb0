"""Ramp heads: one depth's hidden state -> next token of the ramp vocabulary.

Every head is called as `head(hidden, state)`:
    hidden [num_rows, hidden_size]  residual stream of the newest token after `depth` blocks (depth 0: its embedding)
    state  [num_rows, hidden_size]  full-depth hidden state (after the final norm) of the token before it, or from the
                                    second round on, the head's own output state
and returns (scores [num_rows, ramp_vocab], output state [num_rows, hidden_size]).
"""

import torch
from torch import nn
from torch.nn import functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def empty_parameter(*shape: int) -> nn.Parameter:
    """NaN until loaded, so that a forgotten weight cannot pass unseen."""
    return nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)


class LensHead(nn.Module):
    """The model's own final norm and lm_head on the inner state (the logit lens); nothing is trained."""

    def __init__(self, *, hidden_size: int, ramp_vocab: int, eps: float, intermediate_size: int = 0) -> None:
        super().__init__()
        self.eps = eps
        self.norm = empty_parameter(hidden_size)
        self.head = empty_parameter(ramp_vocab, hidden_size)

    def forward(self, hidden: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(rms_norm(hidden, self.norm, self.eps), self.head), state


class FusedHead(nn.Module):
    """Trained head: reads the inner state together with the previous full-depth state and predicts the next one.

    Its output state stands for the full-depth state it predicts, so it can take that state's place in the next round
    (as the EAGLE draft head does, Li et al., ICML 2024, but without attention of its own).
    """

    def __init__(self, *, hidden_size: int, ramp_vocab: int, eps: float, intermediate_size: int) -> None:
        super().__init__()
        self.eps = eps
        self.norm_hidden = empty_parameter(hidden_size)
        self.norm_state = empty_parameter(hidden_size)
        self.fuse = empty_parameter(hidden_size, 2 * hidden_size)
        self.norm_mlp = empty_parameter(hidden_size)
        self.gate_up = empty_parameter(2 * intermediate_size, hidden_size)
        self.down = empty_parameter(hidden_size, intermediate_size)
        self.norm = empty_parameter(hidden_size)
        self.head = empty_parameter(ramp_vocab, hidden_size)

    def forward(self, hidden: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat(
            [rms_norm(hidden, self.norm_hidden, self.eps), rms_norm(state, self.norm_state, self.eps)], dim=-1
        )
        fused = F.linear(both, self.fuse)
        gate, up = F.linear(rms_norm(fused, self.norm_mlp, self.eps), self.gate_up).chunk(2, dim=-1)
        out = fused + F.linear(F.silu(gate) * up, self.down)
        state = rms_norm(out, self.norm, self.eps)
        return F.linear(state, self.head), state


HEADS: dict[str, type[nn.Module]] = {"lens": LensHead, "fused": FusedHead}

# Weights that come out of the base model instead of the ramp folder: `head` is rows of its lm_head; a lens also takes
# the final norm.
BASE_WEIGHTS: dict[str, tuple[str, ...]] = {"lens": ("norm", "head"), "fused": ("head",)}
