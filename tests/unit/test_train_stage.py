"""One depth's training and measurement, from rows on disk to a head and what it says: when it ends, and on which rows."""

import pytest
import torch
from safetensors.torch import load_file

from apparate_llm.prepare import train_stage
from apparate_llm.prepare.draft_data import whole_conversations
from apparate_llm.prepare.rows import TEST, TRAIN, VALIDATION, rows_of
from apparate_llm.prepare.train_stage import head_tensors, measure_depth, train_depth
from tests.preparation import conversations, plan_for, running

NUMBER = 200


# ---- three sets of conversations


def test_weights_are_chosen_by_validation_rows_and_reported_from_test_rows(tiny_llama, tmp_path):
    """Other test rows change nothing but the report, of a head that has learnt what is to be known."""
    made = conversations(NUMBER)

    def results(folder, changed_split):
        changed = [one._replace(top_ids=(one.top_ids + 1) % 160) if one.split == changed_split else one for one in made]
        with running(plan_for(tiny_llama, folder)) as (run, _):
            run.store.append(changed)
            counts = run.store.counts
            rows = {"rows": counts["rows"], "tokens": counts["answer_tokens"]}
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
