"""The controller at work in an engine: bounds, per-request options, targets, log, state, change of depth."""

import json

import pytest

from apparate_llm.controller.feedback import read_header, read_steps
from apparate_llm.controller.replay import LogCosts, oracle
from tests.harness import Engine, greedy, token_prompts
from tests.tiny import build_lens_ramps, build_tiny_model, make_forgetful

PROMPTS = token_prompts(6, shared=30)


def adaptive(ramps, **options):
    return {"ramps": str(ramps), "policy": "adaptive", **options}


def cheap_draft_steps(engine: Engine):
    """The policy, made to believe that draft steps cost a hundredth of a pass: on a tiny model they cost about
    as much as one."""
    policy = engine.runner.exit_drafter.policy
    for depth in policy.depths:
        policy.costs.observe_draft_step(depth, 1, 0.3)
    deaf = {"__slots__": (), "on_draft_step": lambda self, *args: None, "on_decode_step": lambda self, *args: None}
    policy.__class__ = type("Deaf", (type(policy),), deaf)
    return policy


def with_options(max_tokens: int, **xargs):
    return greedy(max_tokens, extra_args=xargs)


@pytest.fixture(scope="module")
def plain_tokens(tiny_llama):
    with Engine(tiny_llama) as engine:
        return engine.tokens(PROMPTS, greedy(100))


@pytest.mark.parametrize("depth", [3, 4])
def test_a_bound_of_zero_is_lossless(depth, tiny_llama, lens_ramps, plain_tokens):
    with Engine(tiny_llama, adaptive(lens_ramps(depth=depth), max_exits=6)) as engine:
        cheap_draft_steps(engine)
        assert engine.tokens(PROMPTS, greedy(100)) == plain_tokens
        counts = engine.counts()
    assert counts["accepted"] > 0 and counts["divergences"] == 0


def test_exits_of_prompt_lookup_take_no_draft_step_and_are_checked_like_any(tmp_path):
    model = make_forgetful(build_tiny_model(tmp_path / "model"))
    ramps = build_lens_ramps(tmp_path / "ramps", model, depth=3)
    with Engine(model) as engine:
        (text,) = engine.tokens(PROMPTS[:1], greedy(40))
        # Says that another token comes after what the model is about to write.
        misleading = {"prompt_token_ids": [*text[:20], text[20] + 1, *range(5, 30), text[0]]}
        prompts = [*PROMPTS, misleading]
        plain = engine.tokens(prompts, greedy(120))
    for bound in (0.0, 0.2):
        with Engine(model, adaptive(ramps, max_exits=6, accuracy_bound=bound)) as engine:
            policy = cheap_draft_steps(engine)
            policy.costs.draft_steps.clear()
            policy.costs.observe_draft_step(3, 1, 1e6)  # none ever pays
            tokens = engine.tokens(prompts, greedy(120))
            counts = engine.counts()
        assert counts["draft_steps"] == 0
        assert counts["lookup_exits"] == counts["accepted"] + counts["released"] > 0.5 * counts["emitted"]
        assert counts["held"] > counts["accepted"], "the misleading one"
        assert (counts["released"] > 0) == (bound > 0)
        assert tokens == plain or bound > 0


def test_the_policy_hears_of_passes_that_read_prompts_too(tiny_llama, lens_ramps):
    passed, completed = [], []
    ears = {
        "__slots__": (),
        "on_step": lambda self, ms: passed.append(ms),
        "on_decode_step": lambda self, num_requests, num_tokens, ms: completed.append((num_requests, ms)),
    }
    with Engine(tiny_llama, adaptive(lens_ramps(depth=3))) as engine:
        policy = engine.runner.exit_drafter.policy
        policy.__class__ = type("Listening", (type(policy),), ears)
        engine.add("first", PROMPTS[0], greedy(60))
        for _ in range(3):
            engine.step()
        before = len(passed), len(completed)
        engine.add("second", PROMPTS[1], greedy(60))
        engine.step()
        assert (len(passed), len(completed)) == (before[0] + 1, before[1]), "it read the second prompt"
        engine.step()
        assert completed[-1] == (2, passed[-1]) and passed[-1] > 0


