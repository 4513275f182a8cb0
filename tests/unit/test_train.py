"""Training of a head on made-up rows: loss, draft steps, interruptions, time."""

from itertools import pairwise

import pytest
import torch

from apparate_llm.prepare.acceptance import measure_head
from apparate_llm.prepare.draft_data import DraftData, ramp_vocabulary, starts
from apparate_llm.prepare.rows import TEST, TRAIN, rows_of
from apparate_llm.prepare.train import TIMED_ROWS, batch_loss, new_head, seconds_of_trained_row, train_head
from tests.made_rows import VOCAB, Slow, base_parts, made_conversations, settings
from tests.preparation import Killed


@pytest.fixture(scope="module")
def base():
    return base_parts()


@pytest.fixture(scope="module")
def rows(base):
    return rows_of(made_conversations(base))


@pytest.mark.parametrize(("depth", "aux_layers"), [(0, ()), (0, (2,)), (2, (2,))])
def test_training_learns_the_rows_at_every_position(base, rows, depth, aux_layers):
    vocabulary = ramp_vocabulary(rows, VOCAB)
    chosen = settings(depth=depth, aux_layers=aux_layers, step_weights=(1.0, 1.0))
    data = DraftData(rows, base, depth=depth, aux_layers=aux_layers, vocabulary=vocabulary)

    def agreement(head):
        return [
            float(part.agrees.float().mean())
            for part in measure_head(head, data, starts(rows, split=TEST), num_positions=2)
        ]

    before = agreement(new_head(base, vocabulary, chosen))
    head, record = train_head(rows, base, vocabulary, chosen)
    after = agreement(head)
    assert after[0] > before[0] + 0.3 and after[1] > 0.3
    assert record["steps"] == int(30 * len(starts(rows, split=TRAIN)) / 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_is_cross_entropy_with_the_gradient_of_it(dtype, base, rows):
    """Against the same loss written out and differentiated by torch, in the dtype that the model was served in."""
    rows = rows._replace(final=rows.final.to(dtype), states={k: v.to(dtype) for k, v in rows.states.items()})
    vocabulary = ramp_vocabulary(rows, 30)  # some targets are outside
    head = new_head(base, vocabulary, settings(dropout=0.0))
    data = DraftData(rows, base, depth=0, aux_layers=(), vocabulary=vocabulary)
    index = starts(rows, split=TRAIN)[:64]
    columns, probability = data.targets(index)
    hidden, lookup = data.inputs(index)

    def reference():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            scores, _ = head(hidden, data.enter(head, index), lookup)
        logs = scores.float().log_softmax(-1).gather(1, columns)
        return -(torch.where(probability > 0, logs, 0.0) * probability).sum(-1).mean()

    expected = torch.autograd.grad(reference(), head.fuse)[0]
    loss = batch_loss(head, data, index, (1.0,))
    assert loss.item() == pytest.approx(reference().item(), rel=0.02 if dtype == torch.bfloat16 else 1e-4)
    got = torch.autograd.grad(loss, head.fuse)[0]
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.99
    assert got.norm() == pytest.approx(expected.norm().item(), rel=0.05)


def test_a_token_outside_the_vocabulary_has_a_column_only_where_it_is_looked_up(base, rows):
    vocabulary = ramp_vocabulary(rows, 30)
    data = DraftData(rows, base, depth=0, aux_layers=(), vocabulary=vocabulary)
    index = starts(rows, split=TRAIN)
    tokens = rows.top_ids[index, :1].long()
    columns = data.columns(index, tokens)[:, 0]
    inside = torch.isin(tokens[:, 0], vocabulary)
    looked_up = (rows.lookup_tokens[index] == tokens[:, 0]) & (rows.lookup_lengths[index] > 0)
    assert torch.equal(columns == 30, ~inside & looked_up) and torch.equal(columns == -1, ~inside & ~looked_up)
    assert torch.equal(vocabulary[columns[inside]], tokens[inside, 0])
    assert (~inside & looked_up).any() and (~inside & ~looked_up).any()


def test_later_draft_steps_count_only_where_the_earlier_ones_agreed_and_the_text_went_on(base, rows):
    vocabulary = ramp_vocabulary(rows, VOCAB)
    data = DraftData(rows, base, depth=0, aux_layers=(), vocabulary=vocabulary)
    head, _ = train_head(rows, base, vocabulary, settings(epochs=10.0))
    first, second, *_ = measure_head(head, data, starts(rows, split=TEST))
    agreed = first.rows[first.agrees]
    going_on = agreed[rows.conversations[agreed + 1] == rows.conversations[agreed]] + 1
    assert second.rows.tolist() == going_on.tolist()


def test_an_interrupted_training_ends_as_an_uninterrupted_one(base, rows, tmp_path, monkeypatch):
    vocabulary = ramp_vocabulary(rows, VOCAB)
    whole, _ = train_head(rows, base, vocabulary, settings(epochs=4.0))
    from apparate_llm.prepare import train

    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", 0.0)
    checkpoint = tmp_path / "train.pt"

    for stop_at in (0.3, 0.7):

        def kill(done_frac, facts, stop_at=stop_at):
            if done_frac >= stop_at:
                raise Killed

        with pytest.raises(Killed):
            train_head(rows, base, vocabulary, settings(epochs=4.0), checkpoint=checkpoint, on_progress=kill)
    resumed_from: list[float] = []
    again, _ = train_head(
        rows,
        base,
        vocabulary,
        settings(epochs=4.0),
        checkpoint=checkpoint,
        on_progress=lambda done, facts: resumed_from.append(done),
    )
    assert resumed_from[0] > 0.6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_costs_in_a_training_is_known_before_there_are_rows(dtype, base, monkeypatch):
    Slow(monkeypatch, step_s=0.5, row_s=1.0)
    made = settings(depth=2, aux_layers=(1, 3))
    assert seconds_of_trained_row(base, torch.arange(VOCAB), made, dtype) == pytest.approx(0.5 / TIMED_ROWS)


def test_a_time_budget_ends_the_training_and_what_was_spent_before_counts(base, rows, tmp_path):
    vocabulary = ramp_vocabulary(rows, VOCAB)
    checkpoint = tmp_path / "train.pt"
    short = settings(epochs=1e6, time_budget_s=0.5)
    _, record = train_head(rows, base, vocabulary, short, checkpoint=checkpoint)
    _, again = train_head(rows, base, vocabulary, short, checkpoint=checkpoint)
    assert again["steps"] == record["steps"]


@pytest.mark.parametrize(("step_s", "row_s"), [(2.0, 0.004), (10.0, 0.02), (10.0, 0.2)])
def test_a_training_of_a_large_model_ends_in_time_and_does_not_only_evaluate(base, rows, step_s, row_s, monkeypatch):
    """What comes after its last step is within its time; a model that evaluates slowly does so on fewer rows."""
    from apparate_llm.prepare import train

    monkeypatch.setattr(train, "PROBED_ROWS", 8)
    monkeypatch.setattr(train, "MIN_EVALUATED_ROWS", 32)
    machine, budget_s = Slow(monkeypatch, step_s=step_s, row_s=row_s), 300.0
    _, record = train_head(rows, base, ramp_vocabulary(rows, VOCAB), settings(epochs=1e6, time_budget_s=budget_s))
    closing_s = machine.evaluations[-1] * row_s  # on training rows
    assert machine.now + closing_s <= budget_s + step_s + 1
    assert machine.now + closing_s >= 0.8 * budget_s
    assert record["steps"] * step_s >= 0.6 * budget_s
    assert record["evaluated_rows"] >= 32 and record["evaluate_s"] == pytest.approx(closing_s, rel=1e-3)


@pytest.mark.parametrize(("step_s", "row_s"), [(0.5, 0.05), (10.0, 0.2), (50.0, 0.3)])
def test_a_training_is_kept_every_two_minutes_on_any_model(base, rows, step_s, row_s, tmp_path, monkeypatch):
    machine = Slow(monkeypatch, step_s=step_s, row_s=row_s, save_s=8.0)
    train_head(rows, base, ramp_vocabulary(rows, VOCAB), settings(epochs=20.0), checkpoint=tmp_path / "train.pt")
    assert machine.saves
    assert max(after - before for before, after in pairwise([0.0, *machine.saves])) <= 120.0
