"""What a client asks for is what plain vLLM gives; release switches itself off where it must."""

import pytest

from tests.harness import Engine, token_prompts

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


def make_params(n: int = 1, regex: str | None = None, **given):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if regex is not None:
        given["structured_outputs"] = StructuredOutputsParams(regex=regex)
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "n": n, **given})


def results(engine, params):
    return [
        (list(one.token_ids), one.text, one.finish_reason, one.stop_reason, scores(one.logprobs))
        for output in engine.generate(PROMPTS, params)
        for one in output.outputs
    ]


def scores(logprobs):
    if logprobs is None:
        return None
    return [{token: round(item.logprob, 3) for token, item in position.items()} for position in logprobs]


@pytest.fixture(scope="module")
def plain_results(tiny_llama):
    with Engine(tiny_llama) as plain:
        return {name: results(plain, make_params(**given)) for name, given in EXACT.items()}


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


def test_a_plain_greedy_request_beside_one_with_logprobs_is_released(releasing):
    from vllm import SamplingParams

    before = releasing.counts()["released"]
    plain = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    outputs = releasing.generate(PROMPTS[:2], [plain, make_params(logprobs=2)])
    assert releasing.counts()["released"] > before
    assert len(outputs[1].outputs[0].logprobs) == 30
    assert outputs[0].outputs[0].logprobs is None


def test_stop_strings(tiny_llama, lens_ramps):
    knobs = {"ramps": str(lens_ramps(depth=4)), **RELEASE_ALL}
    with Engine(tiny_llama) as plain:
        text = results(plain, make_params())[0][1]
        stop = text.split()[12]
        expected = results(plain, make_params(stop=[stop]))
    with Engine(tiny_llama, knobs) as engine:
        # Exits may run past a stop string, which is found in the text, as speculation does; what is shown is the same.
        got = results(engine, make_params(stop=[stop]))
        assert [item[1:4] for item in got] == [item[1:4] for item in expected]


def test_several_answers_to_one_prompt(tiny_llama, lens_ramps):
    knobs = {"ramps": str(lens_ramps(depth=3)), **RELEASE_ALL}
    with Engine(tiny_llama, knobs) as engine:
        (output,) = engine.generate(PROMPTS[:1], make_params(n=3, temperature=1.0, seed=1))
        counts = engine.counts()
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert all(len(one.token_ids) == 30 for one in output.outputs)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    assert counts["released"] == 0 and counts["emitted"] == 90


@pytest.mark.parametrize("given", [{}, {"top_k": 5}, {"top_p": 0.7}], ids=["temperature", "top_k", "top_p"])
def test_seeded_sampling_has_plain_vllms_distribution(given, tmp_path):
    """Chi-square test of homogeneity of the third token, 4000 seeds each, on a model with a vocabulary of 12."""
    import numpy as np
    from scipy.stats import chi2_contingency
    from vllm import SamplingParams

    from tests.tiny import build_lens_ramps, build_tiny_model

    model = build_tiny_model(tmp_path / "model", vocab_size=12, seed=3)
    ramps = build_lens_ramps(tmp_path / "ramps", model, depth=3, confidence_offset=6.0)
    num_seeds, prompt = 4000, {"prompt_token_ids": [1, 5, 7, 9]}

    def histogram(engine, first_seed):
        params = [
            SamplingParams(temperature=0.8, max_tokens=6, ignore_eos=True, seed=first_seed + i, **given)
            for i in range(num_seeds)
        ]
        outputs = engine.generate([prompt] * num_seeds, params)
        third = [output.outputs[0].token_ids[2] for output in outputs]
        return np.bincount(third, minlength=12)

    with Engine(model, max_num_seqs=64) as plain:
        expected = histogram(plain, 0)
    with Engine(model, {"ramps": str(ramps), "hold_threshold": 0.0}, max_num_seqs=64) as engine:
        got = histogram(engine, 100_000)
        counts = engine.counts()
    assert 0.05 < counts["accepted"] / counts["held"] < 0.95
    table = np.stack([expected, got])
    table = table[:, table.sum(axis=0) >= 10]
    assert table.shape[1] >= 3
    assert chi2_contingency(table).pvalue > 1e-3
