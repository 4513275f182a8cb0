"""A lap's synthesis on an engine whose clock the test moves: what a kill loses, when it ends, what it says."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from apparate_llm.prepare import needs, schedule, synthesise, synthesise_stage
from apparate_llm.prepare.chat import ChatFormat
from apparate_llm.prepare.prompts import Opening, PromptSource
from apparate_llm.prepare.rows import SPLIT_NAMES
from apparate_llm.prepare.schedule import Lap
from apparate_llm.prepare.store import RowStore
from apparate_llm.prepare.synthesise import UNDER_WAY, Synthesiser
from apparate_llm.prepare.synthesise_stage import synthesise_lap
from tests.preparation import CONTEXT, Clock, FakeCapture, FakeEngine, FakeLLM, Killed, lines, plan_for, running
from tests.tiny import CHAT_TEMPLATE

SLOTS = 4
START_S = 20.0
LIMIT_S = 120.0  # of work that a kill may lose


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (schedule, synthesise):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(synthesise, "Capture", FakeCapture)
    return clock


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


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
    killed_s, step_s, clock, tokenizer, tmp_path
):
    """Prompts and answers take minutes each."""
    engine = FakeEngine(clock, step_s=step_s, prompt_words=96)
    until = clock.now + killed_s
    step = engine.step

    def killed_some_time():
        if clock.now >= until:
            raise Killed
        return step()

    engine.step = killed_some_time
    synthesiser = synthesiser_on(engine, tokenizer, tmp_path)
    with pytest.raises(Killed):
        synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: False)
    lost_s = (engine.generated - kept_tokens(tmp_path, tokenizer)) * step_s / SLOTS
    assert lost_s < LIMIT_S
    again = FakeEngine(clock, step_s=step_s, prompt_words=96)
    gone_on = synthesiser_on(again, tokenizer, tmp_path)
    assert len(gone_on.work) <= SLOTS
    gone_on.run(tokens=600, most_tokens=1e9, enough=lambda: False)
    store = RowStore(tmp_path)
    assert store.counts["answer_tokens"] >= 600 and len(store.splits()) == len(SPLIT_NAMES)
    assert all(len(text.answer) <= 256 for text in store.texts())
    assert store.counts["rows"] == store.counts["answer_tokens"] + store.counts["conversations"]


def test_a_prompt_that_was_being_written_goes_on_where_it_was(clock, tokenizer, tmp_path):
    engine = FakeEngine(clock, step_s=1.0, prompt_words=50)
    synthesiser = synthesiser_on(engine, tokenizer, tmp_path)
    left = iter(range(30))
    synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    texts = [draft.text for draft in synthesiser.work.values()]
    assert len(texts) == SLOTS and all(text.count("w") == 30 for text in texts)
    assert (tmp_path / UNDER_WAY).stat().st_mode & 0o777 == 0o600
    again = synthesiser_on(FakeEngine(clock, step_s=1.0), tokenizer, tmp_path)
    assert [draft.text for draft in again.work.values()] == texts
    for name, draft in again.work.items():
        asked = again.engine.requests[name]
        assert asked.ids == tokenizer.encode(draft.opening.before + draft.opening.text + draft.text)[-len(asked.ids) :]
    assert sum(again.prompts._counts.values()) == SLOTS, "they count for their splits"


@pytest.mark.parametrize(("prompt_words", "fields"), [(96, 3), (8, 4)])
def test_a_kill_soon_after_a_start_leaves_what_earlier_starts_kept(prompt_words, fields, clock, tokenizer, tmp_path):
    """Prompts that were being written, or answers: they are young in the next start, which keeps in its turn."""
    until = clock.now + 60
    first = synthesiser_on(FakeEngine(clock, step_s=1.0, prompt_words=prompt_words), tokenizer, tmp_path)
    first.run(tokens=1e9, most_tokens=1e9, enough=lambda: clock.now >= until)
    assert [len(under_way) for under_way in torch.load(tmp_path / UNDER_WAY, weights_only=True)] == SLOTS * [fields]
    kept = kept_tokens(tmp_path, tokenizer)
    again = synthesiser_on(FakeEngine(clock, step_s=1.0, prompt_words=96), tokenizer, tmp_path)
    for _ in range(20):
        for output in again.engine.step():
            again._take(output)
    again.keep()
    assert kept_tokens(tmp_path, tokenizer) >= kept + SLOTS * 15


def test_a_kill_between_two_files_has_no_prompt_written_again(clock, tokenizer, tmp_path, monkeypatch):
    """The store has the conversations, and what is beside it still the drafts that they came of."""
    settings, save = {"max_answer_tokens": 16}, synthesise.save_state
    left = iter(range(10))
    first = synthesiser_on(FakeEngine(clock, step_s=1.0, prompt_words=50), tokenizer, tmp_path, **settings)
    first.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    assert [len(under_way) for under_way in torch.load(tmp_path / UNDER_WAY, weights_only=True)] == SLOTS * [3]

    def killed(*args, **others):
        raise Killed

    monkeypatch.setattr(synthesise, "save_state", killed)
    second = synthesiser_on(FakeEngine(clock, step_s=1.0), tokenizer, tmp_path, **settings)
    assert len(second.work) == SLOTS
    with pytest.raises(Killed):
        second.run(tokens=16 * SLOTS, most_tokens=16 * SLOTS, enough=lambda: False)
    for _ in range(2):
        again = synthesiser_on(FakeEngine(clock, step_s=1.0), tokenizer, tmp_path, **settings)
        assert not again.work and again.store.counts["conversations"] == SLOTS
        with pytest.raises(Killed):
            again.keep()
    monkeypatch.setattr(synthesise, "save_state", save)
    again.keep()
    again.keep()
    assert RowStore(tmp_path).ended == [], "they are not on disk any more"


@pytest.mark.parametrize(("slots", "then"), [(4, 4), (8, 8), (16, 16), (20, 16), (64, 16)])
def test_slow_steps_never_lead_to_more_conversations_at_once(slots, then, clock, tokenizer, tmp_path):
    """Memory may allow for few only."""
    synthesiser = synthesiser_on(FakeEngine(clock, step_s=4.0), tokenizer, tmp_path, slots=slots)
    left = iter(range(50))
    synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    assert synthesiser.slots == then


@pytest.mark.parametrize(("row_s", "at_first"), [(0.0, 128), (0.001, 128), (0.01, 50), (0.03, 16), (1.0, 16)])
def test_where_a_row_is_known_to_take_long_few_conversations_begin(row_s, at_first, clock, tokenizer, tmp_path):
    """Else the first answers of a slow model come when the time is over."""
    synthesiser = synthesiser_on(FakeEngine(clock, step_s=0.4), tokenizer, tmp_path, slots=128, row_s=row_s)
    assert synthesiser.slots == at_first
    left = iter(range(100))
    synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    assert synthesiser.slots == at_first, "a step takes about as long as it should"


def test_fast_steps_lead_to_as_many_conversations_as_memory_allows(clock, tokenizer, tmp_path):
    synthesiser = synthesiser_on(FakeEngine(clock, step_s=0.1), tokenizer, tmp_path, slots=100, row_s=0.03)
    left = iter(range(100))
    synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda: next(left, None) is None)
    assert synthesiser.slots == 100


def test_what_is_left_of_a_prompt_is_all_that_may_be_written(clock, tokenizer, tmp_path):
    for _ in range(4):  # each start writes 30 words more, as long as 96 are not reached
        engine = FakeEngine(clock, step_s=1.0, prompt_words=1000)
        synthesiser = synthesiser_on(engine, tokenizer, tmp_path)
        left = iter(range(30))
        synthesiser.run(tokens=1e9, most_tokens=1e9, enough=lambda left=left: next(left, None) is None)
    written = [text for text in (synthesiser.store.texts()) if text.kind != 3]
    under_way = [work for work in synthesiser.work.values() if hasattr(work, "prompt")]
    prompts = [text.prompt for text in written] + [work.prompt.ids for work in under_way]
    assert prompts and all(sum(token >= 5 for token in ids) <= 96 for ids in prompts)


def test_an_opening_that_leaves_no_room_is_no_request(clock, tokenizer, tmp_path):
    """As where a template has a long system prompt and a model a short context."""
    synthesiser = synthesiser_on(FakeEngine(clock, step_s=1.0), tokenizer, tmp_path)
    synthesiser._write(synthesise.Draft(0, Opening("w1 " * 400, "", "", 0, 0)))
    assert not synthesiser.work and synthesiser.failures == 1
    synthesiser.prompts.draw = lambda number: Opening("w1 " * 400, "", "", 0, 0)
    with pytest.raises(RuntimeError, match="the last 500 prompts were empty, too long"):
        synthesiser.run(tokens=10, most_tokens=10, enough=lambda: False)


# ---- a lap


@pytest.fixture
def lap_of(clock, tokenizer, tiny_llama, tmp_path, monkeypatch):
    """A preparation's lap on a fake engine; what it says, and each engine that was started."""
    monkeypatch.setattr(needs, "available_memory_bytes", lambda: 64 << 30)
    monkeypatch.setattr(synthesise_stage, "give_back_memory", lambda: None)
    engines = []

    def start(
        lap,
        *,
        step_s=0.1,
        engine_settings=None,
        speaks=tokenizer,
        start_s=START_S,
        import_s=0.0,
        imports=lambda: None,
        trained_row_s=0.0,
        **changes,
    ):
        def import_vllm():
            imports()
            clock.now += import_s

        @contextmanager
        def generation_engine(model, **settings):
            clock.now += start_s
            engines.append(FakeEngine(clock, step_s=step_s, **(engine_settings or {})))
            yield FakeLLM(engines[-1], speaks)

        monkeypatch.setattr(synthesise_stage, "generation_engine", generation_engine)
        monkeypatch.setattr(synthesise_stage, "import_vllm", import_vllm)
        with running(plan_for(tiny_llama, tmp_path / "out", **changes)) as (run, log):
            run.trained_row_s = trained_row_s
            result = synthesise_lap(run, lap)
            splits = run.store.splits()
        return result, splits, lines(log), engines, run

    return start