@pytest.mark.parametrize("kind", ["agreement", "regret"])
def test_accepted_divergences_keep_the_bound_and_are_what_the_full_model_says(kind, tiny_llama, lens_ramps):
    """Ask plain vLLM for the next token after every emitted prefix: the divergences must be exactly those counted."""
    bound = 0.1
    options = adaptive(lens_ramps(depth=3), accuracy_bound=bound, bound_kind=kind)
    with Engine(tiny_llama, options) as engine:
        # Whatever the budget pays for: what is tested is the accounting.
        cheap_draft_steps(engine).max_regret_nats = 1e6
        engine.add("warm", PROMPTS[1], greedy(150))
        engine.run()
        before = engine.counts()
        engine.add("a", PROMPTS[0], greedy(60))
        (answer,) = engine.run().values()
        counts = engine.counts()
        spent = counts["regret_nats"] if kind == "regret" else counts["divergences"]
        assert spent <= bound * counts["emitted"]
    tokens = [*PROMPTS[0]["prompt_token_ids"], *answer]
    start = len(tokens) - len(answer)
    with Engine(tiny_llama) as plain:
        prefixes = [{"prompt_token_ids": tokens[:position]} for position in range(start, len(tokens))]
        choices = [choice for (choice,) in plain.tokens(prefixes, greedy(1))]
    differ = sum(choice != token for choice, token in zip(choices, answer, strict=True))
    unverified = counts["unverified"] - before["unverified"]
    known = counts["divergences"] - before["divergences"]
    assert known <= differ <= known + unverified
    assert counts["accepted_divergences"] > before["accepted_divergences"], "nothing was let through"
    if kind == "regret":
        assert counts["released"] == 0


def test_the_bound_holds_at_every_step_for_the_server_and_each_request(tiny_llama, lens_ramps):
    bound = 0.05
    with Engine(tiny_llama, adaptive(lens_ramps(depth=3), accuracy_bound=bound)) as engine:
        policy = cheap_draft_steps(engine)
        policy.release_confidence, policy.max_regret_nats = 0.5, 1e6
        for index, prompt in enumerate(PROMPTS):
            engine.add(str(index), prompt, greedy(150))
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            counts = engine.counts()
            assert counts["divergences"] + counts["outstanding"] + counts["unverified"] <= bound * counts["emitted"]
            engine.check_integrity()
        assert counts["accepted_divergences"] > 0 and counts["released"] > 0


def test_requests_choose_for_themselves(tiny_llama, lens_ramps, plain_tokens):
    with Engine(tiny_llama, adaptive(lens_ramps(depth=3), accuracy_bound=0.3, max_exits=3)) as engine:
        cheap_draft_steps(engine).max_regret_nats = 1e6
        engine.tokens(PROMPTS[:2], greedy(100))  # the server can afford divergences from here on
        params = [
            with_options(100),
            with_options(100, accuracy_bound=0.0),
            with_options(100, early_exit=0),
            with_options(100, tpt_target_ms=1e9),
            with_options(100, tpt_target_ms=1e-6),
        ]
        for index, item in enumerate(params):
            engine.add(str(index), PROMPTS[index], item)
        requests, seen = engine.runner.ledger.requests, {}
        original = engine.runner.ledger.end_request
        engine.runner.ledger.end_request = lambda name: (seen.update({name[0]: requests.get(name)}), original(name))[1]
        answers = engine.run()
    for index in (1, 2, 3):
        assert answers[str(index)] == plain_tokens[index], f"request {index} was to be lossless"
    assert answers["0"] != plain_tokens[0] and answers["4"] != plain_tokens[4]
    assert seen["2"].held == [] and not seen["2"].takes_exits


def test_a_bad_option_that_no_api_refused_costs_the_request_its_options_and_nothing_else(
    tiny_llama, lens_ramps, plain_tokens
):
    with Engine(tiny_llama, adaptive(lens_ramps(depth=3))) as engine:
        params = with_options(100, accuracy_bound="much")
        assert engine.tokens(PROMPTS[:1], params) == plain_tokens[:1]


def test_the_policy_hears_once_of_each_request(tiny_llama, lens_ramps):
    with Engine(tiny_llama, adaptive(lens_ramps(depth=3))) as engine:
        policy, heard = engine.runner.exit_drafter.policy, []
        listening = {"__slots__": (), "on_request": lambda self: heard.append(self)}
        policy.__class__ = type("Listening", (type(policy),), listening)
        engine.tokens(PROMPTS, greedy(30))
    assert len(heard) == len(PROMPTS)


