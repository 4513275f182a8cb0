"""Ramp training and its surroundings on made-up rows: losses, draft steps, calibration, vocabulary, resumption."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from apparate_llm.prepare.acceptance import measure_head
from apparate_llm.prepare.calibrate import calibrate_positions, coverage_curve, fit
from apparate_llm.prepare.capture import top_tokens
from apparate_llm.prepare.command import duration, parse_depths
from apparate_llm.prepare.draft_data import BaseParts, DraftData, ramp_vocabulary, starts
from apparate_llm.prepare.evaluate import calibration_error, ceiling
from apparate_llm.prepare.pipeline import disk_errors, running
from apparate_llm.prepare.plan import Plan, automatic_aux_layers, automatic_depths
from apparate_llm.prepare.rows import LEAD, TEST, TOP, TRAIN, VALIDATION, Conversation, rows_of
from apparate_llm.prepare.schedule import WorkClock
from apparate_llm.prepare.splits import BLOCK, next_split, sources, split_of, splits_of_prompts
from apparate_llm.prepare.store import INDEX, RowStore
from apparate_llm.prepare.train import TrainSettings, batch_loss, new_head, train_head
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.ramps.load import calibrated, calibrated_all
from apparate_llm.renamed import ROW_COLUMNS

VOCAB, H = 50, 16


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    embedding = torch.randn(VOCAB, H)
    return BaseParts(embedding, torch.randn(VOCAB, H), torch.ones(H), 1e-5)


def conversation(base, generator):
    """The next token is a function of the last two: the final state holds the older, the embedding the newer one."""
    tokens = torch.randint(0, VOCAB, (2,), generator=generator).tolist()
    while len(tokens) < 24:
        tokens.append((3 * tokens[-1] + 5 * tokens[-2] + 7) % VOCAB)
    prompt, answer = tokens[:6], tokens[6:]
    states = torch.stack([base.embedding[token] for token in tokens[4:-1]])
    best = torch.tensor([0, *answer])
    others = torch.arange(1, TOP)
    top_ids = (best[:, None] + torch.cat([torch.zeros(1), others])) % VOCAB
    probability = torch.full((len(best), TOP), 0.1 / (TOP - 1))
    probability[:, 0] = 0.9
    return Conversation(prompt, answer, {2: states + 1}, states, top_ids, probability.log())


@pytest.fixture(scope="module")
def conversations(base):
    generator = torch.Generator().manual_seed(1)
    return [conversation(base, generator)._replace(split=split_of(i, "0")) for i in range(200)]


@pytest.fixture(scope="module")
def rows(conversations):
    return rows_of(conversations)


def settings(**changes):
    return TrainSettings(**{"depth": 0, "intermediate_size": 32, "batch_rows": 256, "epochs": 30.0, **changes})


def test_rows_start_with_the_lead_and_the_prompts_last_token(conversations, rows):
    first = rows.tokens[rows.conversations == 0].tolist()
    one = conversations[0]
    assert first == one.prompt[-2:] + one.answer[:-1]
    assert rows.answer_index[:3].tolist() == [LEAD, 0, 1]
    assert rows.top_ids[1 : len(first), 0].tolist() == one.answer
    assert set(rows.conversations[rows.split == TEST].tolist()) == {i for i in range(200) if split_of(i, "0") == TEST}


def test_rows_survive_the_disk_and_conversations_are_numbered_on(tmp_path, conversations, rows):
    store = RowStore(tmp_path)
    store.append(conversations, next_number=7)
    RowStore(tmp_path).append(conversations, next_number=8)
    both = RowStore(tmp_path)
    assert both.facts == {"next_number": 8} and both.counts["conversations"] == 400
    n, read = len(rows.tokens), both.rows(depths=(2,))
    for name in ("tokens", "final", "top_ids", "lookup_tokens", "split"):
        assert torch.equal(getattr(read, name)[n:], getattr(rows, name))
    assert torch.equal(read.states[2][:n], rows.states[2])
    assert torch.equal(read.conversations[n:], rows.conversations + 200)
    both.release()
    assert torch.equal(read.final[:n], rows.final)
    assert both.rows(depths=(), num_rows=n).states == {} and len(both.rows(depths=(), num_rows=n).tokens) == n
    texts = list(both.texts())
    assert [(text.prompt, text.answer, text.split) for text in texts[200:]] == [
        (one.prompt, one.answer, one.split) for one in conversations
    ]


def test_rows_of_an_older_version_are_read_and_go_on(tmp_path, conversations, rows):
    RowStore(tmp_path).append(conversations)
    index = json.loads((tmp_path / INDEX).read_text())
    for old, new in ROW_COLUMNS.items():
        (tmp_path / new).rename(tmp_path / old)
        index["columns"][old] = index["columns"].pop(new)
    (tmp_path / INDEX).write_text(json.dumps(index))
    RowStore(tmp_path).append(conversations)
    again = RowStore(tmp_path)
    n, both = len(rows.tokens), again.rows(depths=())
    for name in ROW_COLUMNS.values():
        for half in (slice(n), slice(n, None)):
            assert torch.equal(getattr(both, name)[half], getattr(rows, name))


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, conversations, monkeypatch):
    store = RowStore(tmp_path)
    store.append(conversations[:3])
    before = {name: tensor.clone() for name, tensor in store.rows(depths=(2,))._asdict().items() if name != "states"}
    writes, write = [], RowStore._write

    def full_disk(self, name, count, tensor):
        writes.append(name)
        if len(writes) > 4:
            raise OSError(28, "No space left on device")
        write(self, name, count, tensor)

    monkeypatch.setattr(RowStore, "_write", full_disk)
    with pytest.raises(OSError, match="No space"):
        RowStore(tmp_path).append(conversations[3:9])
    monkeypatch.undo()
    again = RowStore(tmp_path)
    assert again.counts["conversations"] == 3
    again.append(conversations[3:5])
    rows = again.rows(depths=(2,))
    for name, tensor in before.items():
        assert torch.equal(getattr(rows, name)[: len(tensor)], tensor)
    assert [text.prompt for text in again.texts()] == [one.prompt for one in conversations[:5]]


def test_every_block_of_conversations_has_one_to_choose_with_and_one_to_report_from():
    splits = [split_of(number, "0") for number in range(50 * BLOCK)]
    for block in range(50):
        part = splits[block * BLOCK : (block + 1) * BLOCK]
        assert part.count(VALIDATION) == part.count(TEST) == 1
    assert len({splits[block * BLOCK : (block + 1) * BLOCK].index(TEST) for block in range(50)}) > 8  # no fixed place
    assert splits != [split_of(number, "1") for number in range(50 * BLOCK)]


def test_a_new_conversation_is_of_the_split_that_has_fewest_for_its_share():
    counts: Counter[int] = Counter()
    order = []
    for _ in range(16 * 20):
        order.append(next_split(counts))
        counts[order[-1]] += 1
        if len(order) > 15:
            assert min(counts[VALIDATION], counts[TEST]) >= len(order) // 16
    assert counts == {TRAIN: 14 * 20, VALIDATION: 20, TEST: 20}
    assert order[:3] == [TRAIN, VALIDATION, TEST]  # a short time, or few conversations at once, give some of each
    assert next_split(counts - Counter({TEST: 3})) == TEST  # lost by a kill


def test_prompts_about_one_passage_are_one_source():
    passage = " ".join(f"word{i}" for i in range(40))
    form = " ".join(f"form{i}" for i in range(20))
    others = [f"{form} question {i} {i * 7}" for i in range(20)]
    texts = [f"Summarize: {passage}", *others, f"What is the third word of this? {passage}", "short", "short", "other"]
    numbers = sources(texts)
    assert numbers[0] == numbers[21] and numbers[22] == numbers[23] != numbers[24]
    assert len(set(numbers[1:21])) == 20  # a form that many share makes no source
    prompts = [[{"role": "system", "content": passage}, {"role": "user", "content": text}] for text in texts]
    splits = splits_of_prompts(prompts, "0")
    assert splits[0] == splits[21] and len(set(splits)) > 1


def test_training_rows_are_answers_of_their_split(rows):
    parts = [starts(rows, split=split) for split in (TRAIN, VALIDATION, TEST)]
    together = torch.cat(parts)
    assert len(together.unique()) == len(together) == int((rows.answer_index > LEAD).sum())
    assert all((rows.split[part] == split).all() and len(part) for split, part in enumerate(parts))


def test_the_vocabulary_holds_what_the_model_wants_most_in_training_rows(rows):
    vocabulary = ramp_vocabulary(rows, 20)
    assert len(vocabulary) == 20 and torch.equal(vocabulary, vocabulary.sort().values)
    train = starts(rows, split=TRAIN)
    wanted = torch.zeros(VOCAB).index_add_(
        0, rows.top_ids[train].flatten().long(), rows.top_logprobs[train].float().exp().flatten()
    )
    assert set(vocabulary.tolist()) == set(wanted.topk(20).indices.tolist())


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


def test_the_loss_is_cross_entropy_with_the_gradient_of_it(base, rows):
    """Against the same loss written out and differentiated by torch."""
    vocabulary = ramp_vocabulary(rows, 30)  # some targets are outside
    head = new_head(base, vocabulary, settings(dropout=0.0))
    data = DraftData(rows, base, depth=0, aux_layers=(), vocabulary=vocabulary)
    index = starts(rows, split=TRAIN)[:64]
    columns, probability = data.targets(index)
    hidden, lookup = data.inputs(index)

    def reference():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, _ = head(hidden, data.enter(head, index), lookup)
        logs = scores.float().log_softmax(-1).gather(1, columns)
        return -(torch.where(probability > 0, logs, 0.0) * probability).sum(-1).mean()

    expected = torch.autograd.grad(reference(), head.fuse)[0]
    loss = batch_loss(head, data, index, (1.0,))
    assert loss.item() == pytest.approx(reference().item(), rel=0.02)
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

    class Killed(Exception):
        pass

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


def test_a_time_budget_ends_the_training_and_what_was_spent_before_counts(base, rows, tmp_path):
    vocabulary = ramp_vocabulary(rows, VOCAB)
    checkpoint = tmp_path / "train.pt"
    short = settings(epochs=1e6, time_budget_s=0.5)
    _, record = train_head(rows, base, vocabulary, short, checkpoint=checkpoint)
    _, again = train_head(rows, base, vocabulary, short, checkpoint=checkpoint)
    assert again["steps"] == record["steps"]


class Slow:
    """A machine on which a training's steps and evaluations take as long as told; `time` for the module."""

    def __init__(self, monkeypatch, *, step_s, row_s):
        from apparate_llm.prepare import train

        self.now, self.evaluations = 0.0, []
        loss, measure = train.batch_loss, train.measure_head

        def slow_loss(*args):
            self.now += step_s
            return loss(*args)

        def slow_measure(head, data, index, **settings):
            self.now += row_s * len(index)
            self.evaluations.append(len(index))
            return measure(head, data, index, **settings)

        monkeypatch.setattr(train, "time", self)
        monkeypatch.setattr(train, "batch_loss", slow_loss)
        monkeypatch.setattr(train, "measure_head", slow_measure)

    def monotonic(self):
        return self.now


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
    from apparate_llm.prepare import train

    machine = Slow(monkeypatch, step_s=step_s, row_s=row_s)
    kept, save = [0.0], train.save_state

    def kept_now(state, path):
        kept.append(machine.now)
        save(state, path)

    monkeypatch.setattr(train, "save_state", kept_now)
    train_head(rows, base, ramp_vocabulary(rows, VOCAB), settings(epochs=20.0), checkpoint=tmp_path / "train.pt")
    assert len(kept) > 1
    assert max(after - before for before, after in pairwise(kept)) <= 120.0


