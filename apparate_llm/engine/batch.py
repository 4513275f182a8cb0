"""What the rest of the package may know of the inside of vLLM's V1 model runner, and attention metadata made from it.

With `runner.py` the only module that a new runner has to be taught to.
"""

from collections.abc import Iterator

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup

from apparate_llm.exits.batch import Batch


def batch_of(runner: GPUModelRunner) -> Batch:
    inside = runner.input_batch
    number = inside.num_reqs
    return Batch(
        request_ids=inside.req_ids,
        token_ids=inside.token_ids_cpu,
        num_tokens=inside.num_tokens_no_spec[:number],
        num_prompt_tokens=inside.num_prompt_tokens[:number],
        num_computed_tokens=inside.num_computed_tokens_cpu[:number],
        first_rows=runner.query_start_loc.np[: number + 1],
        max_model_len=runner.max_model_len,
    )


def shorten(runner: GPUModelRunner, index: int, num_tokens: int) -> None:
    """Take tokens off the end of a request's text, in the batch and in its output."""
    batch = runner.input_batch
    state = runner.requests[batch.req_ids[index]]
    del state.output_token_ids[num_tokens - state.num_prompt_tokens :]
    batch.num_tokens_no_spec[index] = num_tokens


def append_tokens(runner: GPUModelRunner, index: int, tokens: list[int]) -> None:
    """Put tokens at the end of a request's text, as vLLM's bookkeeping does with sampled ones."""
    batch = runner.input_batch
    start = int(batch.num_tokens_no_spec[index])
    end = start + len(tokens)
    assert end <= runner.max_model_len, f"released past the context: {end} > {runner.max_model_len}"
    batch.token_ids_cpu[index, start:end] = tokens
    batch.is_token_ids[index, start:end] = True
    batch.num_tokens_no_spec[index] = end
    runner.requests[batch.req_ids[index]].output_token_ids.extend(tokens)


def attention_groups(runner: GPUModelRunner) -> Iterator[AttentionGroup]:
    """Layers that share attention metadata; made by vLLM when it has its KV cache."""
    for groups in runner.attn_groups:
        yield from groups


def block_size(runner: GPUModelRunner) -> int:
    """Tokens in a block of the KV cache, as the kernel of the first group of layers has it."""
    size: int = runner.input_batch.block_table[0].block_size
    return size


def num_slots(runner: GPUModelRunner, index: int) -> int:
    """Tokens of a request that have a place in the KV cache."""
    tables = runner.input_batch.block_table.block_tables
    return min(int(table.num_blocks_per_row[index] * table.block_size) for table in tables)


def attention_of_rows(
    runner: GPUModelRunner, indices: list[int], positions: torch.Tensor
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """By layer: attention metadata and slots [num_tokens] of one row for each of these requests, at `positions`
    [num_tokens] of their texts."""
    num_tokens = len(indices)
    seq_lens = (positions + 1).int()
    query_start = torch.arange(num_tokens + 1, dtype=torch.int32)
    attention: dict[str, object] = {}
    slots: dict[str, torch.Tensor] = {}
    for group_id, groups in enumerate(runner.attn_groups):
        table = runner.input_batch.block_table[group_id]
        blocks = table.get_device_tensor(runner.input_batch.num_reqs)[indices]
        block_of = torch.gather(blocks, 1, (positions // table.block_size)[:, None])[:, 0].long()
        slot_mapping = block_of * table.block_size + positions % table.block_size
        common = CommonAttentionMetadata(
            query_start_loc=query_start,
            query_start_loc_cpu=query_start,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=num_tokens,
            num_actual_tokens=num_tokens,
            max_query_len=1,
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=blocks,
            slot_mapping=slot_mapping,
            causal=True,
            positions=positions,
        )
        for group in groups:
            metadata = group.build_metadata(common)
            for layer_name in group.layer_names:
                attention[layer_name] = metadata
                slots[layer_name] = slot_mapping
    return attention, slots
