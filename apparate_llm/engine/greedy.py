"""Checking held exits where all requests take the best token: one look at the scores instead of two sampling passes.

Gives the tokens that vLLM's rejection sampler gives, without its copies of the scores. Random sampling, penalties and
all else that changes or reads scores is left to that sampler.
"""

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from apparate_llm.argmax import best_tokens


def is_plain_greedy(sampling: SamplingMetadata) -> bool:
    """Whether it asks for nothing but the best token of each row."""
    thinking = sampling.thinking_budget_state_holder
    return (
        sampling.all_greedy
        and sampling.no_penalties
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.allowed_token_ids_mask is None
        and not sampling.bad_words_token_ids
        and all(map(_is_idle, sampling.logitsprocs.non_argmax_invariant))
        and (thinking is None or not thinking.has_tracked_requests())
    )


def _is_idle(processor: LogitsProcessor) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    return isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases


def verify_greedy(logits: torch.Tensor, metadata: SpecDecodeMetadata) -> SamplerOutput:
    """Held exits up to the first that differs, then the full model's own token, for each request.

    logits [num_tokens, vocab]; metadata: its rows are in the order of the requests, each
    one's exits first.
    """
    best = best_tokens(logits).tolist()
    drafts = metadata.draft_token_ids.tolist()
    tokens = np.full((len(metadata.num_draft_tokens), metadata.max_spec_len + 1), PLACEHOLDER_TOKEN_ID, np.int32)
    row = first = 0
    for request, num_drafts in enumerate(metadata.num_draft_tokens):
        num_accepted = 0
        while num_accepted < num_drafts and best[row + num_accepted] == drafts[first + num_accepted]:
            num_accepted += 1
        tokens[request, : num_accepted + 1] = best[row : row + num_accepted + 1]
        row, first = row + num_drafts + 1, first + num_drafts
    return SamplerOutput(sampled_token_ids=torch.from_numpy(tokens), logprobs_tensors=None)


def first_rows(metadata: SpecDecodeMetadata) -> torch.Tensor:
    """Of each request the row that follows its checked text, with which a step goes on that drops all drafts."""
    num_tokens = torch.tensor(metadata.num_draft_tokens) + 1
    return num_tokens.cumsum(0) - num_tokens