def timed_lap(until_s, *, last=True, number=0):
    return Lap(number, last, 1.0, float("inf"), until_s, 2 * until_s, 1.0)


TIMED = {"tokens": None, "time_budget_s": 1000.0}


@pytest.mark.parametrize("last", [True, False])
def test_a_lap_ends_in_time_though_no_answer_has_ended(last, lap_of, clock):
    """The last one uses answers as far as they are."""
    began = clock.now
    settings = {"prompt_words": 8}
    result, splits, *_ = lap_of(timed_lap(70.0, last=last), step_s=1.0, engine_settings=settings, **TIMED)
    assert clock.now - began <= 70.0 + 2.0
    if last:
        assert len(splits) == len(SPLIT_NAMES) and result["tokens"] > 0
    else:
        assert result["tokens"] == 0


def test_a_budget_shorter_than_the_models_start_still_makes_rows_of_each_split(lap_of, clock):
    began = clock.now
    result, splits, *_ = lap_of(timed_lap(5.0), step_s=1.0, **TIMED)
    assert len(splits) == len(SPLIT_NAMES) and result["tokens"] > 0
    assert clock.now - began < START_S + 60.0


@pytest.mark.parametrize("row_s", [0.0, 1e-4, 1e-3, 0.1])
def test_the_last_lap_writes_for_as_long_as_its_rows_leave_time_to_train(row_s, lap_of, clock):
    """Both depths train for 4.5 epochs in all."""
    result, _, log, _, run = lap_of(timed_lap(300.0), step_s=0.5, trained_row_s=row_s, **TIMED)
    planned, spent_s, needed_s = row_s in (0.0, 0.1), run.clock.spent_s, 1.15 * 4.5 * row_s * result["tokens"]
    assert (spent_s == pytest.approx(300.0, abs=2.0)) == planned
    if not planned:
        assert spent_s + needed_s == pytest.approx(run.schedule.work_s, rel=0.03)
        assert " (100 %), " in log[-1] and "took" in log[-1]


