import torch

from tests.harness import Engine, greedy, token_prompts


def test_blocks_up_to_k_give_the_full_passes_inner_state(tiny_models, lens_ramps):
    """The residual stream of a round equals the one the full pass has at that depth, for the same token."""
    knobs = {"ramps": str(lens_ramps("qwen3", 3)), "hold_threshold": 0.0}
    with Engine(tiny_models["qwen3"], knobs) as engine:
        model, runner = engine.runner.model, engine.runner
        shallow, full = {}, {}
        stock_shallow, stock_forward = model.forward_shallow, runner._model_forward

        def record_shallow(depth, input_ids, positions):
            hidden = stock_shallow(depth, input_ids, positions)
            shallow[int(positions[0]), int(input_ids[0])] = hidden[0].clone()
            return hidden

        def record_full(**kwargs):
            model.set_inner_state_depths((3,))
            final, (inner,) = stock_forward(**kwargs)
            model.set_inner_state_depths(())
            for row, (position, token) in enumerate(zip(kwargs["positions"], kwargs["input_ids"], strict=True)):
                full[int(position), int(token)] = inner[row].clone()
            return final

        model.forward_shallow, runner._model_forward = record_shallow, record_full
        engine.tokens(token_prompts(1), greedy(20))
    common = shallow.keys() & full.keys()
    assert len(common) >= 20
    for key in common:
        torch.testing.assert_close(shallow[key], full[key], rtol=1e-4, atol=1e-5)