def test_a_failing_policy_leaves_plain_serving(tiny_llama, lens_ramps, plain_tokens):
    for method in ("on_request", "start", "decide", "wants_another_step", "on_verdict", "on_decode_step"):
        with Engine(tiny_llama, adaptive(lens_ramps(depth=4), max_exits=3)) as engine:
            policy = cheap_draft_steps(engine)

            def fail(self, *args, **kwargs):
                raise RuntimeError("injected")

            policy.__class__ = type("Failing", (type(policy),), {"__slots__": (), method: fail})
            assert engine.tokens(PROMPTS, greedy(100)) == plain_tokens, method
            status = engine.status()
            assert status["active"] is False and status["counts"]["fallbacks"] == 1, method


def test_the_feedback_log_tells_what_happened(tiny_llama, lens_ramps, tmp_path):
    path = tmp_path / "log.jsonl"
    with Engine(
        tiny_llama, {"ramps": str(lens_ramps(depth=4)), "hold_threshold": 0.0, "feedback_log": str(path)}
    ) as engine:
        engine.tokens(PROMPTS[:2], greedy(60))
        counts = engine.counts()
    steps = list(read_steps(path))
    exits = [exit_ for step in steps for exit_ in step.exits]
    assert read_header(path)["num_layers"] == 4
    assert len({exit_.request for exit_ in exits}) == 2
    assert 0.8 * counts["held"] <= sum(exit_.taken == 1 for exit_ in exits) <= counts["held"]
    assert all(exit_.agrees and not exit_.regret_nats and exit_.depth == 4 for exit_ in exits)  # a perfect ramp
    assert {step.num_requests for step in steps} <= {1, 2}
    assert all(step.verify_ms > 0 and all(ms > 0 for _, ms in step.draft_steps) for step in steps)
    assert oracle(steps, LogCosts(steps), depth=4).tokens_per_pass > 2


def test_experience_survives_a_restart(tiny_llama, lens_ramps, tmp_path):
    path = tmp_path / "state.json"
    options = adaptive(lens_ramps(depth=4), controller_state=str(path))
    with Engine(tiny_llama, options) as engine:
        engine.tokens(PROMPTS, greedy(40))
        learned = engine.runner.exit_drafter.policy.state()
    with Engine(tiny_llama, options) as engine:
        assert json.loads(json.dumps(engine.runner.exit_drafter.policy.state())) == json.loads(json.dumps(learned))
    with Engine(tiny_llama, adaptive(lens_ramps(depth=3), controller_state=str(path))) as engine:  # other ramps
        assert not engine.runner.exit_drafter.policy.calibrations


def test_the_depth_may_change_at_any_step(tiny_llama, tmp_path, plain_tokens):
    """Ramps at several depths, one in use after the other; the shadow knows that the deepest is always right."""
    ramps = build_lens_ramps(tmp_path / "ramps", tiny_llama, depth=3, confidence_offset=6.0, others=(1, 4))
    with Engine(tiny_llama, adaptive(ramps, max_exits=3)) as engine:
        runner, seen, shadows = engine.runner, set(), []
        policy, steps = runner.exit_drafter.policy, 0

        def start(self, num_requests):  # and takes every exit: what draft steps cost here and now is another test's
            nonlocal steps
            steps += 1
            self.depth_choice.active = self.depth = (3, 1, 4)[steps // 5 % 3]
            seen.add(self.depth)
            return self.max_exits

        def on_shadow(self, depth, active_agrees, agrees):
            shadows.append((self.depth, depth, active_agrees, agrees))

        runner.shadow.__class__ = type("Eager", (type(runner.shadow),), {"__setattr__": _never_due})
        turning = {"__slots__": (), "start": start, "on_shadow": on_shadow, "wants_another_step": lambda *_: True}
        policy.__class__ = type("Turning", (type(policy),), turning)
        assert engine.tokens(PROMPTS, greedy(100)) == plain_tokens
    assert seen == {1, 3, 4}
    assert len(shadows) > 30
    assert all(agrees for _, depth, _, agrees in shadows if depth == 4)
    assert all(active for depth, _, active, _ in shadows if depth == 4)
    assert not all(agrees for _, depth, _, agrees in shadows if depth == 1)


def _never_due(self, name, value):
    object.__setattr__(self, name, 0.0 if name == "_due_s" else value)
