"""Ramp training on a tiny model: rows, losses, calibration and vocabulary behave."""

import json

import pytest
import torch

from apparate_llm.ramps.prepare.collect import collect
from apparate_llm.ramps.prepare.synthesise import count_tokens, user_turn_affixes
from apparate_llm.ramps.prepare.train import BaseParts, calibrate, evaluate_head, ramp_vocabulary, starts, train_head


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def conversations(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "conversations.jsonl"
    torch.manual_seed(0)
    lines = []
    for length in (8, 20, 13, *[16] * 40):
        prompt = torch.randint(5, 160, (1, length))
        with torch.inference_mode():
            full = model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
        lines.append(json.dumps({"prompt": prompt[0].tolist(), "answer": full[0, length:].tolist()}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def rows(model, conversations):
    return collect(model, conversations, depths=(0, 2), skip_prefix=2, max_rows=10**6, batch_tokens=128)


def test_rows_hold_what_one_conversation_alone_gives(model, conversations, rows):
    """Batches are padded; no row may show it."""
    for number, line in enumerate(conversations.read_text().splitlines()[:3]):
        record = json.loads(line)
        ids = record["prompt"] + record["answer"]
        with torch.inference_mode():
            out = model.model(torch.tensor([ids]), output_hidden_states=True)
        mine = rows.documents == number
        assert rows.tokens[mine].tolist() == ids[2:]
        torch.testing.assert_close(rows.final[mine], out.last_hidden_state[0, 2:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows.hidden[2][mine], out.hidden_states[2][0, 2:], rtol=1e-4, atol=1e-4)
        # Greedy answers: the best next token of each row before an answer token is that token.
        first = len(record["prompt"]) - 1 - 2
        assert rows.top_ids[mine][first:-1, 0].tolist() == record["answer"]
        assert rows.is_answer[mine].tolist() == [i >= first for i in range(len(ids) - 2)]


def test_training_rows_never_span_two_conversations(rows):
    for held_out in (False, True):
        index = starts(rows, 3, held_out=held_out)
        assert len(index)
        for offset in (-1, 1, 2):
            assert torch.equal(rows.documents[index + offset], rows.documents[index])
    kept = set(rows.documents[starts(rows, 3, held_out=False)].tolist())
    assert kept.isdisjoint(rows.documents[starts(rows, 3, held_out=True)].tolist())


@pytest.mark.parametrize("depth", [0, 2])
def test_training_lowers_the_loss_and_learns_its_rows(model, rows, depth):
    base = BaseParts(
        embedding=model.get_input_embeddings().weight.detach(),
        lm_head=model.get_output_embeddings().weight.detach(),
        norm=model.model.norm.weight.detach(),
        eps=model.config.rms_norm_eps,
    )
    vocabulary = ramp_vocabulary(rows, 160)

    def agreement(epochs):
        head, _ = train_head(
            rows,
            base,
            vocabulary,
            depth=depth,
            intermediate_size=96,
            epochs=epochs,
            seed=0,
            time_budget_s=60,
            batch_rows=128,
        )
        seen = rows._replace(documents=rows.documents * 20)  # makes every row held out: this looks at memory
        return [
            a.float().mean().item() for _, a in evaluate_head(head, seen, base, vocabulary, depth=depth, num_rounds=2)
        ]

    before, after = agreement(1.0), agreement(60.0)
    assert after[0] > before[0] + 0.1


def test_calibration_recovers_a_known_distortion():
    torch.manual_seed(0)
    confidence = torch.rand(20_000).clamp(0.01, 0.99)
    true = torch.sigmoid(0.5 * torch.logit(confidence) - 0.7)
    scale, offset = calibrate(confidence, torch.rand(20_000) < true)
    assert scale == pytest.approx(0.5, abs=0.05) and offset == pytest.approx(-0.7, abs=0.05)


def test_calibration_without_rows_changes_nothing_wild():
    scale, offset = calibrate(torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert (scale, offset) == (0.0, 0.0)


def test_the_vocabulary_is_what_the_model_wants_most(rows):
    vocabulary = ramp_vocabulary(rows, 20)
    assert len(vocabulary) == 20 and torch.equal(vocabulary, vocabulary.sort().values)
    wanted = torch.bincount(rows.top_ids[rows.is_answer, 0].long(), minlength=160)
    assert wanted.argmax() in vocabulary


def test_a_half_written_conversation_is_cut_off(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"answer":[1,2]}\n{"answer":[1,2,3]}\n{"answer":[1,')
    assert count_tokens(path) == (2, 5)
    assert path.read_text() == '{"answer":[1,2]}\n{"answer":[1,2,3]}\n'
    assert count_tokens(tmp_path / "none") == (0, 0)


def test_the_chat_template_is_split_around_the_users_words(tiny_llama):
    from transformers import AutoTokenizer

    assert user_turn_affixes(AutoTokenizer.from_pretrained(tiny_llama)) == ("<user> ", " <assistant> ")
