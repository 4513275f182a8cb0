import pytest
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from apparate_llm.engine.eligibility import is_releasable, may_exit, stop_token_ids

NEEDS_THE_FULL_MODEL = [
    {"temperature": 0.7},
    {"temperature": 0.0, "seed": 3},
    {"temperature": 0.0, "presence_penalty": 0.1},
    {"temperature": 0.0, "frequency_penalty": 0.1},
    {"temperature": 0.0, "repetition_penalty": 1.1},
    {"temperature": 0.0, "min_tokens": 4},
    {"temperature": 0.0, "logit_bias": {3: 1.0}},
    {"temperature": 0.0, "allowed_token_ids": [3]},
    {"temperature": 0.0, "bad_words": ["x"]},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(regex="a")},
    {"temperature": 0.0, "thinking_token_budget": 5},
    {"temperature": 0.0, "watermarking": True},
    {"temperature": 0.0, "stop": ["x"]},
    {
        "temperature": 0.0,
        "repetition_detection": RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=2, min_count=2),
    },
]


def test_plain_greedy_requests_may_have_released_exits():
    assert is_releasable(SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=[4]))
    assert is_releasable(SamplingParams(temperature=0.0, prompt_logprobs=2))


@pytest.mark.parametrize("given", NEEDS_THE_FULL_MODEL, ids=lambda given: list(given)[-1])
def test_requests_whose_contract_needs_full_scores_may_not(given):
    assert not is_releasable(SamplingParams(**given))


@pytest.mark.parametrize(
    ("given", "may"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"min_p": 0.1}, False),
        ({"temperature": 0.0, "min_p": 0.1}, True),  # vLLM itself drops it there
        ({"logit_bias": {3: 1.0}}, False),
        ({"temperature": 0.0, "logit_bias": {3: 1.0}}, False),
        ({"temperature": 0.0, "logprob_token_ids": [3]}, False),
        ({"seed": 1}, False),
        ({"temperature": 0.0, "seed": 1}, True),  # nothing is drawn
        ({"top_p": 0.9, "top_k": 5, "presence_penalty": 1.0}, True),
    ],
    ids=str,
)
def test_requests_that_even_held_exits_would_change_take_none(given, may):
    assert may_exit(SamplingParams(**given)) is may


def test_no_sampling_parameter_is_overlooked():
    """A new parameter in vLLM must be looked at before release goes on beside it."""
    no_concern = {
        "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos", "max_tokens",
        "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "flat_logprobs", "detokenize",
        "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind",
        "stream_interval", "skip_clone", "output_text_buffer_length", "extra_args", "skip_reading_prefix_cache",
        "routed_experts_prompt_start",
    }  # fmt: skip
    looked_at = {
        "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "logit_bias", "allowed_token_ids",
        "bad_words", "thinking_token_budget", "logprobs", "logprob_token_ids", "structured_outputs",
        "repetition_detection", "trace_decode_token_ids", "watermarking", "stop",
    }  # fmt: skip
    public = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert public == no_concern | looked_at


def test_stop_tokens_include_the_models_own_end_unless_ignored():
    params = SamplingParams(stop_token_ids=[7])
    params.update_from_generation_config({}, eos_token_id=2)
    assert stop_token_ids(params) == {2, 7}
    params = SamplingParams(stop_token_ids=[7])
    params.update_from_generation_config({"eos_token_id": [2, 3]}, eos_token_id=2)
    assert stop_token_ids(params) == {2, 3, 7}
    params = SamplingParams(stop_token_ids=[7], ignore_eos=True)
    params.update_from_generation_config({"eos_token_id": [2, 3]}, eos_token_id=2)
    assert stop_token_ids(params) == {7}
