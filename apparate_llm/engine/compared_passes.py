"""Whole passes over the same tokens in different batches, before a server's first request: the proof of what
`batch_invariance` did, as compiled and with attention."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from apparate_llm.engine.batch import attention_groups, block_size

CONTEXTS = (3, 31, 64, 150)  # tokens before the ones tried, one for each request
NEW_TOKENS = 3  # of each request
SEED = 20
BATCHES: tuple[tuple[tuple[int, ...], int], ...] = (  # requests, new tokens of each
    ((0,), NEW_TOKENS),
    ((0, 1), 1),
    ((0, 1, 2), 1),
    ((0, 1, 2, 3), 1),
    ((2, 3), NEW_TOKENS),
    ((0, 1, 2, 3), NEW_TOKENS),
)


@dataclass(frozen=True, slots=True)
class Request:
    tokens: torch.Tensor  # int32 [context + NEW_TOKENS]
    blocks: torch.Tensor  # int32 [num_blocks] of the KV cache, as the kernel has them

    @property
    def context(self) -> int:
        return len(self.tokens) - NEW_TOKENS

    def slots(self, block_size: int) -> torch.Tensor:
        """int64 [num_tokens]: where the KV of each token is."""
        at = torch.arange(len(self.tokens))
        return self.blocks[at // block_size].long() * block_size + at % block_size


def different_passes(runner: GPUModelRunner) -> tuple[int, int]:
    """(passes compared, of them those whose final states or scores differ from the same tokens' alone). Writes into
    the KV cache, which nobody uses yet. Raises ValueError for a model or cache that it cannot try this on."""
    requests = _requests(runner)
    different = 0
    for request in requests:
        whole = _pass(runner, [(request, 0, request.context)])
        cut = request.context // 2
        halves = [
            _pass(runner, [(request, first, number)]) for first, number in ((0, cut), (cut, request.context - cut))
        ]
        different += not all(torch.equal(torch.cat(parts), one) for *parts, one in zip(*halves, whole, strict=True))
    alone = [[_pass(runner, [(request, request.context + i, 1)]) for i in range(NEW_TOKENS)] for request in requests]
    for chosen, count in BATCHES:
        together = _pass(runner, [(requests[i], requests[i].context, count) for i in chosen])
        apart = [torch.cat([alone[i][j][part] for i in chosen for j in range(count)]) for part in (0, 1)]
        different += not all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    return len(requests) + len(BATCHES), different


def _requests(runner: GPUModelRunner) -> list[Request]:
    if len(list(attention_groups(runner))) != 1:
        raise ValueError("its layers do not share one kind of attention")
    size = block_size(runner)
    vocab_size = runner.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(SEED)
    requests, first = [], 1  # vLLM keeps block 0 for itself
    for context in CONTEXTS:
        num_tokens = min(context, runner.max_model_len - NEW_TOKENS) + NEW_TOKENS
        num_blocks = -(-num_tokens // size)
        # Of vLLM's own kind: a compiled pass does not look.
        tokens = torch.randint(vocab_size, (num_tokens,), generator=generator, dtype=runner.input_ids.cpu.dtype)
        requests.append(Request(tokens, torch.arange(first, first + num_blocks, dtype=torch.int32)))
        first += num_blocks
    there = runner.kv_cache_config.num_blocks * runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    if first * size > there:
        raise ValueError("its KV cache is too small")
    return requests


@torch.inference_mode()
def _pass(runner: GPUModelRunner, parts: list[tuple[Request, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states and scores [num_tokens, ...] of (request, first position, number) each."""
    model: Any = runner.model  # vLLM's runner says only that it is a module
    (group,) = attention_groups(runner)
    size = block_size(runner)
    spans = [range(first, first + number) for _, first, number in parts]
    positions = torch.tensor([position for span in spans for position in span])  # int64
    tokens = torch.cat([request.tokens[first : first + number] for request, first, number in parts])
    slots = torch.cat([request.slots(size)[first : first + number] for request, first, number in parts])
    start = torch.tensor([0, *accumulate(map(len, spans))], dtype=torch.int32)
    seq_lens = torch.tensor([span.stop for span in spans], dtype=torch.int32)
    widest = max(len(request.blocks) for request, _, _ in parts)
    blocks = torch.zeros(len(parts), widest, dtype=torch.int32)
    for row, (request, _, _) in enumerate(parts):
        blocks[row, : len(request.blocks)] = request.blocks
    metadata = group.get_metadata_builder().build(
        0,
        CommonAttentionMetadata(
            query_start_loc=start,
            query_start_loc_cpu=start,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(parts),
            num_actual_tokens=len(tokens),
            max_query_len=max(map(len, spans)),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=blocks,
            slot_mapping=slots,
            causal=True,
            positions=positions,
        ),
    )
    attention = dict.fromkeys(group.layer_names, metadata)
    mapping = dict.fromkeys(group.layer_names, slots)
    with set_forward_context(attention, runner.vllm_config, num_tokens=len(tokens), slot_mapping=mapping):
        output = model(input_ids=tokens, positions=positions, intermediate_tensors=None, inputs_embeds=None)
    states = output[0] if isinstance(output, tuple) else output
    return states, model.compute_logits(states)