def test_an_engine_is_given_back_after_its_lap_though_an_import_kept_an_exception(lap_of, monkeypatch):
    """Or the next lap's is started beside it."""
    kept, engines, make_synthesiser = [], [], synthesise_stage._synthesiser

    def imports():
        try:
            raise ImportError("an optional package")
        except ImportError as error:
            kept.append(error)

    def synthesiser(run, llm, limits):
        engines.append(weakref.ref(llm))
        return make_synthesiser(run, llm, limits)

    monkeypatch.setattr(synthesise_stage, "_synthesiser", synthesiser)
    lap_of(timed_lap(100.0), imports=imports, **TIMED)
    gc.collect()
    assert [engine() for engine in engines] == [None] and kept


def test_no_lap_but_the_last_writes_for_longer_than_planned(lap_of, clock):
    *_, run = lap_of(timed_lap(300.0, last=False), step_s=0.5, trained_row_s=1e-4, **TIMED)
    assert run.clock.spent_s == pytest.approx(300.0, abs=2.0)


def test_a_lap_without_time_for_another_start_of_the_model_is_over(lap_of):
    *_, engines, _ = lap_of(timed_lap(100.0), **TIMED)
    assert len(engines) == 1
    for number, (until_s, starts) in enumerate([(110.0, 1), (160.0, 2)], 1):
        *_, engines, run = lap_of(timed_lap(until_s, number=number), **TIMED)
        assert len(engines) == starts, run.clock.spent_s


