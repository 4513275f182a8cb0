"""What a client asks for is what plain vLLM gives; release switches itself off where it must."""

import pytest
import torch

from tests.harness import Engine, token_prompts
from tests.logged import logged

PROMPTS = token_prompts(4, shared=20)
RELEASE_ALL = {"accuracy_bound": 0.99, "threshold": 0.01, "hold_threshold": 0.0}
# Requests whose answer needs the full model's scores: never a released exit, the very answer of plain vLLM.
EXACT = {
    "logprobs": {"logprobs": 3},
    "presence penalty": {"presence_penalty": 1.5},
    "frequency penalty": {"frequency_penalty": 1.0},
    "repetition penalty": {"repetition_penalty": 1.3},
    "min tokens": {"min_tokens": 20, "stop_token_ids": [15, 34, 81]},
    "bad words": {"bad_words": ["w29", "w10"]},
    "allowed tokens": {"allowed_token_ids": list(range(20, 90))},
    "structured output": {"regex": "(w1|w2|w3|w4|w5)( (w6|w7|w8|w9))*"},
}

# Requests that even held exits would change: none at all, the very answer of plain vLLM.
WITHOUT_EXITS = {
    "seed": {"temperature": 1.0, "seed": 7},
    "seed and nucleus": {"temperature": 0.8, "seed": 8, "top_p": 0.8, "top_k": 40},
    "seed and penalties": {"temperature": 0.8, "seed": 9, "presence_penalty": 1.0, "bad_words": ["w29"]},
    "min_p": {"temperature": 1.2, "seed": 10, "min_p": 0.2},
    "logit_bias": {"logit_bias": {7: 100.0, 90: -100.0, 31: 2.5}},
    "logit_bias and logprobs": {"logit_bias": {90: 3.0}, "logprobs": 2},
    "scores of tokens": {"logprob_token_ids": [5, 80, 31]},
}
CUSTOM = {"extra_args": {"banned": [29, 10, 77, 43, 118]}}


def make_params(n: int = 1, regex: str | None = None, **given):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if regex is not None:
        given["structured_outputs"] = StructuredOutputsParams(regex=regex)
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "n": n, **given})


def results(engine, params):
    return [answers(output) for output in engine.generate(PROMPTS, params)]


def answers(output):
    (one,) = output.outputs
    return list(one.token_ids), one.text, one.finish_reason, one.stop_reason, scores(one.logprobs)


