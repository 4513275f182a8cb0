import json

import pytest
import torch

from apparate_llm.ramps.checkpoint import (
    MANIFEST,
    WEIGHTS,
    HeadShape,
    RampError,
    check_fits,
    choose_depth,
    load_tensors,
    read_manifest,
    save_ramps,
    shipped_folders,
)
from apparate_llm.ramps.fingerprint import Fingerprint, fingerprint_of
from apparate_llm.ramps.heads import HEADS, FusedHead, LensHead, LookupFeature
from apparate_llm.ramps.load import Proposals, calibrated, load_ramps
from tests.tiny import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, build_fused_ramps, build_lens_ramps, build_tiny_model


@pytest.fixture
def folder(tmp_path, tiny_llama):
    return build_fused_ramps(tmp_path / "ramps", tiny_llama, depth=2)


def load(folder, depth=2):
    base = {"norm": torch.ones(HIDDEN_SIZE), "head": torch.randn(VOCAB_SIZE, HIDDEN_SIZE)}
    return load_ramps(folder, read_manifest(folder), depth=depth, base_weights=base, dtype=torch.float32)


def test_heads_are_nan_until_loaded():
    for head_class in HEADS.values():
        head = head_class(HeadShape(hidden_size=8, ramp_vocab=16, eps=1e-5, intermediate_size=12, num_aux_layers=1))
        assert all(torch.isnan(parameter).all() for parameter in head.parameters())


def test_a_folder_round_trips(folder):
    ramps = load(folder)
    tensors = load_tensors(folder)
    for name, parameter in ramps.head.named_parameters():
        if name != "head":
            assert torch.equal(parameter, tensors[f"2.{name}"])
    proposals = Proposals(torch.tensor([3, 0, 150]), torch.tensor([2, 0, 1]), torch.randn(3, HIDDEN_SIZE))
    prediction = ramps.predict(torch.randn(3, HIDDEN_SIZE), torch.randn(3, HIDDEN_SIZE), proposals, draft_step=5)
    assert prediction.token_ids.shape == (3,) and prediction.state.shape == (3, HIDDEN_SIZE)
    assert all(0.0 < confidence < 1.0 for confidence in prediction.confidences)


