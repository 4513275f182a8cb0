import torch
from vllm.config import CompilationMode

from tests.harness import Engine, greedy, token_prompts


def test_blocks_up_to_k_give_the_full_passes_inner_state(tiny_models, lens_ramps):
    """The residual stream of a draft step equals the one the full pass has at that depth, for the same token."""
    options = {"ramps": str(lens_ramps("qwen3", 3)), "hold_threshold": 0.0}
    with Engine(tiny_models["qwen3"], options) as engine:
        model, runner = engine.runner.model, engine.runner
        shallow, full = {}, {}
        original_shallow, original_forward = model.forward_shallow, runner._model_forward

        def record_shallow(depth, input_ids, positions):
            hidden = original_shallow(depth, input_ids, positions)
            shallow[int(positions[0]), int(input_ids[0])] = hidden[0].clone()
            return hidden

        def record_full(**kwargs):
            model.set_aux_state_depths((3,))
            final, (aux,) = original_forward(**kwargs)
            model.set_aux_state_depths(())
            for row, (position, token) in enumerate(zip(kwargs["positions"], kwargs["input_ids"], strict=True)):
                full[int(position), int(token)] = aux[row].clone()
            return final

        model.forward_shallow, runner._model_forward = record_shallow, record_full
        engine.tokens(token_prompts(1), greedy(20))
    common = shallow.keys() & full.keys()
    assert len(common) >= 20
    for key in common:
        torch.testing.assert_close(shallow[key], full[key], rtol=1e-4, atol=1e-5)


def test_compiled_blocks_give_what_blocks_give(tiny_models, lens_ramps):
    """Whatever the number of rows, and the answers are plain vLLM's."""
    options = {"ramps": str(lens_ramps("qwen3", 3)), "hold_threshold": 0.0}
    rows_seen = set()
    with Engine(tiny_models["qwen3"], options, enforce_eager=False) as engine:
        model = engine.runner.model
        compiled = model._compiled_shallow[3]

        def compare(input_ids, positions):
            hidden = compiled(input_ids, positions).clone()
            torch.testing.assert_close(hidden, model._shallow(3, input_ids, positions), rtol=1e-4, atol=1e-5)
            rows_seen.add(len(input_ids))
            return hidden

        model._compiled_shallow[3] = compare
        tokens = engine.tokens(token_prompts(3), greedy(20))
        tokens += engine.tokens(token_prompts(1), greedy(20))
        assert engine.counts()["fallbacks"] == 0
    assert {1, 2, 3} <= rows_seen
    with Engine(tiny_models["qwen3"]) as plain:
        assert tokens == plain.tokens(token_prompts(3), greedy(20)) + plain.tokens(token_prompts(1), greedy(20))


def test_blocks_that_do_not_compile_run_as_they_are(tiny_models, lens_ramps, monkeypatch):
    asked = []

    def fails(*args):
        asked.append(args)
        raise RuntimeError("no compiler")

    options = {"ramps": str(lens_ramps("qwen3", 3)), "hold_threshold": 0.0}
    with Engine(tiny_models["qwen3"], options) as engine:
        monkeypatch.setattr(engine.runner.model, "compile_shallow", fails)
        monkeypatch.setattr(engine.runner.vllm_config.compilation_config, "mode", CompilationMode.VLLM_COMPILE)
        engine.runner.exit_drafter.model.compile(3)
        engine.tokens(token_prompts(1), greedy(20))
        counts = engine.counts()
    assert [depth for depth, _rows in asked] == [3]
    assert counts["fallbacks"] == 0
    assert counts["draft_steps"] > 0
