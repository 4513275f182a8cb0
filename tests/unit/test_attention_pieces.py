"""Attention in pieces: the bits of a row do not depend on which rows of its request are computed with it."""

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from apparate_llm.engine.batch_invariance import ROWS_PER_PIECE
from apparate_llm.patches.attention_pieces import in_pieces, wrapped

HEADS, KV_HEADS, SIZE, BLOCK = 16, 8, 128, 128
LENGTH = 1100


def common_of(*spans: tuple[int, int]) -> CommonAttentionMetadata:
    """Requests with the same keys, of each the rows [first, end)."""
    start = torch.tensor([0, *torch.tensor([end - first for first, end in spans]).cumsum(0)], dtype=torch.int32)
    seq_lens = torch.tensor([end for _, end in spans], dtype=torch.int32)
    blocks = torch.arange(1, -(-LENGTH // BLOCK) + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=seq_lens,
        num_reqs=len(spans),
        num_actual_tokens=int(start[-1]),
        max_query_len=max(end - first for first, end in spans),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=blocks.repeat(len(spans), 1),
        slot_mapping=torch.zeros(int(start[-1]), dtype=torch.int64),
    )


@pytest.fixture(scope="module")
def attend():
    """attend(common, rows [num_tokens, heads, size]) with keys and values that are the same each time."""
    current_platform.import_kernels()
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(-(-LENGTH // BLOCK) + 1, KV_HEADS, 2 * BLOCK, SIZE, generator=generator).bfloat16()
    keys, values = cache.chunk(2, dim=2)

    def run(common: CommonAttentionMetadata, rows: torch.Tensor) -> torch.Tensor:
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=common.num_reqs,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=SIZE,
            seq_lens=common.seq_lens,
            dtype=torch.bfloat16,
            query_start_loc=common.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=_get_attn_isa(torch.bfloat16, BLOCK, SIZE),
            enable_kv_split=False,
        )
        out = torch.empty_like(rows)
        ops.cpu_attention_with_kv_cache(
            query=rows,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            scale=SIZE**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=common.block_table_tensor,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )
        return out

    return run


def test_a_prompt_read_at_once_in_parts_or_row_by_row_has_the_same_bits(attend):
    rows = torch.randn(LENGTH, HEADS, SIZE, generator=torch.Generator().manual_seed(1)).bfloat16()
    last = range(LENGTH - 40, LENGTH)
    alone = torch.cat([attend(common_of((row, row + 1)), rows[row : row + 1]) for row in last])
    for first in (0, 300, 1050):
        common = common_of((first, LENGTH))
        part = rows[first:].contiguous()
        in_eights = attend(in_pieces(common, ROWS_PER_PIECE), part)
        assert torch.equal(in_eights[-40:], alone), first


def test_pieces_are_the_same_rows_with_the_keys_before_them():
    pieces = in_pieces(common_of((5, 6), (10, 29), (0, 8)), 8)
    assert pieces.query_start_loc.tolist() == [0, 1, 9, 17, 20, 28]
    assert pieces.seq_lens.tolist() == [6, 18, 26, 29, 8]
    assert pieces.num_reqs == 5 and pieces.max_query_len == 8
    assert pieces.block_table_tensor.shape == (5, 9) and pieces.query_start_loc.dtype == torch.int32


def test_only_builders_that_were_told_so_and_long_causal_queries_are_cut():
    class Builder:
        def build(self, prefix, common, fast_build=False):
            return common.num_reqs

    Builder.build = wrapped(Builder.build)
    builder = Builder()
    assert builder.build(0, common_of((0, 20))) == 1
    builder.rows_per_piece = 8
    assert builder.build(0, common_of((0, 20))) == 3 and builder.build(0, common_of((3, 11))) == 1
    assert builder.build(0, common_of((0, 20)).replace(causal=False)) == 1