def test_a_lens_at_full_depth_is_the_model_itself(tmp_path, tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.randint(5, VOCAB_SIZE, (1, 12))
    with torch.inference_mode():
        seen: list[torch.Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        expected = model(ids).logits[0].argmax(-1)
    folder = build_lens_ramps(tmp_path / "lens", tiny_llama, depth=NUM_LAYERS)
    base = {"norm": model.model.norm.weight.data, "head": model.lm_head.weight.data}
    ramps = load_ramps(folder, read_manifest(folder), depth=NUM_LAYERS, base_weights=base, dtype=torch.float32)
    prediction = ramps.predict(seen[0][0], seen[0][0], None, draft_step=0)
    assert torch.equal(prediction.token_ids, expected)


def test_the_lens_script_makes_a_folder_that_loads(tmp_path, tiny_llama):
    from scripts.make_lens_ramps import make_lens_ramps

    make_lens_ramps(tiny_llama, tmp_path / "lens", depth=2, ramp_vocab=100)
    ramps = load(tmp_path / "lens")
    assert ramps.depth == 2 and ramps.head.head.shape == (100, HIDDEN_SIZE)
    with pytest.raises(SystemExit, match="between 1 and 3, got 4"):
        make_lens_ramps(tiny_llama, tmp_path / "lens", depth=NUM_LAYERS, ramp_vocab=100)


def random_fused_head(**shape):
    head = FusedHead(HeadShape(**{"hidden_size": 8, "ramp_vocab": 4, "eps": 1e-5, "intermediate_size": 6, **shape}))
    for parameter in head.parameters():
        parameter.data.normal_()
    return head


def nothing_looked_up(rows=2):
    return LookupFeature(
        torch.zeros(rows, 8), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
    )


def test_the_lens_hands_its_state_on_and_the_fused_head_makes_one():
    hidden, state = torch.randn(2, 8), torch.randn(2, 8)
    lens = LensHead(HeadShape(hidden_size=8, ramp_vocab=4, eps=1e-5))
    assert torch.equal(lens(hidden, state, None)[1], state) and torch.equal(lens.enter(state, []), state)
    assert not torch.equal(random_fused_head()(hidden, state, nothing_looked_up())[1], state)


def test_every_input_of_the_fused_head_counts():
    head = random_fused_head(num_aux_layers=2)
    hidden, final, aux = torch.randn(2, 8), torch.randn(2, 8), [torch.randn(2, 8), torch.randn(2, 8)]
    lookup = LookupFeature(torch.randn(2, 8), torch.tensor([1, 3]), torch.tensor([False, True]))

    def scores(hidden=hidden, final=final, aux=aux, lookup=lookup):
        return head(hidden, head.enter(final, aux), lookup)[0][:, :4]

    for change in (
        {"hidden": hidden + 1},
        {"final": final * torch.arange(8)},
        {"aux": aux[::-1]},
        {"lookup": lookup._replace(embedding=lookup.embedding.flip(1))},
        {"lookup": lookup._replace(lengths=lookup.lengths + 1)},
    ):
        assert not torch.allclose(scores(), scores(**change))
    without = lookup._replace(lengths=torch.zeros(2, dtype=torch.int64))
    assert torch.equal(scores(lookup=without), scores(lookup=without._replace(embedding=torch.randn(2, 8))))


def test_the_extra_column_is_open_only_to_lookups_outside_the_vocabulary(folder):
    lookup = LookupFeature(torch.randn(2, 8), torch.tensor([1, 1]), torch.tensor([False, True]))
    scores, _ = random_fused_head()(torch.randn(2, 8), torch.randn(2, 8), lookup)
    assert scores.shape == (2, 5) and torch.isinf(scores[0, 4]) and torch.isfinite(scores[1, 4])
    ramps = load(folder)
    ramps.head.pointer.data.zero_()
    ramps.head.head.data.zero_()
    ramps.head.head.data[:, 0] = -1.0
    ramps.head.norm.data.fill_(1.0)
    hidden, state = torch.randn(64, HIDDEN_SIZE), torch.randn(64, HIDDEN_SIZE)
    proposed = torch.tensor([150, 7] * 32)  # the first is not of the ramp vocabulary
    ones = torch.ones(64, dtype=torch.int64)
    proposals = Proposals(proposed, ones, torch.randn(64, HIDDEN_SIZE))
    tokens = ramps.predict(hidden, state, proposals, draft_step=0).token_ids
    assert 150 in tokens[::2] and 150 not in tokens[1::2]


def test_calibration_is_platt_scaling_of_the_logit():
    assert calibrated(torch.tensor(0.8).log().item(), 1.0, 0.0) == pytest.approx(0.8, abs=1e-6)
    assert calibrated(torch.tensor(0.8).log().item(), 2.0, 0.0) == pytest.approx(16 / 17, abs=1e-6)
    assert calibrated(0.0, 1.0, 0.0) == pytest.approx(1.0, abs=1e-5)
    assert calibrated(-1e9, 1.0, 0.0) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("file", [MANIFEST, WEIGHTS])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(RampError, match=f"no {file}"):
        read_manifest(folder)


def test_every_flipped_byte_of_the_weights_is_found(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    for position in (0, len(data) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[position] ^= 1
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(RampError, match=r"damaged .*sha256"):
            read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depths": []}, "depths"),
        ({"default_depth": 7}, "default depth 7 not in"),
        ({"kind": "magic"}, "kind"),
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"calibration": {}}, "no calibration for depth 2"),
        ({"aux_layers": [3, 1]}, r"aux_layers \[3, 1\] \(allowed: rising, 1 to 3\)"),
        ({"aux_layers": [4]}, "aux_layers"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused_in_one_line(folder, change, says):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(RampError, match=says) as error:
        read_manifest(folder)
    assert "\n" not in str(error.value)


def test_a_half_written_manifest_is_refused(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(RampError, match="damaged"):
        read_manifest(folder)


def test_missing_misshapen_and_non_finite_tensors_are_refused(folder):
    manifest = read_manifest(folder).model_dump(exclude={"weights_sha256"})
    tensors = load_tensors(folder)
    for change, says in (
        ({"2.down": None}, "no tensor '2.down'"),
        ({"2.down": torch.zeros(2, 2)}, "shape"),
        ({"2.down": torch.full_like(tensors["2.down"], float("nan"))}, "not finite"),
    ):
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        save_ramps(folder, changed, **manifest)
        with pytest.raises(RampError, match=says):
            load(folder)


def test_an_interrupted_save_leaves_the_old_ramps_or_an_error(folder, monkeypatch):
    manifest = read_manifest(folder).model_dump(exclude={"weights_sha256"})
    changed = {name: value + 1 if value.is_floating_point() else value for name, value in load_tensors(folder).items()}
    from apparate_llm.ramps import checkpoint

    original = checkpoint.write_atomically

    def crash_at_manifest(path, data):
        if path.name == MANIFEST:
            raise KeyboardInterrupt
        original(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", crash_at_manifest)
    with pytest.raises(KeyboardInterrupt):
        save_ramps(folder, changed, **manifest)
    with pytest.raises(RampError, match="damaged"):
        read_manifest(folder)


def test_a_depth_without_a_ramp_is_refused_with_the_allowed_ones(folder):
    manifest = read_manifest(folder)
    assert choose_depth(manifest, "auto") == choose_depth(manifest, 2) == 2
    with pytest.raises(RampError, match=r"no ramp at depth 3 \(allowed: 2\)"):
        choose_depth(manifest, 3)


def test_a_fingerprint_tells_models_apart_and_does_not_mind_the_order(tmp_path, tiny_llama, folder):
    other = build_tiny_model(tmp_path / "other", seed=1)
    assert fingerprint_of(other) != fingerprint_of(tiny_llama)
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    one, two, three = Fingerprint(), Fingerprint(), Fingerprint()
    for name in ("a", "b"):
        one.add(name, tensors[name])
    for name in ("b", "a"):
        two.add(name, tensors[name])
    three.add("a", tensors["a"])
    three.add("b", tensors["b"].bfloat16())
    assert one.hexdigest() == two.hexdigest() != three.hexdigest()
    check_fits(read_manifest(folder), folder, fingerprint=fingerprint_of(tiny_llama))
    with pytest.raises(RampError, match="made for another model"):
        check_fits(read_manifest(folder), folder, fingerprint=fingerprint_of(other))


def test_shipped_ramps_are_sound():
    assert shipped_folders()
    for shipped in shipped_folders():
        manifest = read_manifest(shipped)
        assert {0} <= set(manifest.depths)
        for depth in manifest.depths:
            hidden, vocab = manifest.base_model.hidden_size, manifest.base_model.vocab_size
            base = {"norm": torch.ones(hidden), "head": torch.zeros(vocab, hidden)}
            load_ramps(shipped, manifest, depth=depth, base_weights=base, dtype=torch.bfloat16)
