"""Ramps as they serve: by other kernels the function of the trained head, within the precision of their weights."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from vllm.utils.torch_utils import set_default_torch_dtype

from apparate_llm.models import quantised_heads
from apparate_llm.models.quantised_heads import (
    HalfLinear,
    Int8Linear,
    PlainLinear,
    QuantisedHead,
    has_fast_int8,
    has_fbgemm,
    quantised_head,
)
from apparate_llm.ramps.checkpoint import HeadShape
from apparate_llm.ramps.heads import FusedHead, LookupFeature
from apparate_llm.ramps.lookup import MAX_FEATURE_LENGTH

SIZE = 64
needs_int8 = pytest.mark.skipif(not has_fast_int8(), reason="this CPU has no instructions for int8 (AVX-512 VNNI)")
needs_fbgemm = pytest.mark.skipif(not has_fbgemm(), reason="this build of torch has no FBGEMM")


@pytest.fixture
def head() -> FusedHead:
    torch.manual_seed(0)
    head = FusedHead(HeadShape(hidden_size=SIZE, ramp_vocab=120, eps=1e-5, intermediate_size=96, num_aux_layers=2))
    for name, parameter in head.named_parameters():
        deviation = 1.0 if name in ("norm", "match") else parameter.shape[-1] ** -0.5
        parameter.data.normal_(std=deviation)
    return head.to(torch.bfloat16).eval()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@needs_int8
@pytest.mark.parametrize("shape", [(64, 64), (121, 96), (7, 160), (64, 50)])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_a_quantised_linear_is_the_linear_within_two_percent(shape, num_tokens):
    """By either of vLLM's kernels: 50 inputs are not a multiple of what one of them wants."""
    torch.manual_seed(0)
    weight, x = torch.randn(shape).bfloat16(), torch.randn(num_tokens, shape[1]).bfloat16()
    got = Int8Linear(weight)(x)
    assert got.shape == (num_tokens, shape[0])
    assert relative_error(got, nn.functional.linear(x.float(), weight.float())) < 0.02


@needs_int8
def test_a_linear_made_while_a_model_is_loaded_is_the_same():
    """vLLM makes the model's dtype torch's default meanwhile."""
    weight, x = torch.randn(64, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    expected = Int8Linear(weight)(x)
    with set_default_torch_dtype(torch.bfloat16):
        made = Int8Linear(weight)
        assert torch.equal(made(x), expected)
    assert made.weight_scale.dtype == torch.float32


@needs_fbgemm
def test_only_bfloat16_is_quantised_to_int8_and_only_where_the_cpu_is_fast_at_it(head):
    quantised = quantised_head(head, torch.bfloat16)
    assert isinstance(quantised.head, Int8Linear if has_fast_int8() else HalfLinear)
    assert isinstance(quantised_head(head.float(), torch.float32).head, HalfLinear)


ALONE = """
import torch
from apparate_llm.models.quantised_heads import quantised_head
from apparate_llm.ramps.checkpoint import HeadShape
from apparate_llm.ramps.heads import FusedHead

shape = HeadShape(hidden_size=64, ramp_vocab=120, eps=1e-5, intermediate_size=96, num_aux_layers=2)
head = quantised_head(FusedHead(shape).eval(), torch.float32)
assert head.enter(torch.ones(1, 64), [torch.ones(1, 64)] * 2).shape == (1, 64)
"""


def test_a_quantised_head_needs_no_engine_in_its_process():
    """As in a preparation that was killed while it trained: nothing of vLLM but its platform is imported then."""
    result = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_without_its_kernels_a_ramp_runs_as_the_models_own_layers(head, monkeypatch):
    monkeypatch.setattr(quantised_heads, "has_fbgemm", lambda: False)
    assert isinstance(quantised_head(head.float(), torch.float32).head, PlainLinear)


@pytest.mark.parametrize(
    ("linear", "dtype", "error"),
    [
        pytest.param(Int8Linear, torch.bfloat16, 0.05, marks=needs_int8),
        pytest.param(HalfLinear, torch.bfloat16, 0.05, marks=needs_fbgemm),
        pytest.param(HalfLinear, torch.float32, 2e-3, marks=needs_fbgemm),
        (PlainLinear, torch.bfloat16, 0.05),
        (PlainLinear, torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_a_quantised_head_scores_as_the_trained_one(head, num_tokens, linear, dtype, error):
    head = head.to(dtype)
    quantised = QuantisedHead(head, linear)
    final, *aux = torch.randn(3, num_tokens, SIZE).to(dtype)
    hidden, embedding = torch.randn(2, num_tokens, SIZE).to(dtype)
    lengths = torch.arange(num_tokens) % (MAX_FEATURE_LENGTH + 1)  # the first row has no proposal
    lookup = LookupFeature(embedding, lengths, outside=(lengths > 0) & (torch.arange(num_tokens) % 2 == 0))
    with torch.inference_mode():
        state, quantised_state = head.enter(final, aux), quantised.enter(final, aux)
        assert relative_error(quantised_state, state) < 0.4 * error
        for _ in range(3):  # draft steps
            (scores, state), (quantised_scores, quantised_state) = (
                head(hidden, state, lookup),
                quantised(hidden, quantised_state, lookup),
            )
            assert relative_error(quantised_state, state) < error
            assert torch.equal(quantised_scores.isinf(), scores.isinf())
            assert quantised_scores.isinf().sum() == (~lookup.outside).sum()  # the pointer's column
            finite = ~scores.isinf()
            assert relative_error(quantised_scores[finite], scores[finite]) < error
