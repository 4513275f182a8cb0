"""Released exits: emitted early, checked later, counted exactly."""

import pytest

from tests.harness import Engine, greedy, token_prompts

PROMPTS = token_prompts(6, shared=40)
RELEASE_ALL = {"accuracy_bound": 0.99, "threshold": 0.01, "hold_threshold": 0.0}


def test_a_released_token_leaves_one_step_before_its_verification_pass(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=4)), **RELEASE_ALL}
    with Engine(tiny_llama, options) as engine:
        engine.add("a", PROMPTS[0], greedy(30))
        early = 0
        while engine.llm.llm_engine.has_unfinished_requests():
            tokens = engine.step().get("a")
            (request,) = engine.scheduler.requests.values() or (None,)
            if tokens and request is not None:
                outstanding = engine.runner.ledger.requests[request.request_id].outstanding
                num_prompt = request.num_prompt_tokens
                for exit_ in outstanding:
                    # The client has it, and no pass has computed its position.
                    assert tokens[exit_.position - num_prompt] == exit_.token_id
                    assert request.num_computed_tokens <= exit_.position
                early += len(outstanding)
        engine.idle()
        counts = engine.counts()
    assert early > 0
    assert counts["released"] >= early


def test_a_first_token_does_not_wait_for_the_draft_steps_after_it(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=4)), **RELEASE_ALL}
    with Engine(tiny_llama, options) as engine:
        happened = []

        def watch(owner, name):
            original = getattr(owner, name)
            setattr(owner, name, lambda *args, **kwargs: (happened.append(name), original(*args, **kwargs))[1])

        watch(engine.scheduler, "update_from_output")  # takes the step's tokens
        watch(engine.runner.exit_drafter, "run")
        engine.add("a", PROMPTS[0], greedy(30))
        assert len(engine.step()["a"]) == 1
        assert happened == ["update_from_output", "run"]
        assert engine.counts()["released"] == 0  # nothing can leave with this step any more
        (request,) = engine.scheduler.requests.values()
        held = len(request.spec_token_ids)
        assert held > 0
        tokens = engine.step()["a"]
        assert happened[2:] == ["run", "update_from_output"]
        assert len(tokens) > 1 + held  # those held, the full model's own and released ones
        engine.run()


@pytest.mark.parametrize("depth", [3, 4])
def test_every_released_exit_gets_its_verdict_unless_its_request_ended(depth, tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=depth)), **RELEASE_ALL}
    with Engine(tiny_llama, options) as engine:
        ended_with_open_exits = 0
        original = engine.runner.ledger.end_request

        def record(request_id):
            nonlocal ended_with_open_exits
            ended_with_open_exits += len(engine.runner.ledger.requests[request_id].outstanding)
            original(request_id)

        engine.runner.ledger.end_request = record
        for index, prompt in enumerate(PROMPTS):
            engine.add(str(index), prompt, greedy(40))
        tokens = engine.run()
        counts = engine.counts()
    assert all(len(answer) == 40 for answer in tokens.values())
    assert counts["released"] > 50
    assert counts["verified"] == counts["released"] - ended_with_open_exits
    assert counts["unverified"] == ended_with_open_exits
    assert counts["emitted"] == 240
    assert counts["outstanding"] == 0
    if depth == 4:
        assert counts["divergences"] == 0
    else:
        assert 0 < counts["divergences"] < counts["verified"]


@pytest.mark.parametrize("depth", [2, 3])
def test_verdicts_are_the_full_models_choice_after_what_was_emitted(depth, tiny_llama, lens_ramps):
    """Ask plain vLLM for the next token after every emitted prefix: the divergences must be exactly those recorded."""
    options = {"ramps": str(lens_ramps(depth=depth)), **RELEASE_ALL, "accuracy_bound": 0.9}
    with Engine(tiny_llama, options) as engine:
        seen = []
        original = engine.runner.ledger.verify_released

        def record(pending, verdicts, regrets):
            for item, verdict, regret in zip(pending, verdicts, regrets, strict=True):
                seen.append((item.exit.position, item.exit.token_id, verdict))
                assert (regret > 0) == (item.exit.token_id != verdict)
            return original(pending, verdicts, regrets)

        engine.runner.ledger.verify_released = record
        (answer,) = engine.tokens(PROMPTS[:1], greedy(40))
        counts = engine.counts()
    prompt = PROMPTS[0]["prompt_token_ids"]
    tokens = [*prompt, *answer]
    with Engine(tiny_llama) as plain:
        prefixes = [{"prompt_token_ids": tokens[:position]} for position, _, _ in seen]
        choices = [choice for (choice,) in plain.tokens(prefixes, greedy(1))]
    assert [verdict for _, _, verdict in seen] == choices
    assert [token for _, token, _ in seen] == [tokens[position] for position, _, _ in seen]
    assert counts["divergences"] == sum(token != verdict for _, token, verdict in seen) > 0


