"""Options changed while requests are under way: in force with the next step, and nobody loses a token."""

import random

import pytest

from tests.harness import Engine, greedy, token_prompts

PROMPTS = token_prompts(6, shared=30)


def configure(engine: Engine, **changes) -> str | None:
    return engine.llm.collective_rpc("early_exit_configure", args=(changes,))[0]


@pytest.fixture(scope="module")
def plain_tokens(tiny_llama):
    with Engine(tiny_llama) as engine:
        return engine.tokens(PROMPTS, greedy(100))


def test_a_hundred_changes_lose_no_token(tiny_llama, lens_ramps, plain_tokens):
    rng = random.Random(0)
    with Engine(tiny_llama, {"ramps": str(lens_ramps(depth=3)), "hold_threshold": 0.0, "max_exits": 4}) as engine:
        for i, prompt in enumerate(PROMPTS):
            engine.add(str(i), prompt, greedy(100))
        tokens: dict[str, list[int]] = {}
        changes = 0
        while engine.llm.llm_engine.has_unfinished_requests():
            tokens.update(engine.step())
            for _ in range(4):
                change = rng.choice(
                    [
                        {"policy": rng.choice(["static", "adaptive", "apparate", "off"])},
                        {"max_exits": rng.randint(1, 4)},
                    ]
                )
                assert configure(engine, **change) is None
                assert engine.status()["config"].items() >= change.items()
                changes += 1
            engine.check_integrity()
        engine.idle()
        assert [tokens[str(i)] for i in range(len(PROMPTS))] == plain_tokens
        assert changes >= 100 and engine.counts()["accepted"] > 0


def test_off_takes_effect_with_the_next_step_and_on_as_well(tiny_llama, lens_ramps):
    with Engine(tiny_llama, {"ramps": str(lens_ramps(depth=3)), "hold_threshold": 0.0}) as engine:
        engine.add("a", PROMPTS[0], greedy(90))
        for policy, drafts in (("static", True), ("off", False), ("static", True)):
            assert configure(engine, policy=policy) is None
            before = engine.counts()["draft_steps"]
            for _ in range(4):
                engine.step()
            assert (engine.counts()["draft_steps"] > before) is drafts
        engine.run()


def test_a_bound_lowered_to_zero_ends_divergences_at_once(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=3)), "accuracy_bound": 0.5, "threshold": 0.01, "hold_threshold": 0.0}
    with Engine(tiny_llama, options) as engine:
        for i, prompt in enumerate(PROMPTS):
            engine.add(str(i), prompt, greedy(200))
        for _ in range(12):
            engine.step()
        before = engine.counts()
        assert before["released"] > 0
        assert configure(engine, accuracy_bound=0.0) is None
        engine.run()
        after = engine.counts()
        assert after["released"] == before["released"] and after["emitted"] > before["emitted"] + 100
        assert configure(engine, accuracy_bound=0.5) is None
        engine.add("again", PROMPTS[0], greedy(60))
        engine.run()
        assert engine.counts()["released"] > after["released"]


def test_what_the_server_cannot_do_is_refused(tiny_llama, lens_ramps):
    with Engine(tiny_llama, {"ramps": str(lens_ramps(depth=3))}) as engine:
        before = engine.status()["config"]
        assert configure(engine, depth=2) == "early_exit: depth: this server has ramps at 3, got 2"
        assert configure(engine, max_exits=9).startswith(
            "early_exit: max_exits: at most 3, which the server was started"
        )
        assert "cannot be changed while serving" in configure(engine, controller_state="none")
        assert engine.status()["config"] == before


def test_what_was_learned_comes_back_with_its_policy_unless_it_is_forgotten(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=3)), "policy": "adaptive"}
    with Engine(tiny_llama, options) as engine:
        engine.generate(PROMPTS, greedy(40))
        learned = engine.status()["controller"]["verify_ms"].keys()
        assert len(learned) > 0
        assert configure(engine, policy="off") is None and engine.status()["controller"] == {}
        assert configure(engine, policy="adaptive", depth=3) is None
        assert engine.status()["controller"]["verify_ms"].keys() == learned
        engine.llm.collective_rpc("early_exit_forget")
        assert engine.status()["controller"]["verify_ms"] == {}
