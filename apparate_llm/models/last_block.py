"""The last block of a pass, computed only for rows that are read after it.

All that a prompt's rows leave behind are keys and values. For those of the last block its first norm and its QKV
projection are enough; attention, output projection and MLP are needed where a row gets logits: once in a prompt.
"""

from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.utils.torch_utils import direct_register_custom_op

READ_ROWS = "early_exit_read_rows"  # in the forward context: int64 [num_read]; without it all rows are read

_library = torch.library.Library("apparate_llm", "DEF")


def _read_rows(rows: torch.Tensor) -> torch.Tensor:
    """Those of `rows` [num_rows, size] that are read after the last block: [num_read, size]."""
    index = get_forward_context().additional_kwargs.get(READ_ROWS)
    return rows.clone() if index is None else rows[index]


def _read_rows_like(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The same where `like` [num_read, size] is one that has only these rows, which the compiler then knows."""
    return _read_rows(rows)


def _fake_read_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(torch.library.get_ctx().new_dynamic_size(), rows.shape[1])


def _fake_read_rows_like(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(like.shape[0], rows.shape[1])


direct_register_custom_op("read_rows", _read_rows, fake_impl=_fake_read_rows, target_lib=_library)
direct_register_custom_op("read_rows_like", _read_rows_like, fake_impl=_fake_read_rows_like, target_lib=_library)


class ReadAttention(Attention):
    """Writes the keys and values of all rows; attends from those that are read."""

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(torch.ops.apparate_llm.read_rows(query), *args, **kwargs)


class ReadNorm(RMSNorm):
    """The norm after it: of the residual stream only these rows go on."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x, torch.ops.apparate_llm.read_rows_like(residual, x))


def read_last_block(block: nn.Module) -> str | None:
    """Make a block compute only the rows that are read; returns the name of its attention layer, None for a block of
    another make, which stays as it is."""
    attention = getattr(getattr(block, "self_attn", None), "attn", None)
    norm = getattr(block, "post_attention_layernorm", None)
    if type(attention) is not Attention or type(norm) is not RMSNorm:
        return None
    attention.__class__, norm.__class__ = ReadAttention, ReadNorm
    return attention.layer_name
