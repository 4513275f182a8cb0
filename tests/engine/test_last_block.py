"""The last block leaves out a prompt's rows that nobody reads, and nothing changes by it."""

import pytest
import torch
from vllm import SamplingParams

from tests.harness import Engine, greedy, token_prompts

PROMPTS = token_prompts(4, length=40)
NEVER = {"threshold": 1.0, "hold_threshold": 1.0}


def last_blocks_rows(engine):
    """A list that grows by (rows of the pass, rows of them that the last block's MLP had)."""
    seen, runner = [], engine.runner

    def record(_mlp, args, _output):
        seen.append((int(runner.query_start_loc.np[runner.input_batch.num_reqs]), len(args[0])))

    runner.get_model().model.layers[-1].mlp.register_forward_hook(record)
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_only_rows_with_logits_pass_the_last_block(family, tiny_models, lens_ramps):
    """One of each prompt; its keys and values are plain vLLM's all the same, in each block."""
    with Engine(tiny_models[family]) as plain:
        expected = plain.tokens(PROMPTS, greedy(12))
        plain_cache = [cache.clone() for cache in plain.runner.kv_caches]
    with Engine(tiny_models[family], {"ramps": str(lens_ramps(family, 3)), **NEVER}) as engine:
        rows = last_blocks_rows(engine)
        assert engine.tokens(PROMPTS, greedy(12)) == expected
        for cache, plain_one in zip(engine.runner.kv_caches, plain_cache, strict=True):
            torch.testing.assert_close(cache, plain_one, rtol=1e-4, atol=1e-5)
        assert engine.counts()["fallbacks"] == 0
    assert rows[0] == (sum(len(prompt["prompt_token_ids"]) for prompt in PROMPTS), len(PROMPTS))
    assert set(rows[1:]) == {(len(PROMPTS), len(PROMPTS))}


def test_exits_with_and_without_verdict_keep_their_rows(tiny_llama, lens_ramps):
    """While another's prompt is read: held exits and released ones are judged in the same pass."""
    with Engine(tiny_llama) as plain:
        expected = plain.tokens(PROMPTS, greedy(40), one_by_one=True)
    for bound in (0.0, 0.9):
        knobs = {"ramps": str(lens_ramps(depth=3)), "hold_threshold": 0.0, "accuracy_bound": bound}
        if bound:
            knobs |= {"threshold": 0.01}
        with Engine(tiny_llama, knobs) as engine:
            rows = last_blocks_rows(engine)
            for index, prompt in enumerate(PROMPTS):
                engine.add(str(index), prompt, greedy(40))
                for _ in range(3):
                    engine.step()
            tokens = engine.run()
            counts = engine.counts()
        with_others = [(scheduled, read) for scheduled, read in rows if read < scheduled]
        assert len(with_others) == len(PROMPTS)
        assert max(read for _scheduled, read in with_others) > len(PROMPTS)
        assert counts["fallbacks"] == 0
        assert counts["released" if bound else "accepted"] > 0
        if not bound:
            assert [tokens[str(index)] for index in range(len(PROMPTS))] == expected


def test_scores_of_the_prompt_need_all_rows(tiny_llama, lens_ramps):
    params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=2, detokenize=False)
    with Engine(tiny_llama) as plain:
        expected = [out.prompt_logprobs for out in plain.generate(PROMPTS, params)]
    with Engine(tiny_llama, {"ramps": str(lens_ramps(depth=3)), **NEVER}) as engine:
        scores = [out.prompt_logprobs for out in engine.generate(PROMPTS, params)]
    for got, plain_one in zip(scores, expected, strict=True):
        assert len(got) == len(plain_one) > 40
        for at, plain_at in zip(got[1:], plain_one[1:], strict=True):
            assert {token: pytest.approx(score.logprob, abs=1e-3) for token, score in plain_at.items()} == {
                token: score.logprob for token, score in at.items()
            }


def test_compiled_the_answers_are_the_same(tiny_models, lens_ramps):
    with Engine(tiny_models["qwen3"]) as plain:
        expected = plain.tokens(PROMPTS, greedy(20)) + plain.tokens(PROMPTS[:1], greedy(20))
    knobs = {"ramps": str(lens_ramps("qwen3", 3)), "hold_threshold": 0.0}
    with Engine(tiny_models["qwen3"], knobs, enforce_eager=False) as engine:
        assert engine.tokens(PROMPTS, greedy(20)) + engine.tokens(PROMPTS[:1], greedy(20)) == expected
        assert engine.counts()["fallbacks"] == 0


def test_when_it_fails_all_rows_are_computed(tiny_llama, lens_ramps, monkeypatch):
    with Engine(tiny_llama) as plain:
        expected = plain.tokens(PROMPTS, greedy(12))
    with Engine(tiny_llama, {"ramps": str(lens_ramps(depth=3)), "hold_threshold": 0.0}) as engine:

        def fails(stock):
            raise RuntimeError("no metadata")

        monkeypatch.setattr(engine.runner.last_block, "_metadata", fails)
        assert engine.tokens(PROMPTS, greedy(12)) == expected
        assert engine.counts()["fallbacks"] == 1