def test_platt_scaling_recovers_a_known_distortion():
    torch.manual_seed(0)
    confidence = torch.rand(20_000).clamp(0.01, 0.99)
    true = torch.sigmoid(0.5 * torch.logit(confidence) - 0.7)
    scale, offset = fit(confidence, torch.rand(20_000) < true)
    assert scale == pytest.approx(0.5, abs=0.05) and offset == pytest.approx(-0.7, abs=0.05)
    assert fit(torch.empty(0), torch.empty(0, dtype=torch.bool)) == (0.0, 0.0)
    assert fit(confidence, true) == pytest.approx((scale, offset), abs=0.1)


@pytest.mark.parametrize(("low", "agreement"), [(4e-4, 0.34), (5e-4, 0.97), (0.98, 0.02), (1e-9, 0.999)])
def test_platt_scaling_takes_confidence_that_is_far_from_agreement(low, agreement):
    """As of a ramp that was hardly trained."""
    torch.manual_seed(0)
    confidence = low + 0.008 * torch.rand(5000)
    agrees = torch.rand(5000) < agreement
    scale, offset = fit(confidence, agrees)
    probability = calibrated_all(confidence, scale, offset)
    assert float(probability.mean()) == pytest.approx(float(agrees.float().mean()), abs=1e-3)
    assert calibration_error(probability, agrees) < 0.02
    assert calibrated(math.log(0.004), scale, offset) == pytest.approx(
        float(calibrated_all(torch.tensor([0.004]), scale, offset)[0])
    )


