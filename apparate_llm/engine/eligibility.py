"""What exits a request may have: released ones, held ones only, or none."""

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors


def may_exit(params: SamplingParams) -> bool:
    """Whether held exits leave the answer as it is.

    vLLM's check of drafts knows neither min_p nor logit_bias. With a seed it draws a number for each draft, so that the
    text depends on how many there were, and so on the clock; greedy requests draw none. Scores of tokens that a request
    names come from its plain sampler only.
    """
    nothing_drawn = params.temperature == 0.0 or (params.seed is None and params.min_p == 0.0)
    return nothing_drawn and not params.logit_bias and params.logprob_token_ids is None


def is_releasable(params: SamplingParams) -> bool:
    """Whether a released exit can be held against argmax of the full model's logits.

    Everything else (random sampling, score changes, scores in the answer, grammars) keeps held exits only, whose
    check is vLLM's own sampler. So do answers that end where a string is found: a wrong token could complete it.
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
        and not params.stop
        and params.repetition_detection is None
        and not params.trace_decode_token_ids
    )
    return greedy and plain_scores and nothing_but_text


def custom_processors(processors: LogitsProcessors) -> list[str]:
    """Names of the user's own. They may act on any request, and have no way to act on the
    rows of drafts."""
    return [type(one).__name__ for one in processors.all if type(one) not in BUILTIN_LOGITS_PROCESSORS]


def stop_token_ids(params: SamplingParams) -> frozenset[int]:
    """Tokens after which vLLM's scheduler ends the request; the others that a model's generation config ends with are
    among `stop_token_ids`."""
    ids = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        ids.add(params.eos_token_id)
    return frozenset(ids)
