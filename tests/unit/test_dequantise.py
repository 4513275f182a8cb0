"""Weights as quantised checkpoints store them come back as the formats' own tools read them."""

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

from apparate_llm.ramps import dequantise
from apparate_llm.ramps.base_weights import BaseWeights
from apparate_llm.ramps.dequantise import dequantised
from apparate_llm.ramps.fingerprint import WeightsError
from tests.quantised import FORMATS, GROUP, codes_of
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE


def head_of(model):
    return {
        name.removeprefix("lm_head."): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if name.startswith("lm_head.")
    }


@pytest.mark.parametrize("at_once", [4096, 24])
@pytest.mark.parametrize("name", ["W4A16", "AWQ", "GPTQ"])
def test_codes_come_back(name, at_once, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(dequantise, "ROWS_AT_ONCE", at_once)
    weight = head_of(tiny_llama)["weight"]
    codes, scale, zeros = codes_of(weight, symmetric=name != "AWQ")
    expected = (codes - zeros.repeat_interleave(GROUP, 1)) * scale.repeat_interleave(GROUP, 1)
    parts = head_of(FORMATS[name](tiny_llama, tmp_path / "model", head=True))
    plain = dequantised(parts, HIDDEN_SIZE, torch.float32)
    torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-4)
    assert (plain - weight).abs().max() < 1.1 * scale.max()


def test_int8_comes_back_within_half_a_code(tiny_llama, tmp_path):
    weight = head_of(tiny_llama)["weight"]
    parts = head_of(FORMATS["W8A8"](tiny_llama, tmp_path / "model", head=True))
    plain = dequantised(parts, HIDDEN_SIZE, torch.float32)
    assert ((plain - weight).abs() <= 0.501 * parts["weight_scale"]).all()
    one_scale = {"weight": parts["weight"], "weight_scale": torch.tensor(0.5)}
    assert dequantised(one_scale, HIDDEN_SIZE, torch.float32).equal(parts["weight"] * 0.5)


def test_zero_points_of_compressed_tensors_come_back():
    torch.manual_seed(0)
    weight = torch.randn(40, 64) + 0.5
    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    _, scale, zeros = codes_of(weight, symmetric=False)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": (zeros - 8).to(torch.int8)}
    parts = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    torch.testing.assert_close(dequantised(parts, 64, torch.float32), expected)
    assert (expected - weight).abs().max() < 1.1 * scale.max()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({}, "stored as nothing, which ramps cannot read"),
        ({"qweight": torch.zeros(8, 5, dtype=torch.int32)}, "stored as qweight, which"),
        (
            {"weight_packed": torch.zeros(5, 6, dtype=torch.int32), "weight_scale": torch.ones(5, 1)},
            "stored with 3 bits a weight, of which ramps can read 4 and 8",
        ),
    ],
)
def test_what_cannot_be_read_is_named(parts, says):
    with pytest.raises(WeightsError, match=says):
        dequantised(parts, HIDDEN_SIZE, torch.float32)


def test_tables_of_a_model_are_read_as_they_are_stored(tiny_llama, tmp_path):
    plain = BaseWeights.of(tiny_llama)
    assert not plain.head_is_quantised and plain.head().shape == (VOCAB_SIZE, HIDDEN_SIZE)
    packed = BaseWeights.of(FORMATS["AWQ"](tiny_llama, tmp_path / "model", head=True))
    assert packed.head_is_quantised and packed.head().dtype == packed.norm.dtype
    assert packed.embedding().equal(plain.embedding())
    tied = BaseWeights()
    list(tied.watch([("model.embed_tokens.weight", plain.embedding())]))
    assert tied.head().equal(plain.embedding())
    with pytest.raises(WeightsError, match=r"the weights have no model\.norm\.weight"):
        _ = tied.norm
    with pytest.raises(WeightsError, match=r"lm_head is stored as nothing|model\.embed_tokens is stored as nothing"):
        other = BaseWeights()
        list(other.watch([("model.norm.weight", plain.norm)]))
        other.head()