def test_a_start_counts_without_what_is_imported_once_and_the_fastest_one_does(lap_of):
    *_, run = lap_of(timed_lap(100.0), import_s=30.0, **TIMED)
    assert synthesise_stage._starts(run) == {"seconds": START_S, "number": 1, "first_s": START_S}
    for number, start_s in enumerate((10.0, 15.0), 1):
        *_, run = lap_of(timed_lap(100.0 + 60 * number, number=number), start_s=start_s, **TIMED)
        assert synthesise_stage._starts(run) == {"seconds": 10.0, "number": number + 1, "first_s": START_S}


def test_a_lap_has_to_leave_as_long_for_writing_as_the_model_takes_to_start(lap_of):
    for number, (until_s, starts) in enumerate([(100.0, 1), (160.0, 2), (190.0, 2), (215.0, 3)]):
        *_, engines, run = lap_of(timed_lap(until_s, number=number), **TIMED)
        assert len(engines) == starts, run.clock.spent_s


def test_one_start_that_read_all_from_the_disk_does_not_end_all_later_laps(lap_of):
    lap_of(timed_lap(100.0), start_s=60.0, **TIMED)
    *_, engines, run = lap_of(timed_lap(140.0, number=1), start_s=10.0, **TIMED)
    assert len(engines) == 2 and synthesise_stage._expected_start_s(run) == 10.0


@pytest.mark.parametrize(("start_s", "num_laps"), [(25.0, 3), (120.0, 1)])
def test_a_first_lap_is_the_only_one_where_the_model_starts_slowly(start_s, num_laps, lap_of, clock):
    settings = {"tokens": None, "time_budget_s": 2700.0}
    planned, began = plan_for(None, None, **settings).schedule.laps(), clock.now
    assert len(planned) == 3
    *_, run = lap_of(planned[0], start_s=start_s, step_s=10.0, **settings)
    assert len(run.schedule.laps()) == num_laps and synthesise_stage.start_that_counts(run) == start_s
    until_s = run.schedule.laps()[0].synthesise_until_s
    assert until_s <= clock.now - began <= until_s + 20.0
    *_, run = lap_of(planned[0], start_s=1.0, **settings)
    assert synthesise_stage.start_that_counts(run) == start_s, "the next start goes on with the same laps"


