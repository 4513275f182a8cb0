"""Synthesis on an engine whose clock the test moves: what a kill loses, and how much is under way at once."""

import pytest
import torch

from apparate_llm.prepare import synthesise
from apparate_llm.prepare.chat import ChatFormat
from apparate_llm.prepare.prompts import Opening, PromptSource
from apparate_llm.prepare.rows import SPLIT_NAMES
from apparate_llm.prepare.store import RowStore
from apparate_llm.prepare.synthesise import UNDER_WAY, Synthesiser
from tests.preparation import CONTEXT, FakeEngine, FakeLLM, Killed

SLOTS = 4
LIMIT_S = 120.0  # of work that a kill may lose


def synthesiser_on(
    engine, tokenizer, folder, *, max_prompt_tokens=96, max_answer_tokens=256, user_prompts=(), slots=SLOTS, row_s=0.0
):
    chat = ChatFormat(tokenizer, max_model_len=CONTEXT, max_answer_tokens=max_answer_tokens)
    return Synthesiser(
        FakeLLM(engine, tokenizer),
        RowStore(folder),
        PromptSource(chat, user_prompts=list(user_prompts), seed=0),
        depths=(1, 2, 3),
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        slots=slots,
        seed=0,
        row_s=row_s,
    )


def kept_tokens(folder, tokenizer):
    """Tokens of prompts and answers that are on disk; words of openings are none that the model knows."""
    store = RowStore(folder)
    texts = [ids for text in store.texts() for ids in (text.prompt, text.answer)]
    for kept in torch.load(folder / UNDER_WAY, weights_only=True) if (folder / UNDER_WAY).exists() else []:
        texts += [kept[0][0], kept[2]] if len(kept) == 4 else [tokenizer.encode(kept[2], add_special_tokens=False)]
    return sum(token >= 5 for ids in texts for token in ids)


@pytest.mark.parametrize("killed_s", [118, 143, 200, 260, 330, 480])
@pytest.mark.parametrize("step_s", [0.5, 1.5, 4.0])
def test_a_kill_loses_less_than_two_minutes_of_work_however_slow_the_model_is(
    killed_s, step_s, synthesis_clock, tiny_tokenizer, tmp_path
):
    """Prompts and answers take minutes each."""
    engine = FakeEngine(synthesis_clock, step_s=step_s, prompt_words=96)
    until = synthesis_clock.now + killed_s
    step = engine.step

    def killed_some_time():
        if synthesis_clock.now >= until:
            raise Killed
        return step()

    engine.step = killed_some_time
    synthesiser = synthesiser_on(engine, tiny_tokenizer, tmp_path)
    with pytest.raises(Killed):
        synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: False)
    lost_s = (engine.generated - kept_tokens(tmp_path, tiny_tokenizer)) * step_s / SLOTS
    assert lost_s < LIMIT_S
    again = FakeEngine(synthesis_clock, step_s=step_s, prompt_words=96)
    gone_on = synthesiser_on(again, tiny_tokenizer, tmp_path)
    assert len(gone_on.work) <= SLOTS
    gone_on.run(tokens=600, most_tokens=1e9, enough=lambda: False)
    store = RowStore(tmp_path)
    assert store.counts["answer_tokens"] >= 600 and len(store.splits()) == len(SPLIT_NAMES)
    assert all(len(text.answer) <= 256 for text in store.texts())
    assert store.counts["rows"] == store.counts["answer_tokens"] + store.counts["conversations"]


def test_a_prompt_that_was_being_written_goes_on_where_it_was(synthesis_clock, tiny_tokenizer, tmp_path):
    engine = FakeEngine(synthesis_clock, step_s=1.0, prompt_words=50)
    synthesiser = synthesiser_on(engine, tiny_tokenizer, tmp_path)
    left = iter(range(30))
    synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    texts = [draft.text for draft in synthesiser.work.values()]
    assert len(texts) == SLOTS and all(text.count("w") == 30 for text in texts)
    assert (tmp_path / UNDER_WAY).stat().st_mode & 0o777 == 0o600
    again = synthesiser_on(FakeEngine(synthesis_clock, step_s=1.0), tiny_tokenizer, tmp_path)
    assert [draft.text for draft in again.work.values()] == texts
    for name, draft in again.work.items():
        asked = again.engine.requests[name]
        assert (
            asked.ids
            == tiny_tokenizer.encode(draft.opening.before + draft.opening.text + draft.text)[-len(asked.ids) :]
        )
    assert sum(again.prompts._counts.values()) == SLOTS, "they count for their splits"


@pytest.mark.parametrize(("prompt_words", "fields"), [(96, 3), (8, 4)])
def test_a_kill_soon_after_a_start_leaves_what_earlier_starts_kept(
    prompt_words, fields, synthesis_clock, tiny_tokenizer, tmp_path
):
    """Prompts that were being written, or answers: they are young in the next start, which keeps in its turn."""
    until = synthesis_clock.now + 60
    first = synthesiser_on(FakeEngine(synthesis_clock, step_s=1.0, prompt_words=prompt_words), tiny_tokenizer, tmp_path)
    first.run(tokens=1e9, most_tokens=1e9, enough=lambda: synthesis_clock.now >= until)
    assert [len(under_way) for under_way in torch.load(tmp_path / UNDER_WAY, weights_only=True)] == SLOTS * [fields]
    kept = kept_tokens(tmp_path, tiny_tokenizer)
    again = synthesiser_on(FakeEngine(synthesis_clock, step_s=1.0, prompt_words=96), tiny_tokenizer, tmp_path)
    for _ in range(20):
        for output in again.engine.step():
            again._take(output)
    again.keep()
    assert kept_tokens(tmp_path, tiny_tokenizer) >= kept + SLOTS * 15


