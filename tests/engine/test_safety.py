"""When our layer fails, plain serving goes on; when a part is missing or wrong, the start stops with a clear error."""

import pytest

from tests.harness import Engine, greedy, token_prompts

PROMPTS = token_prompts(4, shared=20)


@pytest.mark.parametrize("bound", [0.0, 0.9])
def test_serving_goes_on_without_exits_after_a_failing_draft_step(bound, tiny_llama, lens_ramps):
    with Engine(tiny_llama) as plain:
        expected = plain.tokens(PROMPTS, greedy(40))
    options = {"ramps": str(lens_ramps(depth=4)), "hold_threshold": 0.0, "threshold": 0.01, "accuracy_bound": bound}
    with Engine(tiny_llama, options) as engine:
        ramps, calls = engine.runner.exit_drafter.ramps, 0
        original = ramps.predict

        def predict(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 8:
                raise RuntimeError("injected")
            return original(*args, **kwargs)

        ramps.predict = predict
        assert engine.tokens(PROMPTS, greedy(40)) == expected
        status = engine.status()
        passes_before = status["counts"]["verification_passes"]
        assert engine.tokens(PROMPTS, greedy(40)) == expected
        passes = engine.counts()["verification_passes"] - passes_before
    assert status["active"] is False
    assert status["counts"]["fallbacks"] == 1
    assert calls == 8
    assert passes == 40  # one token a pass again


def test_exits_keep_the_batch_within_max_batch_tokens_and_cost_nothing_beyond(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=4)), "hold_threshold": 0.0, "max_batch_tokens": 4}
    with Engine(tiny_llama, options) as engine:
        scheduled, original = [], engine.runner._prepare_inputs

        def record(scheduler_output, num_scheduled_tokens):
            if not scheduler_output.scheduled_new_reqs:
                scheduled.append((len(num_scheduled_tokens), int(num_scheduled_tokens.sum())))
            return original(scheduler_output, num_scheduled_tokens)

        engine.runner._prepare_inputs = record
        draft_steps = {}
        for count in (1, 2, 3, 4):
            before = engine.counts()["draft_steps"]
            engine.tokens(PROMPTS[:count], greedy(24))
            draft_steps[count] = engine.counts()["draft_steps"] - before
    assert {rows for requests, rows in scheduled if requests == 1} >= {4}
    assert {rows for requests, rows in scheduled if requests == 2} >= {4}
    assert all(rows <= 4 for requests, rows in scheduled)
    assert draft_steps[1] > draft_steps[2] > 0 and draft_steps[3] == draft_steps[4] == 0


def test_policy_off_is_plain_vllm(tiny_llama):
    with Engine(tiny_llama, {"policy": "off"}) as engine:
        assert not engine.has_exits
        assert type(engine.runner).__module__.startswith("vllm.")


def test_the_ramps_of_another_model_stop_the_start(tiny_models, lens_ramps):
    from apparate_llm.ramps.checkpoint import RampError

    with pytest.raises(RampError, match="made for another model"):
        Engine(tiny_models["qwen2"], {"ramps": str(lens_ramps("llama", 3))})


def test_a_model_without_shipped_ramps_stops_the_start(tiny_llama):
    from apparate_llm.ramps.checkpoint import RampError

    with pytest.raises(RampError, match=r"no shipped ramps fit .*no sibling of"):
        Engine(tiny_llama, {})


def test_lora_and_missing_parts_are_refused(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=3))}
    with pytest.raises(ValueError, match="--enable-lora"):
        Engine(tiny_llama, options, enable_lora=True)
    with pytest.raises(Exception, match="early exits need --scheduler-cls"):
        Engine(tiny_llama, options, scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")


def test_bad_options_stop_the_start(tiny_llama, lens_ramps):
    import json

    from apparate_llm.config import ConfigError, parse_config
    from apparate_llm.engine.vllm_args import vllm_args

    settings = vllm_args(parse_config({"ramps": str(lens_ramps(depth=3))}), "LlamaForCausalLM")
    settings["additional_config"] = json.loads('{"early_exit": {"max_exit": 3}}')
    with pytest.raises(ConfigError, match="max_exit: unknown option"):
        Engine(tiny_llama, **settings)


def test_integrity_check_sees_a_lost_exit(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=4)), "threshold": 0.01, "accuracy_bound": 0.99}
    with Engine(tiny_llama, options) as engine:
        engine.add("a", PROMPTS[0], greedy(40))
        while not engine.runner.ledger.counts.outstanding:
            engine.step()
        (exits,) = engine.runner.ledger.requests.values()
        lost = exits.outstanding.pop()
        with pytest.raises(Exception, match="outstanding"):
            engine.check_integrity()
        exits.outstanding.append(lost)
        engine.run()
