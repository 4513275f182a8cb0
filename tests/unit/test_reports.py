"""What the client of an answer is told of its tokens: by vLLM's own output processor, from tokens to texts."""

import asyncio
from copy import copy
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine import detokenizer as vllm_detokenizer
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from apparate_llm.api.answers import Caller
from apparate_llm.api.reports import TOKENS_AT_ONCE, Choice, reporting, texts_of
from apparate_llm.exits.token_origins import REPORT_KEY

EOS, BOS = 256, 257
DELTA, CUMULATIVE, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY
TEXT = "  Hi \N{GRINNING FACE}\n\u65e5\u672c \u2028 end"


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte: every character beyond ASCII has several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(["<eos>", "<bos>"])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<eos>", bos_token="<bos>")


def outputs_of(tokenizer, params, answers, *, per_step=3, finish=FinishReason.LENGTH):
    """vLLM's outputs for answers of these tokens, some tokens at a time; and the engine's request ids."""
    processor = OutputProcessor(tokenizer, log_stats=False)
    prompt = [BOS, *tokenizer.encode("Say \u65e5")]
    request = EngineCoreRequest("r", prompt, None, params, None, 0.0, None, None, None, external_req_id="r")
    parent = ParentRequest(request) if params.n > 1 else None
    names = []
    for index in range(params.n):
        child = copy(request)
        if parent is not None:
            child.request_id, child.sampling_params = parent.get_child_info(index)
        names.append(child.request_id)
        processor.add_request(child, None, parent, index)
    outputs, live = [], dict(zip(names, answers, strict=True))
    for at in range(0, max(map(len, answers)), per_step):
        step = [
            EngineCoreOutput(name, ids[at : at + per_step], finish_reason=finish if at + per_step >= len(ids) else None)
            for name, ids in live.items()
            if ids[at : at + per_step]
        ]
        done = processor.process_outputs(step)
        outputs += done.request_outputs
        for name in done.reqs_to_abort:
            live[name] = []
    return outputs, names


def reported(tokenizer, params, answers, *, caller=None, ask=None, **how):
    """(reports, texts) of a request's choices; the engine counted every token of `answers`."""
    outputs, names = outputs_of(tokenizer, params, answers, **how)
    caller, seen = caller or Caller(), {}
    texts = ["" for _ in answers]

    async def generate(own):
        seen["key"] = own.extra_args[REPORT_KEY]
        for one in outputs:
            yield one

    async def ask_engines(method, key):
        assert (method, key) == ("early_exit_report", seen["key"])
        engine = {name: of_engine(len(ids)) for name, ids in zip(names, answers, strict=True)}
        return [{}, dict(reversed(engine.items()))]  # two engines: the second had the request

    async def drive():
        call = reporting(generate, None, params, caller, ask=ask or ask_engines, tokenizer=lambda: tokenizer)
        async for output in call:
            for choice in output.outputs:
                texts[choice.index] = (texts[choice.index] if params.output_kind is DELTA else "") + choice.text

    asyncio.run(drive())
    assert REPORT_KEY not in params.extra_args
    return caller.ordered_reports(), texts


def of_engine(num_tokens):
    origins = ["checked", "held", "released_divergence", "unverified"] * num_tokens
    return {"origins": origins[:num_tokens], "depths": ([None, 2, 0, 2] * num_tokens)[:num_tokens], "tpt_ms": 12.5}


