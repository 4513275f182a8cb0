"""Held exits never change greedy output, whatever else vLLM does at the same time."""

import pytest

from tests.harness import Engine, greedy, token_prompts

PROMPTS = token_prompts(8, shared=70)
SITUATIONS = {
    "prefix caching": {"enable_prefix_caching": True, "block_size": 32},
    "chunked prefill": {"max_num_batched_tokens": 64, "enable_chunked_prefill": True},
    "small batch": {"max_num_seqs": 2},
    # 14 blocks of 32 tokens for 8 requests of about 140 tokens each
    "preemption": {"block_size": 32, "num_gpu_blocks_override": 14},
}


@pytest.fixture(scope="module")
def expected(tiny_llama):
    with Engine(tiny_llama) as plain:
        return plain.tokens(PROMPTS, greedy(60))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_lossless_under(situation, tiny_llama, lens_ramps, expected):
    options = {"ramps": str(lens_ramps(depth=3)), "hold_threshold": 0.0}
    with Engine(tiny_llama, options, **SITUATIONS[situation]) as engine:
        preemptions = count_preemptions(engine)
        assert engine.tokens(PROMPTS, greedy(60)) == expected
        assert engine.tokens(PROMPTS, greedy(60)) == expected  # prefixes cached now
        assert engine.counts()["accepted"] > 0
    assert bool(preemptions) == (situation == "preemption")


def count_preemptions(engine):
    """A list that grows by one request id per preemption."""
    seen, original = [], engine.scheduler._preempt_request

    def record(request, *args, **kwargs):
        seen.append(request.request_id)
        return original(request, *args, **kwargs)

    engine.scheduler._preempt_request = record
    return seen


def test_lossless_while_other_requests_are_aborted(tiny_llama, lens_ramps, expected):
    options = {"ramps": str(lens_ramps(depth=3)), "hold_threshold": 0.0}
    with Engine(tiny_llama, options) as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.add(str(index), prompt, greedy(60))
        for _ in range(5):
            engine.step()
        for index in (1, 4, 6):
            engine.abort(str(index))
        tokens = engine.run()
    for index in (0, 2, 3, 5, 7):
        assert tokens[str(index)] == expected[index]


def test_lossless_with_an_untrained_fused_ramp_and_a_shallow_lens(tiny_llama, expected, tmp_path):
    from tests.tiny import build_fused_ramps, build_lens_ramps

    for depth in (0, 2):
        fused = build_fused_ramps(tmp_path / f"fused{depth}", tiny_llama, depth=depth)
        with Engine(tiny_llama, {"ramps": str(fused), "hold_threshold": 0.0}) as engine:
            assert engine.tokens(PROMPTS, greedy(60)) == expected
            assert engine.counts()["held"] > 0
    lens = build_lens_ramps(tmp_path / "lens", tiny_llama, depth=1, confidence_offset=6.0)
    with Engine(tiny_llama, {"ramps": str(lens), "hold_threshold": 0.0}) as engine:
        assert engine.tokens(PROMPTS, greedy(60)) == expected


def test_answers_that_reach_the_end_of_the_context_are_the_same(tiny_llama, lens_ramps):
    prompts = token_prompts(3, length=50)
    with Engine(tiny_llama, max_model_len=80) as plain:
        expected = plain.tokens(prompts, greedy(100))
    for depth in (3, 4):
        for bound in (0.0, 0.9):
            options = {"ramps": str(lens_ramps(depth=depth)), "hold_threshold": 0.0, "accuracy_bound": bound}
            with Engine(tiny_llama, options, max_model_len=80) as engine:
                tokens = engine.tokens(prompts, greedy(100))
            assert [len(answer) for answer in tokens] == [len(answer) for answer in expected]
            if bound == 0.0 or depth == 4:
                assert tokens == expected