def test_a_full_disk_is_looked_at_before_the_model_is_started_for_a_split_that_is_missing(lap_of, monkeypatch):
    for module in (needs, synthesise_stage):
        monkeypatch.setattr(module, "disk_left", lambda run: 0)
    result, splits, _, engines, _ = lap_of(timed_lap(100.0), **TIMED)
    assert not engines and not splits and result["disk_is_full"]


def test_a_lap_that_an_earlier_start_has_ended_is_not_told_of_again(lap_of):
    first, *_ = lap_of(timed_lap(100.0), **TIMED)
    again, _, log, engines, _ = lap_of(timed_lap(100.0), **TIMED)
    assert again == first and log == [] and len(engines) == 1


def test_a_line_of_a_timed_lap_has_the_tokens_and_their_rate(lap_of, monkeypatch):
    *_, log, _, _ = lap_of(timed_lap(100.0), **TIMED)
    assert any("answer tokens, " in line and " tokens/s" in line for line in log), log
    assert log[0] == "synthesise, lap 1  0s/1m 40s (0 %), starting the model"


def test_a_full_disk_ends_a_lap_is_said_and_a_later_start_goes_on(lap_of, monkeypatch):
    left = [1 << 40]
    for module in (needs, synthesise_stage):
        monkeypatch.setattr(module, "disk_left", lambda run: left[0])
    lap = Lap(0, True, 1.0, 50_000, float("inf"), float("inf"), 1.0)
    step = FakeEngine.step

    def fills(self):
        if self.generated > 8000:
            left[0] = 0
        return step(self)

    monkeypatch.setattr(FakeEngine, "step", fills)
    result, _, log, engines, _ = lap_of(lap)
    assert 0 < result["tokens"] < 50_000
    assert log[-1].startswith("the disk is full: ") and "make room and start again for more" in log[-1]
    *_, log, engines, _ = lap_of(lap)
    assert len(engines) == 1 and log[-1].startswith("the disk is full: "), "no start of a model for nothing"
    monkeypatch.setattr(FakeEngine, "step", step)
    left[0] = 1 << 40
    result, _, log, engines, _ = lap_of(lap)
    assert result["tokens"] >= 50_000 and len(engines) == 2 and "disk" not in log[-1]


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}" + CHAT_TEMPLATE
ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('One turn') }}{% endif %}" + CHAT_TEMPLATE


@pytest.mark.parametrize("names", ["eos", "none"])
@pytest.mark.parametrize(
    ("template", "is_plain"),
    [(None, True), ("{{ 1 / 0 }}", True), (NO_SYSTEM, False), (ONE_TURN, False)],
    ids=["none", "other errors", "no system", "one turn"],
)
def test_a_model_of_any_template_or_none_writes_and_answers(template, is_plain, names, lap_of, tiny_llama):
    """Also one that has no token to begin or end a text with, and a tokenizer that names no longest text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template, tokenizer.model_max_length = template, int(1e30)
    if names == "none":
        tokenizer.bos_token = tokenizer.eos_token = None
    lap = Lap(0, True, 1.0, 3000, float("inf"), float("inf"), 1.0)
    result, splits, log, _, run = lap_of(lap, speaks=tokenizer)
    assert result["tokens"] >= 3000 and len(splits) == len(SPLIT_NAMES)
    assert any("prompts are plain text" in line for line in log) == is_plain
    assert len({tuple(text.prompt) for text in run.store.texts()}) == run.store.counts["conversations"]


def test_prompts_that_cannot_be_asked_are_counted_and_the_others_are_answered(lap_of):
    prompts = [
        [{"role": "user", "content": "w1 w2 w3 w4"}],
        [{"role": "user", "content": "w1 " * 600}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ]
    lap = Lap(0, True, 1.0, 3000, float("inf"), float("inf"), 1.0)
    *_, log, _, run = lap_of(lap, user_prompts=prompts)
    (line,) = (line for line in log if "left out" in line)
    assert line.startswith("2 of 3 prompts left out: ") and "1 with content that is no text" in line
    assert sum(text.kind == 3 for text in run.store.texts()) == 1
