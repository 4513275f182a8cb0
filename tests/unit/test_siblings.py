"""Which models ramps fit that were made for another one, and what is said of those they do not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from apparate_llm.ramps.base_weights import BaseWeights
from apparate_llm.ramps.checkpoint import MANIFEST, RampError, read_manifest, shipped_folders
from apparate_llm.ramps.fingerprint import fingerprint_of
from apparate_llm.ramps.fitting import LEAST_COSINE, check_might_fit, fitting_ramps, mean_cosine
from apparate_llm.ramps.sketch import NUM_ROWS, SKETCH, Shapes, Sketch, evenly_spread
from apparate_llm.ramps.tokens import TokenizerDigest, TokenizerError
from tests.quantised import FORMATS
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE, build_lens_ramps, build_tiny_model


@pytest.fixture(scope="module")
def ramps(tiny_llama, tmp_path_factory):
    return build_lens_ramps(tmp_path_factory.mktemp("ramps") / "ramps", tiny_llama, depth=3)


@pytest.fixture
def copy(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def fitting(model, ramps):
    return fitting_ramps(BaseWeights.of(model), model, ramps)


def change_weights(model, change):
    weights = {name: change(name, tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def change_tokenizer(model, change):
    document = json.loads((model / "tokenizer.json").read_text())
    change(document)
    (model / "tokenizer.json").write_text(json.dumps(document))


def test_the_model_that_ramps_were_made_for_is_no_sibling(tiny_llama, ramps):
    assert fitting(tiny_llama, ramps).sibling is None


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head", [False, True])
def test_a_quantised_model_is_a_sibling(name, head, tiny_llama, ramps, tmp_path):
    model = FORMATS[name](tiny_llama, tmp_path / "model", head=head)
    sibling = fitting(model, ramps).sibling
    assert sibling.head_is_quantised is head
    assert sibling.embedding_cosine == pytest.approx(1.0, abs=1e-4)
    assert (0.98 if head else 0.9999) < sibling.head_cosine <= 1.0001
    line = str(sibling)
    assert line.startswith("ramps of llama for a sibling: ") and "\n" not in line
    assert ("dequantised" in line) is head and ("compressed-tensors" in line) is name.startswith("W")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_other_numbers_is_a_sibling(dtype, copy, ramps):
    change_weights(copy, lambda name, tensor: tensor.to(dtype))
    sibling = fitting(copy, ramps).sibling
    assert sibling.head_cosine > 0.9999 and str(dtype).removeprefix("torch.") in str(sibling)


def test_a_fine_tuned_model_is_a_sibling(copy, ramps):
    change_weights(copy, lambda name, tensor: tensor + 0.1 * tensor.std() * torch.randn_like(tensor))
    assert 0.98 < fitting(copy, ramps).sibling.head_cosine < 1.0


def test_another_training_is_none(ramps, tmp_path):
    with pytest.raises(RampError, match=r"made for another model than .*no sibling of llama: .*rows of its head has a"):
        fitting(build_tiny_model(tmp_path / "other", seed=1), ramps)


def test_rows_that_stand_for_other_tokens_are_seen(copy, ramps):
    def turn(name, tensor):
        return tensor.flip(0).contiguous() if "embed_tokens" in name else tensor

    change_weights(copy, turn)
    with pytest.raises(RampError, match=r"rows of its embedding has a cosine of -?0\.\d\d .*at least 0\.9 is needed"):
        fitting(copy, ramps)


def test_rows_that_are_no_numbers_are_like_none(copy, ramps):
    def damaged(name, tensor):
        return tensor.index_fill(0, evenly_spread(VOCAB_SIZE)[:1], float("nan")) if "embed_tokens" in name else tensor

    change_weights(copy, lambda name, tensor: damaged(name, tensor.bfloat16()))
    with pytest.raises(RampError, match="rows of its embedding has a cosine of nan"):
        fitting(copy, ramps)


@pytest.mark.parametrize(("name", "size"), [("lm_head", (VOCAB_SIZE - 8, 64)), ("embed_tokens", (VOCAB_SIZE, 32))])
def test_tables_of_another_size_than_the_configuration_says_are_named(name, size, copy, ramps):
    """As where embeddings were resized and config.json was not."""
    change_weights(copy, lambda of, tensor: tensor[: size[0], : size[1]].contiguous() if name in of else tensor)
    with pytest.raises(RampError, match=rf"has shape \({size[0]}, {size[1]}\), not \({VOCAB_SIZE}, {HIDDEN_SIZE}\)"):
        fitting(copy, ramps)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "its num_hidden_layers is 3, not 4"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "num_attention_heads is 4, not 2, its num_key_value_h"),
        ({"architectures": ["MistralForCausalLM"]}, "architecture is MistralForCausalLM, not LlamaForCausalLM"),
    ],
)
def test_other_shapes_are_named(changes, says, copy, ramps):
    change_weights(copy, lambda name, tensor: tensor.bfloat16())
    change_config(copy, **changes)
    with pytest.raises(RampError, match=says):
        fitting(copy, ramps)


def test_a_tokenizer_is_compared_by_content(copy, ramps):
    change_weights(copy, lambda name, tensor: tensor.bfloat16())
    change_tokenizer(copy, lambda document: document["model"].update(unk_token="<unk>"))
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=3))
    assert fitting(copy, ramps).sibling

    added = {"id": VOCAB_SIZE, "content": "<tool>", "special": True}
    change_tokenizer(copy, lambda document: document["added_tokens"].append(added))
    assert fitting(copy, ramps).sibling  # what it knows more of stands above

    (copy / "tokenizer.json").write_text(text)
    change_tokenizer(copy, lambda document: document["added_tokens"][7].update(content="another"))
    with pytest.raises(RampError, match=f"its tokenizer has other tokens below {VOCAB_SIZE}"):
        fitting(copy, ramps)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(RampError, match=r"no sibling of llama: no tokenizer\.json in"):
        fitting(copy, ramps)


def test_before_its_weights_are_there_a_model_is_judged_by_shape_and_tokenizer(copy, ramps, tmp_path):
    (copy / "model.safetensors").unlink()
    check_might_fit(copy, ramps)
    text = (copy / "tokenizer.json").read_text()
    change_tokenizer(copy, lambda document: document["added_tokens"][7].update(content="another"))
    with pytest.raises(RampError, match=f"no sibling of llama: its tokenizer has other tokens below {VOCAB_SIZE}"):
        check_might_fit(copy, ramps)
    (copy / "tokenizer.json").unlink()
    check_might_fit(copy, ramps)  # the very model may have it elsewhere
    (copy / "tokenizer.model").write_bytes(b"sentences")
    check_might_fit(copy, ramps)  # or in another format
    (copy / "tokenizer.json").write_text(text)
    change_config(copy, num_attention_heads=4)
    with pytest.raises(RampError, match=r"another model than copy: it is no sibling of llama: its num_attention_heads"):
        check_might_fit(copy, ramps)
    with pytest.raises(RampError, match=r"^no shipped ramps fit copy .it is no sibling of .*or use --policy off$"):
        check_might_fit(copy, None)
    old = shutil.copytree(ramps, tmp_path / "old")
    (old / SKETCH).unlink()
    check_might_fit(copy, old)  # ramps without a sketch know fewer shapes
    change_config(copy, num_hidden_layers=3)
    with pytest.raises(RampError, match="another model than copy: its num_hidden_layers is 3, not 4"):
        check_might_fit(copy, old)
    (copy / "config.json").write_text("{}")
    with pytest.raises(RampError, match="does not say"):
        check_might_fit(copy, old)


def test_merges_are_compared_in_either_way_to_write_them(tmp_path):
    def folder(name, merges, **files):
        (tmp_path / name).mkdir()
        model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": merges}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
        return tmp_path / name

    digest = TokenizerDigest.of(folder("texts", ["a b", "b a"]))
    assert digest.difference(folder("pairs", [["a", "b"], ["b", "a"]])) is None
    assert digest.difference(folder("turned", [["b", "a"], ["a", "b"]])) == "its tokenizer has other merges"
    filled = folder("filled", ["a b", "b a"])
    change_tokenizer(filled, lambda document: document["model"]["vocab"].update({"[PAD3]": 3, "[PAD4]": 4}))
    assert digest.difference(filled) is None and TokenizerDigest.of(filled) == digest
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (slow / "merges.txt").write_text("#version: 0.2\na b\nb a\n")
    assert digest.difference(slow) is None
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "tokenizer.model").write_bytes(b"\x00sentences")
    assert digest.difference(tmp_path / "whole") == "its tokenizer is of another format"
    whole = TokenizerDigest.of(tmp_path / "whole")
    assert whole.difference(tmp_path / "whole") is None
    assert whole.difference(slow) == "its tokenizer has other tokens"
    (slow / "vocab.json").write_text("[")
    with pytest.raises(TokenizerError, match=r"damaged .*vocab\.json"):
        TokenizerDigest.of(slow)


def test_without_a_sketch_ramps_are_for_the_very_model(tiny_llama, copy, ramps, tmp_path):
    change_weights(copy, lambda name, tensor: tensor.bfloat16())
    old = shutil.copytree(ramps, tmp_path / "old")
    (old / SKETCH).unlink()
    assert fitting(tiny_llama, old).sibling is None
    with pytest.raises(RampError, match=f"made for another model .*without {SKETCH} siblings cannot be told"):
        fitting(copy, old)


def test_a_sketch_of_something_else_is_damage(copy, ramps, tiny_models, tmp_path):
    change_weights(copy, lambda name, tensor: tensor.bfloat16())
    wrong = shutil.copytree(ramps, tmp_path / "wrong")
    Sketch.of(tiny_models["qwen2"]).save(wrong)
    with pytest.raises(RampError, match=rf"damaged .*{SKETCH}: it is of "):
        fitting(copy, wrong)
    (wrong / SKETCH).write_bytes(b"x" * 100)
    with pytest.raises(RampError, match=rf"damaged .*{SKETCH}"):
        fitting(copy, wrong)


def test_no_shipped_ramps_fit_a_stranger_and_each_is_named(tiny_llama):
    with pytest.raises(RampError) as error:
        fitting(tiny_llama, None)
    text = str(error.value)
    assert text.startswith("no shipped ramps fit ") and text.endswith("use --policy off") and "\n" not in text
    assert text.count("it is no sibling of ") == len(shipped_folders())


def test_shipped_ramps_know_their_siblings():
    for folder in shipped_folders():
        base = read_manifest(folder).base_model
        sketch = Sketch.read(folder, fingerprint=base.fingerprint)
        shapes = sketch.description.shapes
        assert (shapes.architecture, shapes.num_hidden_layers) == (base.architecture, base.num_hidden_layers)
        assert (shapes.hidden_size, shapes.vocab_size) == (base.hidden_size, base.vocab_size)
        assert sketch.description.tokenizer.num_tokens > 0.9 * base.vocab_size
        assert sketch.head.shape == sketch.embedding.shape == (NUM_ROWS, base.hidden_size)
        assert sketch.row_ids.equal(evenly_spread(base.vocab_size)) and sketch.head.isfinite().all()
        assert (folder / SKETCH).stat().st_size < 300_000
        others = sketch.head.roll(1, 0)
        assert mean_cosine(sketch.head, others) < 0.2 < LEAST_COSINE < mean_cosine(sketch.head, sketch.head)


def test_a_model_of_a_hub_goes_by_its_name_there(tiny_llama, tmp_path):
    snapshot = shutil.copytree(tiny_llama, tmp_path / "models--org--tiny" / "snapshots" / "0123")
    assert Sketch.of(snapshot).description.name == "org/tiny"


def test_a_sketch_is_read_as_it_was_written(tiny_llama, tmp_path):
    sketch = Sketch.of(tiny_llama)
    sketch.save(tmp_path)
    again = Sketch.read(tmp_path, fingerprint=fingerprint_of(tiny_llama))
    assert again.description == sketch.description and again.description.name == "llama"
    assert again.head.equal(sketch.head) and again.embedding.equal(sketch.embedding)
    assert not again.head.equal(again.embedding) and again.head.shape == (NUM_ROWS, HIDDEN_SIZE)
    assert again.description.shapes == Shapes.of(tiny_llama)


def test_rows_without_a_direction_and_what_all_have_in_common_do_not_count():
    torch.manual_seed(0)
    rows = torch.randn(8, 64)
    rows[2] = 0
    others = rows + 10 * torch.ones(64)
    others[2] = 0
    assert mean_cosine(rows, others) == mean_cosine(rows, rows) == pytest.approx(1.0, abs=1e-5)
    assert mean_cosine(others, others.roll(1, 0)) < 0.3
    assert mean_cosine(torch.zeros(2, 3), torch.zeros(2, 3)) == 1.0


def test_a_prepared_folder_without_the_manifest_is_still_none(ramps, tmp_path):
    """The sketch is no sign that a folder is complete."""
    part = tmp_path / "part"
    part.mkdir()
    shutil.copyfile(ramps / SKETCH, part / SKETCH)
    with pytest.raises(RampError, match=f"not a ramp folder .no {MANIFEST}"):
        read_manifest(part)
