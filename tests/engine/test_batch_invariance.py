"""A text is the same whatever the load: in bfloat16 where a CPU has kernels for it, else in float32, compiled, on the
default model; and it is tried at the start."""

import pytest

from apparate_llm.default_model import default_model
from apparate_llm.host.dtype import has_16_bit_kernels
from apparate_llm.models import screened_head
from apparate_llm.models.quantised_heads import has_fast_int8
from apparate_llm.models.screened_head import ScreenedHead
from tests.harness import Engine, greedy, token_prompts
from tests.logged import logged

PROMPTS = (
    "Write a Python function that reverses a list.",
    "Why is the sky blue?",
    "Translate into French: the cat sleeps on the chair.",
    "A train leaves at 9:40 and takes 85 minutes. When does it arrive?",
)
NUM_TOKENS = 40
REAL = {
    "dtype": "bfloat16" if has_16_bit_kernels() else "float32",  # as it is served
    "enforce_eager": False,
    "max_model_len": 512,
    "max_num_batched_tokens": 512,  # a start reads so many
    "kv_cache_memory_bytes": 128 << 20,
}


def prompts_of(engine):
    tokenizer = engine.llm.get_tokenizer()
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    return [
        {"prompt_token_ids": tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)}
        for chat in chats
    ]


def watch_screening(monkeypatch):
    """Whether there was an answer, each time a head was screened; it is, whether it is faster here or not."""
    answered = []

    def scores(head, hidden, asked=()):
        given = original(head, hidden, asked)
        answered.append(given is not None)
        return given

    original = ScreenedHead.scores
    monkeypatch.setattr(screened_head, "LEAST_ANSWERED", 0.0)
    monkeypatch.setattr(ScreenedHead, "try_here", lambda head: head.most_rows)
    monkeypatch.setattr(ScreenedHead, "scores", scores)
    return answered


def test_exits_change_no_token_at_any_load(monkeypatch):
    """Plain vLLM's steps all have four rows, as its answers begin and end together: rows from two on are alike there
    too, so every step can be compared. Its steps of a single row cannot, as they round in another order."""
    screened = watch_screening(monkeypatch)
    model = default_model()
    with Engine(model, **REAL) as plain:
        prompts = prompts_of(plain)
        expected = plain.tokens(prompts, greedy(NUM_TOKENS))
    with Engine(model, {"threshold": 1.0, "hold_threshold": 1.0}, **REAL) as engine:
        assert engine.status()["batch_invariance"]["holds"], engine.status()["batch_invariance"]
        assert engine.tokens(prompts, greedy(NUM_TOKENS)) == expected, "idle, four at a time"
        assert engine.counts()["held"] == 0
        assert engine.tokens(prompts, greedy(NUM_TOKENS), one_by_one=True) == expected, "idle, one at a time"
        assert engine.llm.collective_rpc("early_exit_configure", args=({"hold_threshold": 0.05},)) == [None]
        for one_by_one in (False, True):
            assert engine.tokens(prompts, greedy(NUM_TOKENS), one_by_one=one_by_one) == expected, "lossless"
        counts = engine.counts()
    assert counts["accepted"] > 0 and counts["held"] > counts["accepted"] and counts["fallbacks"] == 0
    if has_fast_int8():
        assert sum(screened) > 100, "heads were screened"


@pytest.mark.parametrize("options", [{"policy": "off"}, {"hold_threshold": 0.0}])
def test_a_start_compares_whole_passes_and_says_what_it_found(options, tiny_llama, lens_ramps, monkeypatch):
    from apparate_llm.engine import invariant_worker

    options = options | {"ramps": str(lens_ramps(depth=3))}
    with logged() as lines, Engine(tiny_llama, options) as engine:
        coverage = engine.core.model_executor.driver_worker.worker.coverage
        assert coverage.holds and coverage.passes_compared == 10
    assert not any("batch" in line for line in lines)

    def cover_badly(model, dtype):
        coverage = original(model, dtype)
        method = model.lm_head.quant_method
        original_apply = method.apply
        method.apply = lambda layer, rows, bias=None: original_apply(layer, rows, bias) + (len(rows) > 3)
        return coverage

    original = invariant_worker.cover
    monkeypatch.setattr(invariant_worker, "cover", cover_badly)
    with logged() as lines, Engine(tiny_llama, options) as engine:
        assert not engine.core.model_executor.driver_worker.worker.coverage.holds
    assert any("whole passes differ" in line for line in lines)


def test_it_can_be_left_out(tiny_llama, lens_ramps):
    with Engine(tiny_llama, {"ramps": str(lens_ramps(depth=3)), "batch_invariant": False}) as engine:
        assert engine.status()["batch_invariance"] is None
        assert engine.tokens(token_prompts(2), greedy(8))
