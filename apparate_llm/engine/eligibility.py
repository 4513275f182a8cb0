"""Which requests may have released exits: those for which the full model's greedy choice is all that is asked."""

from vllm.sampling_params import SamplingParams


def is_releasable(params: SamplingParams) -> bool:
    """Whether a released exit can be held against argmax of the full model's logits.

    Everything else (random sampling, score changes, scores in the answer, grammars) keeps held exits only, whose
    check is vLLM's own sampler.
    """
    greedy = params.temperature == 0.0 and params.seed is None
    plain_scores = (
        params.presence_penalty == 0.0
        and params.frequency_penalty == 0.0
        and params.repetition_penalty == 1.0
        and params.min_tokens == 0
        and not params.logit_bias
        and not params.allowed_token_ids
        and not params.bad_words
        and params.thinking_token_budget is None
        and not params.watermarking
    )
    nothing_but_text = (
        params.logprobs is None
        and params.logprob_token_ids is None
        and params.structured_outputs is None
        and params.repetition_detection is None
        and not params.trace_decode_token_ids
    )
    return greedy and plain_scores and nothing_but_text


def stop_token_ids(params: SamplingParams) -> frozenset[int]:
    """Tokens after which vLLM's scheduler ends the request."""
    ids = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        ids.add(params.eos_token_id)
    return frozenset(ids)
