"""Which rows of a pass are read after its last block, and the pass without the others there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from apparate_llm.engine.verdicts import PendingVerdict
from apparate_llm.models.last_block import READ_ROWS, read_last_block

MIN_SAVED = 16  # rows; for fewer, attention metadata of the last block's own is not made


class LastBlock:
    def __init__(self, runner: Any, layer_name: str) -> None:
        """layer_name: of the last block's attention."""
        self.runner = runner
        self.layer_name = layer_name
        self.rows: torch.Tensor | None = None  # that the pass under way reads, int64 [num_read]; None: all
        self._query_start = torch.zeros(0)

    def scheduled(self, num_logits: int, num_drafts: list[int] | None, pending: list[PendingVerdict]) -> None:
        """A step is prepared: of each request the rows from its first logits on are read."""
        runner, self.rows = self.runner, None
        bounds = runner.query_start_loc.np[: runner.input_batch.num_reqs + 1]
        if bounds[-1] - num_logits < MIN_SAVED or runner.num_prompt_logprobs:
            return
        first = bounds[1:] - 1 - np.array(num_drafts or 0)
        rows = np.array([item.row for item in pending], dtype=np.int64)
        np.minimum.at(first, np.searchsorted(bounds, rows, side="right") - 1, rows)
        num_read = bounds[1:] - first
        query_start = np.concatenate([[0], num_read.cumsum()])
        if bounds[-1] - query_start[-1] >= MIN_SAVED:
            shift = np.repeat(first - query_start[:-1], num_read)
            self.rows = torch.from_numpy(np.arange(query_start[-1]) + shift)
            self._query_start = torch.from_numpy(query_start.astype(np.int32))

    def run(self, forward: Callable[[], Any]) -> Any:
        """What `forward`, vLLM's pass, returns, with zeros for final states that nobody reads."""
        context, rows = get_forward_context(), self.rows
        assert rows is not None and isinstance(context.attn_metadata, dict)
        stock = context.attn_metadata
        try:
            context.attn_metadata = {**stock, self.layer_name: self._metadata(stock[self.layer_name])}
            context.additional_kwargs[READ_ROWS] = rows
            output = forward()
        finally:
            context.attn_metadata = stock
            context.additional_kwargs.pop(READ_ROWS, None)
        states, *others = output if isinstance(output, tuple) else (output,)
        assert len(states) == len(rows), f"the last block gave {len(states)} rows for {len(rows)}"
        final = states.new_zeros(int(self.runner.query_start_loc.np[self.runner.input_batch.num_reqs]), states.shape[1])
        final[rows] = states
        return (final, *others) if others else final

    def _metadata(self, stock: Any) -> Any:
        """Attention metadata of the rows that are read; stock: of all."""
        groups = (group for groups in self.runner.attn_groups for group in groups)
        (group,) = (group for group in groups if self.layer_name in group.layer_names)
        start = self._query_start
        common = CommonAttentionMetadata(
            query_start_loc=start,
            query_start_loc_cpu=start,
            seq_lens=stock.seq_lens,
            seq_lens_cpu_upper_bound=stock.seq_lens,
            num_reqs=len(start) - 1,
            num_actual_tokens=int(start[-1]),
            max_query_len=int(start.diff().max()),
            max_seq_len=stock.max_seq_len,
            block_table_tensor=stock.block_table,
            slot_mapping=stock.slot_mapping,
            causal=True,
        )
        return group.get_metadata_builder().build(0, common)


def last_block_of(runner: Any, inner_depths: set[int]) -> LastBlock | None:
    """Of a runner that has loaded its model. None: all rows are computed there, as its state is an inner one, or as the
    block is of another make."""
    blocks = runner.get_model().model.layers
    layer_name = None if len(blocks) in inner_depths else read_last_block(blocks[-1])
    return None if layer_name is None else LastBlock(runner, layer_name)