def test_a_calibration_of_any_size_gives_a_probability():
    for scale, offset in ((2.4e7, -3.3e6), (-2.4e7, 3.3e6)):
        for value in (-60.0, -7.0, -1e-9, 0.0):
            assert 0.0 <= calibrated(value, scale, offset) <= 1.0


def test_the_calibration_error_is_the_weighted_gap_of_the_bins():
    confidence = torch.tensor([0.05] * 10 + [0.95] * 30)
    agrees = torch.tensor([True] * 5 + [False] * 5 + [True] * 30)
    assert calibration_error(confidence, agrees) == pytest.approx((10 * 0.45 + 30 * 0.05) / 40, abs=1e-6)
    assert calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)) == 0.0


def test_calibration_is_reported_from_conversations_it_was_not_fitted_on():
    """Confidence that means the opposite in the two sets: only the honest error is large."""
    torch.manual_seed(0)
    confidence = torch.where(torch.rand(2000) < 0.5, 0.2, 0.8)
    sure = confidence > 0.5

    def tensors(agrees):
        kind = torch.zeros(2000, dtype=torch.int8)
        return {"0.confidence": confidence, "0.agrees": agrees, "0.conversation": torch.arange(2000), "0.kind": kind}

    assert calibrate_positions(tensors(sure), tensors(sure))["calibration_error"] < 0.05
    result = calibrate_positions(tensors(sure), tensors(~sure))
    assert result["calibration_error"] > 0.7
    assert result["acceptance_rates"] == [pytest.approx(float((~sure).float().mean()))]
    assert result["by_kind"] == {"open": result["acceptance_rates"][0]} and result["rows"] == [2000]


