"""A lap's synthesis on an engine whose clock the test moves: when it ends, what it says, what it leaves."""

import gc
import weakref
from contextlib import contextmanager

import pytest

from apparate_llm.prepare import needs, synthesise_stage
from apparate_llm.prepare.rows import SPLIT_NAMES
from apparate_llm.prepare.schedule import Lap
from apparate_llm.prepare.synthesise_stage import synthesise_lap
from tests.preparation import FakeEngine, FakeLLM, lines, plan_for, running
from tests.tiny import CHAT_TEMPLATE

START_S = 20.0


@pytest.fixture
def lap_of(synthesis_clock, tiny_tokenizer, tiny_llama, tmp_path, monkeypatch):
    """A preparation's lap on a fake engine; what it says, and each engine that was started."""
    monkeypatch.setattr(needs, "available_memory_bytes", lambda: 64 << 30)
    monkeypatch.setattr(synthesise_stage, "give_back_memory", lambda: None)
    engines = []

    def start(
        lap,
        *,
        step_s=0.1,
        engine_settings=None,
        speaks=tiny_tokenizer,
        start_s=START_S,
        import_s=0.0,
        imports=lambda: None,
        trained_row_s=0.0,
        **changes,
    ):
        def import_vllm():
            imports()
            synthesis_clock.now += import_s

        @contextmanager
        def generation_engine(model, **settings):
            synthesis_clock.now += start_s
            engines.append(FakeEngine(synthesis_clock, step_s=step_s, **(engine_settings or {})))
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
def test_a_lap_ends_in_time_though_no_answer_has_ended(last, lap_of, synthesis_clock):
    """The last one uses answers as far as they are."""
    began = synthesis_clock.now
    settings = {"prompt_words": 8}
    result, splits, *_ = lap_of(timed_lap(70.0, last=last), step_s=1.0, engine_settings=settings, **TIMED)
    assert synthesis_clock.now - began <= 70.0 + 2.0
    if last:
        assert len(splits) == len(SPLIT_NAMES) and result["tokens"] > 0
    else:
        assert result["tokens"] == 0


def test_a_budget_shorter_than_the_models_start_still_makes_rows_of_each_split(lap_of, synthesis_clock):
    began = synthesis_clock.now
    result, splits, *_ = lap_of(timed_lap(5.0), step_s=1.0, **TIMED)
    assert len(splits) == len(SPLIT_NAMES) and result["tokens"] > 0
    assert synthesis_clock.now - began < START_S + 60.0


@pytest.mark.parametrize("row_s", [0.0, 1e-4, 1e-3, 0.1])
def test_the_last_lap_writes_for_as_long_as_its_rows_leave_time_to_train(row_s, lap_of, synthesis_clock):
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


def test_no_lap_but_the_last_writes_for_longer_than_planned(lap_of, synthesis_clock):
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
def test_a_first_lap_is_the_only_one_where_the_model_starts_slowly(start_s, num_laps, lap_of, synthesis_clock):
    settings = {"tokens": None, "time_budget_s": 2700.0}
    planned, began = plan_for(None, None, **settings).schedule.laps(), synthesis_clock.now
    assert len(planned) == 3
    *_, run = lap_of(planned[0], start_s=start_s, step_s=10.0, **settings)
    assert len(run.schedule.laps()) == num_laps and synthesise_stage.start_that_counts(run) == start_s
    until_s = run.schedule.laps()[0].synthesise_until_s
    assert until_s <= synthesis_clock.now - began <= until_s + 20.0
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