def test_the_accuracy_bound_holds_at_every_step(tiny_llama, lens_ramps):
    bound = 0.1
    options = {"ramps": str(lens_ramps(depth=3)), **RELEASE_ALL, "accuracy_bound": bound}
    with Engine(tiny_llama, options) as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.add(str(index), prompt, greedy(120))
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            counts = engine.counts()
            assert counts["divergences"] + counts["outstanding"] + counts["unverified"] <= bound * counts["emitted"]
        assert counts["divergences"] > 0, "the test's ramp never erred, so the bound was not tested"


@pytest.mark.parametrize(
    "vllm",
    [
        {"block_size": 32, "num_gpu_blocks_override": 14, "enable_prefix_caching": True},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True},
    ],
    ids=["preemption", "short chunks"],
)
def test_verdicts_survive(vllm, tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=4)), **RELEASE_ALL}
    prompts = token_prompts(8, shared=70)
    with Engine(tiny_llama) as plain:
        expected = plain.tokens(prompts, greedy(60))
    with Engine(tiny_llama, options, **vllm) as engine:
        assert engine.tokens(prompts, greedy(60)) == expected
        counts = engine.counts()
    assert counts["released"] > 100
    assert counts["divergences"] == 0  # a perfect ramp: any other verdict would be one taken at the wrong row
    assert counts["verified"] + counts["unverified"] == counts["released"]


def test_identical_requests_side_by_side_keep_their_verdicts_through_preemption(tiny_llama, lens_ramps):
    """The prefix cache may hold another request's copy of the very positions whose verdicts are due."""
    options = {"ramps": str(lens_ramps(depth=4)), **RELEASE_ALL}
    prompts = [token_prompts(1, shared=60)[0]] * 8
    with Engine(tiny_llama, options, block_size=32, num_gpu_blocks_override=14, enable_prefix_caching=True) as engine:
        at_end = 0
        original = engine.runner.ledger.end_request

        def record(request_id):
            nonlocal at_end
            last = engine.runner.ledger.requests[request_id]
            at_end += len(last.outstanding)
            original(request_id)

        engine.runner.ledger.end_request = record
        answers = engine.tokens(prompts, greedy(60))
        counts = engine.counts()
    assert all(answer == answers[0] for answer in answers)
    assert counts["unverified"] == at_end
    assert counts["unverified"] <= 8 * 3, "only a request's last step may leave exits unverified"


def test_aborted_requests_leave_nothing_behind(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=4)), **RELEASE_ALL}
    with Engine(tiny_llama, options) as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.add(str(index), prompt, greedy(60))
        for _ in range(4):
            engine.step()
        for index in range(6):
            engine.abort(str(index))
        engine.run()
        counts = engine.counts()
        assert not engine.runner.ledger.requests
        # What the last step brought before a client left earns for nobody else.
        server = engine.runner.ledger.budget.server
        assert 0 < server.earned_nano < server.per_token_nano * (counts["emitted"] - 6)
    assert counts["unverified"] > 0
    assert counts["released"] == counts["verified"] + counts["unverified"]


def test_an_exit_that_is_an_end_token_is_held_and_ends_the_request_there(tiny_llama, lens_ramps):
    from vllm import SamplingParams

    with Engine(tiny_llama) as plain:
        (expected,) = plain.tokens(PROMPTS[:1], greedy(40))
    stop = expected[17]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop_token_ids=[stop])
    options = {"ramps": str(lens_ramps(depth=4)), **RELEASE_ALL}
    with Engine(tiny_llama, options) as engine:
        (output,) = engine.generate(PROMPTS[:1], params)
        counts = engine.counts()
    answer = list(output.outputs[0].token_ids)
    assert answer == expected[: expected.index(stop) + 1]
    assert output.outputs[0].finish_reason == "stop"
    assert counts["emitted"] == len(answer)
    assert counts["accepted"] >= 1 and counts["released"] > 0
