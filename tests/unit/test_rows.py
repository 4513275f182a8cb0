"""Rows of made-up conversations: on disk, in three splits, and what is known of them without a head."""

import json
import math
from collections import Counter

import pytest
import torch

from apparate_llm.prepare.draft_data import ramp_vocabulary, starts
from apparate_llm.prepare.evaluate import ceiling
from apparate_llm.prepare.rows import LEAD, TEST, TRAIN, VALIDATION, rows_of
from apparate_llm.prepare.splits import BLOCK, next_split, sources, split_of, splits_of_prompts
from apparate_llm.prepare.store import INDEX, RowStore
from apparate_llm.renamed import ROW_COLUMNS
from tests.made_rows import VOCAB, base_parts, made_conversations


@pytest.fixture(scope="module")
def conversations():
    return made_conversations(base_parts())


@pytest.fixture(scope="module")
def rows(conversations):
    return rows_of(conversations)


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"counts": {"rows": "x"}, "facts": {}, "columns": {}}'])
def test_a_damaged_index_of_the_rows_is_named(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"damaged .*index\.json: "):
        RowStore(tmp_path)


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


def test_the_ceiling_is_of_answer_rows_only(rows):
    facts = ceiling(rows)
    assert facts["p_over_0.7_frac"] == 1.0 and facts["p_over_0.99_frac"] == 0.0
    assert facts["mean_best_p"] == pytest.approx(0.9, abs=0.01)


def test_numbers_in_a_report_are_plain(rows):
    assert json.dumps(ceiling(rows)) and all(math.isfinite(value) for value in ceiling(rows).values())
