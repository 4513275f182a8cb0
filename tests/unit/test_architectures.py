"""Every supported family gives the very tokens of plain vLLM, whatever its ramps say."""

import pytest

from tests.harness import Engine, greedy, token_prompts
from tests.tiny import MODEL_TYPES, NUM_LAYERS


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_lossless_exits_leave_greedy_output_as_it_is(model_type, tiny_models, lens_ramps):
    prompts = token_prompts(8)
    with Engine(tiny_models[model_type]) as plain:
        expected = plain.tokens(prompts, greedy())
    options = {"ramps": str(lens_ramps(model_type, 3)), "hold_threshold": 0.0}
    with Engine(tiny_models[model_type], options) as engine:
        assert engine.tokens(prompts, greedy()) == expected
        assert engine.tokens(prompts[:2], greedy(), one_by_one=True) == expected[:2]
        counts = engine.counts()
    assert 0 < counts["accepted"] < counts["held"]
    assert counts["released"] == 0


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_perfect_ramp_saves_steps_and_is_never_rejected(model_type, tiny_models, lens_ramps):
    options = {"ramps": str(lens_ramps(model_type, NUM_LAYERS)), "hold_threshold": 0.0, "max_exits": 3}
    with Engine(tiny_models[model_type], options) as engine:
        engine.tokens(token_prompts(1), greedy(42))
        counts = engine.counts()
    assert counts["accepted"] == counts["held"] == 30
    assert counts["verification_passes"] == 12  # the prompt and its token, one more, then four tokens a pass
