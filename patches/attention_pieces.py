"""wrap: vLLM's attention metadata on a CPU, in which a request's rows of one pass are one query.

The kernel takes the keys in larger or smaller portions as a query has fewer or more rows, and sums up in another order:
from some hundred keys on the bits of a row depend on how many rows of its request are computed with it. Up to eight do
not. So longer queries become several of that length here, each with the keys up to its last row.
"""

from functools import wraps
from typing import TYPE_CHECKING

import torch

from apparate_llm.patches.guard import Patch, Target, check_target

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


def wrapped(original: Target) -> Target:
    """`build(self, common_prefix_len, common_attn_metadata, fast_build=False)`, in pieces where the builder has been
    given `rows_per_piece`."""

    @wraps(original)
    def build(
        self: object, common_prefix_len: int, common_attn_metadata: "CommonAttentionMetadata", fast_build: bool = False
    ) -> object:
        size = getattr(self, "rows_per_piece", None)
        if size is not None and common_attn_metadata.causal is True and common_attn_metadata.max_query_len > size:
            common_attn_metadata = in_pieces(common_attn_metadata, size)
        return original(self, common_prefix_len, common_attn_metadata, fast_build)

    return build


def in_pieces(common: "CommonAttentionMetadata", size: int) -> "CommonAttentionMetadata":
    """The same with queries of at most `size` rows."""
    num_tokens = common.query_start_loc_cpu.diff().long()  # [num_reqs]
    num_pieces = (num_tokens + size - 1).div(size, rounding_mode="floor").clamp(min=1)
    request = torch.arange(len(num_tokens)).repeat_interleave(num_pieces)  # [pieces], as all below
    number = torch.arange(len(request)) - (num_pieces.cumsum(0) - num_pieces)[request]
    last = torch.minimum((number + 1) * size, num_tokens[request])
    seq_lens = (common.seq_lens[request] - num_tokens[request] + last).to(common.seq_lens.dtype)
    start = torch.cat([torch.zeros(1, dtype=torch.long), (last - number * size).cumsum(0)]).int()
    return common.replace(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(request),
        max_query_len=size,
        block_table_tensor=common.block_table_tensor[request],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def apply(patch: Patch) -> bool:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    if not current_platform.is_cpu():
        return False
    original = CPUAttentionMetadataBuilder.build
    if hasattr(original, "__wrapped__"):
        return False
    check_target(patch, original)
    CPUAttentionMetadataBuilder.build = wrapped(original)  # type: ignore[method-assign]
    return True