def test_the_coverage_curve_counts_from_the_most_confident_row_on():
    probability = torch.tensor([0.9, 0.1, 0.8, 0.7])
    agrees = torch.tensor([True, False, False, True])
    assert coverage_curve(probability, agrees) == [(0.25, 0.0), (0.5, 0.25), (0.75, 0.25), (1.0, 0.5)]


def test_the_ceiling_is_of_answer_rows_only(rows):
    facts = ceiling(rows)
    assert facts["p_over_0.7_frac"] == 1.0 and facts["p_over_0.99_frac"] == 0.0
    assert facts["mean_best_p"] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("vocab", [20, 500, 1024, 5000])
def test_top_tokens_are_those_of_a_sort(vocab):
    torch.manual_seed(vocab)
    logits = torch.randn(7, vocab)
    values, ids = top_tokens(logits, TOP)
    expected = logits.log_softmax(-1).topk(TOP)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(ids, expected.indices)


def test_a_stages_result_counts_only_for_what_it_was_made_from(tmp_path):
    workspace = Workspace(tmp_path / "out")
    assert workspace.read("train", {"groups": 1}) is None
    workspace.write("train", {"groups": 1}, {"loss": 2})
    assert workspace.read("train", {"groups": 1}) == {"loss": 2}
    assert workspace.read("train", {"groups": 2}) is None