def wanted(kind=DELTA, **params):
    return SamplingParams(output_kind=kind, extra_args={"early_exit_report": 1}, **{"max_tokens": 500, **params})


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY])
@pytest.mark.parametrize(
    ("params", "finish"),
    [
        ({}, FinishReason.LENGTH),
        ({"stop": ["\u672c", "never"]}, FinishReason.LENGTH),
        ({"stop": ["\u672c"], "include_stop_str_in_output": True}, FinishReason.LENGTH),
        ({"skip_special_tokens": False}, FinishReason.LENGTH),
        ({"skip_special_tokens": False, "spaces_between_special_tokens": False}, FinishReason.LENGTH),
        ({"skip_special_tokens": False}, FinishReason.STOP),  # EOS, which is not shown
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, FinishReason.STOP),
        ({"detokenize": False}, FinishReason.LENGTH),
    ],
)
def test_texts_are_the_choices_text_to_the_character(tokenizer, monkeypatch, slow, kind, params, finish):
    if slow:  # tokenizers that are not Hugging Face's fast ones
        monkeypatch.setattr(vllm_detokenizer, "uses_fast_detokenizer", lambda tokenizer: False)
    ids = [*tokenizer.encode(TEXT), BOS, BOS, *tokenizer.encode("x"), EOS]
    params = wanted(kind, **params)
    (report,), (text,) = reported(tokenizer, params, [ids], finish=finish)
    assert "".join(report["texts"]) == text
    assert text.startswith("  Hi \N{GRINNING FACE}\n\u65e5") or not params.detokenize
    assert "\ufffd" not in text and len(report["texts"]) == len(report["origins"]) <= len(ids)
    if params.stop:
        assert len(report["texts"]) == len("  Hi \N{GRINNING FACE}\n\u65e5\u672c".encode())
    assert sum(report["tokens"].values()) == len(report["origins"])
    assert sum(report["exits_by_depth"].values()) == len(report["origins"]) - report["tokens"]["checked"]


def test_a_character_comes_with_its_last_token(tokenizer):
    (report,), _ = reported(tokenizer, wanted(), [tokenizer.encode("a\N{GRINNING FACE}b")])
    assert report["texts"] == ["a", "", "", "", "\N{GRINNING FACE}", "b"]
    assert report["origins"] == ["checked", "held", "released_divergence", "unverified", "checked", "held"]
    assert report["divergences"] == 1 and report["divergences_at_worst"] == 2
    assert report["exits_by_depth"] == {0: 1, 2: 3} and report["tpt_ms"] == 12.5


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
def test_every_choice_of_every_prompt_has_its_index(tokenizer, kind):
    caller = Caller()
    params = wanted(kind, n=11, temperature=1.0)
    expected = []
    for prompt in range(2):
        answers = [tokenizer.encode(f"{prompt}.{number}") for number in range(11)]
        reports, texts = reported(tokenizer, params, answers, caller=caller)
        expected += texts
    assert [report["index"] for report in reports] == list(range(22))
    assert ["".join(report["texts"]) for report in reports] == expected
    assert expected[13] == "1.2"


def test_of_several_choices_one_that_sent_nothing_keeps_its_index(tokenizer):
    caller = Caller()
    reports, _ = reported(tokenizer, wanted(n=2, temperature=1.0), [[], tokenizer.encode("b")], caller=caller)
    assert [(report["index"], report["texts"]) for report in reports] == [(0, []), (1, ["b"])]


def test_a_report_that_fails_costs_the_answer_nothing(tokenizer):
    async def ask(method, key):
        raise RuntimeError("no worker")

    reports, texts = reported(tokenizer, wanted(), [tokenizer.encode("abc")], ask=ask)
    assert texts == ["abc"] and reports == []


def test_a_long_answer_lets_others_have_their_turn(tokenizer):
    ids, turns = tokenizer.encode("\N{GRINNING FACE}") * 5_000, 0
    choice = Choice(ids, [tokenizer.decode(ids)])

    async def others():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def drive():
        running = asyncio.create_task(others())
        texts = await texts_of(choice, tokenizer, wanted(FINAL_ONLY), [BOS])
        running.cancel()
        return texts

    assert len(asyncio.run(drive())) == len(ids) and turns >= len(ids) // TOKENS_AT_ONCE - 2


def test_an_output_of_all_tokens_so_far_is_read_from_where_the_last_one_ended():
    class Ids(list):
        def __getitem__(self, part):
            assert part.start == len(self) - 1, "read from its beginning"
            return super().__getitem__(part)

        def __iter__(self):
            raise AssertionError("read from its beginning")

    choice = Choice()
    for number in range(1, 5):
        so_far = Ids(range(number))
        choice.take(SimpleNamespace(token_ids=so_far, text="x", finish_reason=None, stop_reason=None), is_delta=False)
    assert choice.token_ids == [0, 1, 2, 3]
