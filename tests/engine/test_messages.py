"""How often the engine asks its worker in a step: every message is a wait of both."""

from collections import Counter

import pytest

from tests.harness import Engine, token_prompts

PROMPTS = token_prompts(3)


@pytest.fixture(scope="module")
def engine(tiny_llama, lens_ramps):
    with Engine(tiny_llama, {"ramps": str(lens_ramps(depth=1)), "hold_threshold": 0.0}) as engine:
        yield engine


def counted(counter, name, call):
    def counting(*args, **kwargs):
        counter[name] += 1
        return call(*args, **kwargs)

    return counting


@pytest.fixture
def asked(engine, monkeypatch):
    """Calls of the executor, by name."""
    counter, executor = Counter(), engine.core.model_executor
    for name in ("execute_model", "sample_tokens", "take_draft_token_ids"):
        monkeypatch.setattr(executor, name, counted(counter, name, getattr(executor, name)))
    return counter


def greedy(max_tokens=24, **given):
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **given)


def test_a_step_takes_one_message_and_another_where_an_answer_begins(engine, asked):
    held = engine.counts()["held"]
    engine.generate(PROMPTS[:1], greedy())
    assert engine.counts()["held"] > held  # drafts reached the scheduler all the same
    assert asked["execute_model"] > 10
    assert asked["sample_tokens"] == 0
    assert asked["take_draft_token_ids"] == 1  # the first token leaves before the draft steps


def test_another_where_an_answer_ends_and_others_go_on(engine, asked):
    engine.generate(PROMPTS[:2], [greedy(8), greedy(24)])
    assert asked["take_draft_token_ids"] == 2  # they begin together; one ends; when the other does, nobody is left


def test_none_more_where_there_are_no_exits(engine, asked):
    def choose(policy):
        assert engine.llm.collective_rpc("early_exit_configure", args=({"policy": policy},)) == [None]

    choose("off")
    engine.generate(PROMPTS, [greedy(8), greedy(16), greedy(24)])
    choose("static")
    assert asked["execute_model"] > 10
    assert asked["take_draft_token_ids"] == 0


def test_a_grammar_is_waited_for(engine, asked):
    from vllm.sampling_params import StructuredOutputsParams

    accepted = engine.counts()["accepted"]
    engine.generate(PROMPTS[:1], greedy(structured_outputs=StructuredOutputsParams(regex="(w1|w2)( (w3|w4))*")))
    emitted = engine.counts()["accepted"] - accepted
    assert asked["sample_tokens"] == 24 - emitted  # in every step with tokens; there are others while it is compiled