def banning():
    """A logits processor of a user's: tokens that a request names are not generated."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Banning(AdapterLogitsProcessor):
        def is_argmax_invariant(self):
            return False

        def new_req_logits_processor(self, params):
            banned = (params.extra_args or {}).get("banned")
            return (lambda output_ids, logits: logits.index_fill_(0, torch.tensor(banned), -9e9)) if banned else None

    return Banning


def scores(logprobs):
    if logprobs is None:
        return None
    return [{token: round(item.logprob, 3) for token, item in position.items()} for position in logprobs]


@pytest.fixture(scope="module")
def plain_results(tiny_llama):
    with Engine(tiny_llama, logits_processors=[banning()]) as plain:
        return {
            name: results(plain, make_params(**given))
            for name, given in (EXACT | WITHOUT_EXITS | {"custom": CUSTOM}).items()
        }


@pytest.fixture(scope="module")
def releasing(tiny_llama, lens_ramps, plain_results):  # one engine at a time: the plain one is gone by now
    with Engine(tiny_llama, {"ramps": str(lens_ramps(depth=3)), **RELEASE_ALL}) as engine:
        yield engine


@pytest.mark.parametrize("name", EXACT)
def test_answers_that_need_the_full_models_scores(name, releasing, plain_results):
    before = releasing.counts()
    assert results(releasing, make_params(**EXACT[name])) == plain_results[name]
    after = releasing.counts()
    assert after["released"] == before["released"]
    assert after["held"] > before["held"] or name == "structured output"  # a grammar may reject every exit first


@pytest.mark.parametrize("name", WITHOUT_EXITS)
def test_requests_that_exits_would_change_take_none_alone_and_beside_others_that_do(name, releasing, plain_results):
    params = make_params(**WITHOUT_EXITS[name])
    before = releasing.counts()
    assert results(releasing, params) == plain_results[name]
    after = releasing.counts()
    assert (after["released"], after["held"]) == (before["released"], before["held"])
    other = [make_params(), make_params(temperature=0.9), make_params(logprobs=1), make_params(presence_penalty=1.0)]
    everything = [*other, params]
    mixed = [
        answers(releasing.generate([*token_prompts(4, shared=9), prompt], everything)[-1]) for prompt in PROMPTS[:2]
    ]
    assert mixed == plain_results[name][:2]
    now = releasing.counts()
    assert now["emitted"] - after["emitted"] == 2 * 5 * 30
    # Beside scores of tokens nobody has exits: they come from vLLM's plain sampler only.
    assert (now["held"] > after["held"] and now["released"] > after["released"]) == (name != "scores of tokens")


def test_a_request_for_scores_of_tokens_joins_others_whose_exits_are_under_way(releasing, plain_results):
    before = releasing.counts()
    for index in range(2):
        releasing.add(f"other-{index}", PROMPTS[index], make_params(logprobs=3))
    while releasing.counts()["held"] == before["held"]:
        releasing.step()
    releasing.add("scores", PROMPTS[2], make_params(logprob_token_ids=[5, 80, 31]))
    tokens = releasing.run()
    assert tokens["scores"] == plain_results["scores of tokens"][2][0]
    assert [tokens[f"other-{index}"] for index in range(2)] == [plain_results["logprobs"][i][0] for i in range(2)]


def test_a_plain_greedy_request_beside_one_with_logprobs_is_released(releasing):
    from vllm import SamplingParams

    before = releasing.counts()["released"]
    plain = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    outputs = releasing.generate(PROMPTS[:2], [plain, make_params(logprobs=2)])
    assert releasing.counts()["released"] > before
    assert len(outputs[1].outputs[0].logprobs) == 30
    assert outputs[0].outputs[0].logprobs is None


def test_an_answer_ends_only_where_the_full_model_ends_it(releasing):
    """Exits diverge all along, so some would end an answer that goes on."""
    params = make_params(stop_token_ids=list(range(20, 50)))
    before = releasing.counts()
    ended = [
        {"prompt_token_ids": [*output.prompt_token_ids, *output.outputs[0].token_ids]}
        for output in releasing.generate(token_prompts(8, shared=20), params)
        if output.outputs[0].finish_reason == "stop"
    ]
    after = releasing.counts()
    assert after["divergences"] > before["divergences"] and len(ended) > 2
    prefixes = [{"prompt_token_ids": text["prompt_token_ids"][:-1]} for text in ended]
    choices = releasing.tokens(prefixes, make_params(max_tokens=1, extra_args={"early_exit": 0}))
    assert [choice for (choice,) in choices] == [text["prompt_token_ids"][-1] for text in ended]


def test_a_users_logits_processors_and_prompts_read_in_chunks_by_seeded_requests(tiny_llama, lens_ramps, plain_results):
    options = {"ramps": str(lens_ramps(depth=3)), **RELEASE_ALL}
    chunks = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
    with logged() as lines, Engine(tiny_llama, options, logits_processors=[banning()], **chunks) as engine:
        assert any("the logits processors Banning may act on any" in line for line in lines)
        assert results(engine, make_params(**CUSTOM)) == plain_results["custom"]
        assert results(engine, make_params(**WITHOUT_EXITS["seed"])) == plain_results["seed"]
        counts = engine.counts()
    assert counts["held"] == counts["released"] == 0


def test_stop_strings(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=4)), **RELEASE_ALL}
    with Engine(tiny_llama) as plain:
        text = results(plain, make_params())[0][1]
        stop = text.split()[12]
        expected = results(plain, make_params(stop=[stop]))
    with Engine(tiny_llama, options) as engine:
        # Held exits may run past a stop string, which is found in the text, as speculation does; a wrong token that
        # completes one is not let through.
        got = results(engine, make_params(stop=[stop]))
        assert [item[1:4] for item in got] == [item[1:4] for item in expected]
        assert engine.counts()["held"] > 0 == engine.counts()["released"]
        # Nor do tokens past the string earn anything that others could spend.
        assert engine.runner.ledger.budget.server.earned_nano == 0


def test_several_answers_to_one_prompt(tiny_llama, lens_ramps):
    options = {"ramps": str(lens_ramps(depth=3)), **RELEASE_ALL}
    with Engine(tiny_llama, options) as engine:
        (output,) = engine.generate(PROMPTS[:1], make_params(n=3, temperature=1.0, seed=1))
        counts = engine.counts()
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert all(len(one.token_ids) == 30 for one in output.outputs)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    assert counts["released"] == 0 and counts["emitted"] == 90


@pytest.mark.parametrize("given", [{}, {"top_k": 5}, {"top_p": 0.7}], ids=["temperature", "top_k", "top_p"])
def test_sampling_has_plain_vllms_distribution(given, tmp_path):
    """Chi-square test of homogeneity of the third token, 4000 answers each, on a model with a vocabulary of 12."""
    import numpy as np
    from scipy.stats import chi2_contingency
    from vllm import SamplingParams

    from tests.tiny import build_lens_ramps, build_tiny_model

    model = build_tiny_model(tmp_path / "model", vocab_size=12, seed=3)
    ramps = build_lens_ramps(tmp_path / "ramps", model, depth=3, confidence_offset=6.0)
    num_answers, prompt = 4000, {"prompt_token_ids": [1, 5, 7, 9]}

    def histogram(engine):
        params = SamplingParams(temperature=0.8, max_tokens=6, ignore_eos=True, **given)
        outputs = engine.generate([prompt] * num_answers, params)
        third = [output.outputs[0].token_ids[2] for output in outputs]
        return np.bincount(third, minlength=12)

    with Engine(model, max_num_seqs=64) as plain:
        expected = histogram(plain)
    with Engine(model, {"ramps": str(ramps), "hold_threshold": 0.0}, max_num_seqs=64, seed=1) as engine:
        got = histogram(engine)
        counts = engine.counts()
    assert 0.05 < counts["accepted"] / counts["held"] < 0.95
    table = np.stack([expected, got])
    table = table[:, table.sum(axis=0) >= 10]
    assert table.shape[1] >= 3
    assert chi2_contingency(table).pvalue > 1e-3
