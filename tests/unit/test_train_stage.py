"""One depth's training and measurement, from rows on disk to a head and what it says: until when, and on which rows."""

import pytest
import torch
from safetensors.torch import load_file

from apparate_llm.prepare import pipeline, schedule, train, train_stage
from apparate_llm.prepare.acceptance import NUM_POSITIONS
from apparate_llm.prepare.draft_data import BaseParts, whole_conversations
from apparate_llm.prepare.predict import ENOUGH_USERS, USERS_KIND, users_are_given
from apparate_llm.prepare.prompts import KINDS
from apparate_llm.prepare.rows import TEST, TRAIN, VALIDATION, rows_of
from apparate_llm.prepare.schedule import KEEP_CLOCK_EVERY_S
from apparate_llm.prepare.train_stage import head_tensors, measure_depth, train_depth
from apparate_llm.prepare.workspace import Workspace
from tests.made_rows import Slow
from tests.preparation import Killed, conversations, plan_for, running

NUMBER = 200
BUDGET_S, BEFORE_S = 2700.0, 1900.0
STEP_S, START_S, LOAD_S = 20.0, 60.0, 40.0


def counts_of(run):
    counts = run.store.counts
    return {"rows": counts["rows"], "tokens": counts["answer_tokens"]}


# ---- time


@pytest.fixture
def slow_start(tiny_llama, tmp_path, monkeypatch):
    """start(until_s, kill_at): the last training on a slow machine; its record, or None where it was killed, which
    loses what the clock has not kept. Beside it the machine."""
    machine = Slow(monkeypatch, step_s=STEP_S, row_s=0.02, save_s=10.0)
    plan = plan_for(tiny_llama, tmp_path / "out", tokens=None, time_budget_s=BUDGET_S)
    parts_of, slow_loss = BaseParts.of, train.batch_loss
    Workspace(plan.out).write("clock", {}, {"seconds": BEFORE_S})

    def slow_parts(model):
        machine.now += LOAD_S
        return parts_of(model)

    def start(*, until_s=None, kill_at=float("inf")):
        def killed_then(*args):
            if machine.now >= kill_at:
                raise Killed
            return slow_loss(*args)

        monkeypatch.setattr(train, "batch_loss", killed_then)
        with running(plan) as (run, _):
            machine.now += START_S
            if not run.store.counts["rows"]:
                run.store.append(conversations(NUMBER))
            end_s = run.schedule.work_s if until_s is None else until_s
            try:
                record = train_depth(run, counts_of(run), 0, after=None, epochs=1e6, until_s=end_s)
            except Killed:
                seconds = run.clock.spent_s - KEEP_CLOCK_EVERY_S
                run.workspace.write("clock", {}, {"seconds": seconds})
                return None
            run.clock.keep()
            return record

    monkeypatch.setattr(schedule, "time", machine)
    monkeypatch.setattr(BaseParts, "of", staticmethod(slow_parts))
    return start, machine


def test_a_training_that_is_killed_twice_ends_in_the_budget_with_starts_saves_and_what_was_lost(slow_start):
    start, machine = slow_start
    assert start(kill_at=250.0) is None
    assert start(kill_at=550.0) is None
    record = start()
    assert 0.9 * BUDGET_S <= BEFORE_S + machine.now <= 1.1 * BUDGET_S
    assert len(machine.saves) > 3 and record["steps"] * STEP_S > 150.0


def test_a_training_that_is_started_again_after_its_end_has_a_step_at_least(slow_start):
    start, machine = slow_start
    end_s = BEFORE_S + START_S + 30.0
    assert start(until_s=end_s, kill_at=0.0) is None
    record = start(until_s=end_s)
    assert record["steps"] == 1 and machine.now < 2 * (START_S + LOAD_S) + 5 * STEP_S


# ---- three sets of conversations