def test_a_kill_between_two_files_has_no_prompt_written_again(synthesis_clock, tiny_tokenizer, tmp_path, monkeypatch):
    """The store has the conversations, and what is beside it still the drafts that they came of."""
    settings, save = {"max_answer_tokens": 16}, synthesise.save_state
    left = iter(range(10))
    first = synthesiser_on(
        FakeEngine(synthesis_clock, step_s=1.0, prompt_words=50), tiny_tokenizer, tmp_path, **settings
    )
    first.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    assert [len(under_way) for under_way in torch.load(tmp_path / UNDER_WAY, weights_only=True)] == SLOTS * [3]

    def killed(*args, **others):
        raise Killed

    monkeypatch.setattr(synthesise, "save_state", killed)
    second = synthesiser_on(FakeEngine(synthesis_clock, step_s=1.0), tiny_tokenizer, tmp_path, **settings)
    assert len(second.work) == SLOTS
    with pytest.raises(Killed):
        second.run(tokens=16 * SLOTS, most_tokens=16 * SLOTS, enough=lambda: False)
    for _ in range(2):
        again = synthesiser_on(FakeEngine(synthesis_clock, step_s=1.0), tiny_tokenizer, tmp_path, **settings)
        assert not again.work and again.store.counts["conversations"] == SLOTS
        with pytest.raises(Killed):
            again.keep()
    monkeypatch.setattr(synthesise, "save_state", save)
    again.keep()
    again.keep()
    assert RowStore(tmp_path).ended == [], "they are not on disk any more"


@pytest.mark.parametrize(("slots", "then"), [(4, 4), (8, 8), (16, 16), (20, 16), (64, 16)])
def test_slow_steps_never_lead_to_more_conversations_at_once(slots, then, synthesis_clock, tiny_tokenizer, tmp_path):
    """Memory may allow for few only."""
    synthesiser = synthesiser_on(FakeEngine(synthesis_clock, step_s=4.0), tiny_tokenizer, tmp_path, slots=slots)
    left = iter(range(50))
    synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    assert synthesiser.slots == then


@pytest.mark.parametrize(("row_s", "at_first"), [(0.0, 128), (0.001, 128), (0.01, 50), (0.03, 16), (1.0, 16)])
def test_where_a_row_is_known_to_take_long_few_conversations_begin(
    row_s, at_first, synthesis_clock, tiny_tokenizer, tmp_path
):
    """Else the first answers of a slow model come when the time is over."""
    synthesiser = synthesiser_on(
        FakeEngine(synthesis_clock, step_s=0.4), tiny_tokenizer, tmp_path, slots=128, row_s=row_s
    )
    assert synthesiser.slots == at_first
    left = iter(range(100))
    synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    assert synthesiser.slots == at_first, "a step takes about as long as it should"


def test_fast_steps_lead_to_as_many_conversations_as_memory_allows(synthesis_clock, tiny_tokenizer, tmp_path):
    synthesiser = synthesiser_on(
        FakeEngine(synthesis_clock, step_s=0.1), tiny_tokenizer, tmp_path, slots=100, row_s=0.03
    )
    left = iter(range(100))
    synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    assert synthesiser.slots == 100


def test_what_is_left_of_a_prompt_is_all_that_may_be_written(synthesis_clock, tiny_tokenizer, tmp_path):
    for _ in range(4):  # each start writes 30 words more, as long as 96 are not reached
        engine = FakeEngine(synthesis_clock, step_s=1.0, prompt_words=1000)
        synthesiser = synthesiser_on(engine, tiny_tokenizer, tmp_path)
        left = iter(range(30))
        synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda left=left: next(left, None) is None)
    written = [text for text in (synthesiser.store.texts()) if text.kind != 3]
    under_way = [work for work in synthesiser.work.values() if hasattr(work, "prompt")]
    prompts = [text.prompt for text in written] + [work.prompt.ids for work in under_way]
    assert prompts and all(sum(token >= 5 for token in ids) <= 96 for ids in prompts)


def test_an_opening_that_leaves_no_room_is_no_request(synthesis_clock, tiny_tokenizer, tmp_path):
    """As where a template has a long system prompt and a model a short context."""
    synthesiser = synthesiser_on(FakeEngine(synthesis_clock, step_s=1.0), tiny_tokenizer, tmp_path)
    synthesiser._write(synthesise.Draft(0, Opening("w1 " * 400, "", "", 0, 0)))
    assert not synthesiser.work and synthesiser.failures == 1
    synthesiser.prompts.draw = lambda number: Opening("w1 " * 400, "", "", 0, 0)
    with pytest.raises(RuntimeError, match="the last 500 prompts were empty, too long"):
        synthesiser.run(tokens=10, most_tokens=10, enough=lambda: False)