def test_two_preparations_cannot_share_a_folder(tmp_path):
    with (
        Workspace(tmp_path).locked(),
        pytest.raises(RuntimeError, match="another preparation"),
        Workspace(tmp_path).locked(),
    ):
        pass


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("1.5h", 5400)])
def test_durations(text, seconds):
    assert duration(text) == seconds


def test_bad_depths_and_durations_say_what_is_allowed():
    import argparse

    for text in ("45", "0m", "m", "-1h", "1d"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"90s, 45m or 1\.5h"):
            duration(text)
    assert parse_depths("4,0", 24) == (0, 4) and parse_depths("auto", 24) == (0, 2)
    for text in ("24", "0,0", "a", "", "-1"):
        with pytest.raises(ValueError, match="numbers from 0 to 23"):
            parse_depths(text, 24)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 28, 80])
def test_depths_chosen_for_a_model_are_different_blocks_of_it(num_layers):
    depths, aux_layers = automatic_depths(num_layers), automatic_aux_layers(num_layers)
    assert list(depths) == sorted({depth for depth in depths if 0 <= depth < num_layers}) and depths[0] == 0
    assert list(aux_layers) == sorted({depth for depth in aux_layers if 0 < depth < num_layers})


def test_numbers_in_a_report_are_plain(base, rows):
    assert json.dumps(ceiling(rows)) and all(math.isfinite(value) for value in ceiling(rows).values())


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_line_that_says_how_to_go_on(error, tmp_path):
    with pytest.raises(RuntimeError, match="make room and give the same command again"), disk_errors(tmp_path):
        raise error


@pytest.mark.parametrize("name", ["head.safetensors", "train.pt", "empty.pt"])
def test_a_damaged_file_of_a_preparation_is_one_line_that_says_how_to_go_on(name, tmp_path):
    from safetensors.torch import load_file

    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.pt" else b"damaged" * 9)
    with (
        pytest.raises(ValueError, match=r"^a damaged file in .*/work \(.*\): delete that folder") as error,
        disk_errors(tmp_path),
    ):
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"inputs": 1, "result": {}}', '{"inputs": {}}', pytest.param("[" * 99_999, id="nested")]
)
def test_a_damaged_record_of_a_preparation_is_named(text, tmp_path):
    workspace = Workspace(tmp_path / "out")
    workspace.path("clock.json").write_text(text)
    with pytest.raises(ValueError, match=r"damaged .*clock\.json: "):
        WorkClock(workspace)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"counts": {"rows": "x"}, "facts": {}, "columns": {}}'])
def test_a_damaged_index_of_the_rows_is_named(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"damaged .*index\.json: "):
        RowStore(tmp_path)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(ValueError, match="other"), disk_errors(tmp_path):
        raise ValueError("other")


def test_a_preparation_that_goes_on_knows_how_long_it_has_worked(tiny_llama, tmp_path):
    workspace = Workspace(tmp_path / "out")
    workspace.write("clock", {}, {"seconds": 1000.0})
    plan = Plan(tiny_llama, tmp_path / "out", (0,), (1,), None, 2700.0, 0, 8192, 64)
    with running(plan, workspace, Console(quiet=True)) as run:
        assert run.progress.before_s == 1000.0 <= run.clock.spent_s < 1100.0
        assert 1600.0 < run.progress.left_s() <= 1700.0