def test_weights_are_chosen_by_validation_rows_and_reported_from_test_rows(tiny_llama, tmp_path):
    """Other test rows change nothing but the report, of a head that has learnt what is to be known."""
    made = conversations(NUMBER)

    def results(folder, changed_split):
        changed = [one._replace(top_ids=(one.top_ids + 1) % 160) if one.split == changed_split else one for one in made]
        with running(plan_for(tiny_llama, folder)) as (run, _):
            run.store.append(changed)
            rows = counts_of(run)
            record = train_depth(run, rows, 0, after=None, epochs=30.0)
            measured = measure_depth(run, rows, 0, record)
            head, vocabulary = head_tensors(run.workspace, 0)
            names = ("validation", "measured")
            tensors = [load_file(run.workspace.path(f"{name}-0.safetensors")) for name in names]
        return head, vocabulary, record, measured, tensors

    plain, other_test = results(tmp_path / "plain", None), results(tmp_path / "test", TEST)
    for name, value in plain[0].items():
        assert torch.equal(value, other_test[0][name]), name
    assert torch.equal(plain[1], other_test[1])
    assert plain[2]["validation_accepted_per_step"] == other_test[2]["validation_accepted_per_step"]
    assert plain[3]["acceptance_rates"][0] > other_test[3]["acceptance_rates"][0] + 0.1
    validation, test = plain[4]
    split_of_conversation = torch.tensor([one.split for one in made])
    assert set(split_of_conversation[validation["0.conversation"].long()].tolist()) == {VALIDATION}
    assert set(split_of_conversation[test["0.conversation"].long()].tolist()) == {TEST}
    assert torch.equal(validation["0.confidence"], other_test[4][0]["0.confidence"])


def test_conversations_are_measured_whole_or_not_at_all():
    """With gaps a simulation would take a draft step's neighbour for it."""
    rows = rows_of(conversations(100))
    index = torch.nonzero((rows.answer_index >= 0) & (rows.split == TRAIN))[:, 0]
    assert torch.equal(whole_conversations(rows, index, len(index)), index)
    few = whole_conversations(rows, index, 400)
    owners = rows.conversations[few].unique()
    assert 300 < len(few) <= 400 and len(few) == 18 * len(owners)
    assert owners.float().mean() == pytest.approx(50, abs=15), "of early and of late ones"
    assert len(whole_conversations(rows, index, 1)) == 18


def test_a_slow_model_is_measured_on_fewer_rows(tiny_llama, tmp_path):
    with running(plan_for(tiny_llama, tmp_path, tokens=None, time_budget_s=1200.0)) as (run, _):
        fast, slow = ({"evaluated_rows": 6000, "evaluate_s": seconds} for seconds in (0.5, 30.0))
        assert train_stage._affordable_rows(run, fast) == train_stage.MOST_MEASURED_ROWS
        assert train_stage._affordable_rows(run, slow) == train_stage.FEWEST_MEASURED_ROWS
        assert train_stage._affordable_rows(run, {"evaluated_rows": 6000, "evaluate_s": 6.0}) == 4000
        assert train_stage._affordable_rows(run, {"evaluated_rows": None, "evaluate_s": 0.0}) == 24_000
    with running(plan_for(tiny_llama, tmp_path / "tokens")) as (run, _):
        assert train_stage._affordable_rows(run, slow) == train_stage.MOST_MEASURED_ROWS


def test_how_fast_a_training_evaluated_is_by_the_rows_that_it_had(tiny_llama, tmp_path):
    """Not by those that it might have had."""
    splits = [VALIDATION, TRAIN, TRAIN, TRAIN]
    made = [one._replace(split=splits[place % 4]) for place, one in enumerate(conversations(NUMBER))]
    with running(plan_for(tiny_llama, tmp_path, tokens=None, time_budget_s=BUDGET_S)) as (run, _):
        run.store.append(made)
        record = train_depth(run, counts_of(run), 0, after=None, epochs=1.0)
        assert record["evaluated_rows"] == 900 < train.MAX_EVALUATED_ROWS
        affordable = train_stage._affordable_rows(run, record | {"evaluate_s": 0.9})
        assert affordable == pytest.approx(1000 * run.schedule.measure_s, abs=1)


def test_where_few_rows_are_measured_the_users_prompts_are_among_them(tiny_llama, tmp_path, monkeypatch):
    """As many as a prediction for them takes, and others."""
    monkeypatch.setattr(train_stage, "FEWEST_MEASURED_ROWS", 400)
    made = conversations(5 * NUMBER)
    tests = [place for place, one in enumerate(made) if one.split == TEST]
    for place in tests[: 3 * (ENOUGH_USERS + 2) : 3]:
        made[place] = made[place]._replace(kind=KINDS.index(USERS_KIND))
    with running(plan_for(tiny_llama, tmp_path, tokens=None, time_budget_s=1200.0)) as (run, _):
        run.store.append(made)
        record = train_depth(run, counts_of(run), 0, after=None, epochs=0.1)
        slow = record | {"evaluated_rows": 100, "evaluate_s": 1e4}
        measure_depth(run, counts_of(run), 0, slow)
        measured = pipeline._conversations(run, 0, {"calibration": [(1.0, 0.0)] * NUM_POSITIONS})
    assert sum(one.num_tokens for one in measured) <= 400 < 18 * len(tests)
    assert users_are_given(measured) and any(one.kind != USERS_KIND for one in measured)
