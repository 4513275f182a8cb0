"""Exits on quantised weights, with ramps made for the model as it was: they agree, and lossless answers are exact."""

import json

import pytest

from apparate_llm.host.dtype import has_16_bit_kernels
from tests.harness import Engine, greedy, token_prompts
from tests.quantised import FORMATS
from tests.tiny import NUM_LAYERS, build_fused_ramps, build_lens_ramps, build_tiny_model

# Biases and norms of queries and keys are quantised backbones' own trouble: a family for each format.
FAMILIES = {"W8A8": "qwen2", "W4A16": "llama", "AWQ": "qwen2", "GPTQ": "qwen3"}
# vLLM has kernels for 4 bits where it has some for 16.
MARKS = {name: pytest.mark.skipif(name != "W8A8" and not has_16_bit_kernels(), reason="no kernels") for name in FORMATS}
BFLOAT16 = {"dtype": "bfloat16"}  # the only one that all four can be served in
NUM_TOKENS = 32
NUM_PROMPTS = 3


def answers(engine):
    """Together and one at a time."""
    prompts = token_prompts(NUM_PROMPTS)
    return [engine.tokens(prompts, greedy(NUM_TOKENS), one_by_one=one_by_one) for one_by_one in (False, True)]


def answers_without_exits(folder, **vllm):
    with Engine(folder, {"policy": "off"}, **BFLOAT16, **vllm) as engine:
        assert engine.core.model_executor.driver_worker.worker.coverage.holds
        return answers(engine)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *(pytest.param(name, False, marks=MARKS[name]) for name in FORMATS),
        *(pytest.param(name, True, marks=(MARKS[name], pytest.mark.long)) for name in ("W8A8", "W4A16")),
    ],
)
def test_lossless_answers_on_quantised_weights_are_those_without_exits(
    name, compiled, tiny_models, lens_ramps, tmp_path
):
    family = FAMILIES[name]
    folder = FORMATS[name](tiny_models[family], tmp_path / "model")
    vllm = {"enforce_eager": not compiled}
    expected = answers_without_exits(folder, **vllm)
    assert expected[0] == expected[1]
    options = {"ramps": str(lens_ramps(family, NUM_LAYERS)), "hold_threshold": 0.0}
    with Engine(folder, options, **BFLOAT16, **vllm) as engine:
        assert answers(engine) == expected
        counts, invariance = engine.counts(), engine.status()["batch_invariance"]
    assert counts["fallbacks"] == 0 and invariance["holds"], invariance
    # At full depth the ramp is the model itself, but for the rounding of its norm.
    assert counts["accepted"] > 0.8 * counts["held"] > 0


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in FORMATS])
def test_a_quantised_head_is_read_by_ramps_and_is_exact(name, tmp_path):
    """Its rows are dequantised for a lens."""
    model = build_tiny_model(tmp_path / "plain", vocab_size=192)  # a multiple of 64, which AWQ's heads must be
    ramps = build_lens_ramps(tmp_path / "ramps", model, depth=NUM_LAYERS, confidence_offset=6.0)
    folder = FORMATS[name](model, tmp_path / "model", head=True)
    expected = answers_without_exits(folder)
    with Engine(folder, {"ramps": str(ramps), "hold_threshold": 0.0}, **BFLOAT16) as engine:
        assert engine.runner.model.sibling.head_is_quantised
        assert answers(engine) == expected
        counts = engine.counts()
    assert counts["fallbacks"] == 0 and counts["accepted"] > 0.8 * counts["held"] > 0


def test_fused_ramps_run_on_a_quantised_sibling(tiny_llama, tmp_path):
    ramps = build_fused_ramps(tmp_path / "ramps", tiny_llama, depth=2)
    folder = FORMATS["W8A8"](tiny_llama, tmp_path / "model")
    expected = answers_without_exits(folder)
    with Engine(folder, {"ramps": str(ramps), "hold_threshold": 0.0}, **BFLOAT16) as engine:
        assert answers(engine) == expected
        counts = engine.counts()
    assert counts["fallbacks"] == 0 and counts["held"] > 0


def test_a_sibling_diverges_only_after_enough_verdicts(tiny_llama, tmp_path, monkeypatch):
    from apparate_llm.controller import policy

    ramps = build_lens_ramps(tmp_path / "ramps", tiny_llama, depth=NUM_LAYERS, confidence_offset=6.0)
    folder = FORMATS["W8A8"](tiny_llama, tmp_path / "model")
    options = {"ramps": str(ramps), "accuracy_bound": 0.5, "threshold": 0.01, "hold_threshold": 0.0}
    with Engine(folder, options, **BFLOAT16) as engine:
        answers(engine)
        counts = engine.counts()
        assert counts["held"] > 0 and counts["released"] == counts["divergences"] == 0
        monkeypatch.setattr(policy, "LEAST_VERDICTS", 10)
        answers(engine)
        assert engine.counts()["released"] > 0
    with Engine(tiny_llama, options, **BFLOAT16) as engine:  # the model that they were made for
        answers(engine)
        assert engine.counts()["released"] > 0


def test_a_siblings_experience_is_kept_apart(tiny_llama, lens_ramps, tmp_path):
    """Under one name, as a cache may have it."""
    from apparate_llm.engine.state_key import state_key_of

    folder = FORMATS["W8A8"](tiny_llama, tmp_path / tiny_llama.name)
    keys = []
    for model in (tiny_llama, folder):
        with Engine(model, {"ramps": str(lens_ramps("llama", 3))}, **BFLOAT16) as engine:
            keys.append(state_key_of(engine.runner, depths=[3]))
    assert keys[0]["model"] == keys[1]["model"] and "weights" not in keys[0]
    assert json.dumps(keys[0]) != json.dumps(keys[1])
