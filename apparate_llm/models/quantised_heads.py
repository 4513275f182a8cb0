"""Ramp weights as a CPU reads them fastest: by vLLM's kernels in int8, with one scale per output channel and rows of
input quantized as they come, where the CPU has instructions for it; else by torch's in float16, half of float32's
bytes, multiplied and added up in float32.

A ramp only proposes. What fewer bits change is how often it is right, next to nothing; never what a checked token is.
"""

import platform
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from apparate_llm.ramps.heads import FusedHead, Head, LookupFeature

LARGEST = 127
AT_ONCE = 1 << 14  # rows that are in float32 at a time
MULTIPLE = 32  # the kernels want the number of output channels to be one of this


def quantised_head(head: Head, dtype: torch.dtype) -> Head:
    """A trained ramp's faster head, where there is one, else itself."""
    if not isinstance(head, FusedHead) or not current_platform.is_cpu():
        return head
    if dtype == torch.bfloat16 and has_fast_int8():
        return QuantisedHead(head, Int8Linear)
    return QuantisedHead(head, HalfLinear if has_fbgemm() else PlainLinear)


def has_fast_int8() -> bool:
    """With AVX2 alone a row took three times as long in int8 as in bfloat16, and the error was above the tests' 2 %."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_vnni_supported()


def has_fbgemm() -> bool:
    """FBGEMM is torch's library of such kernels; its builds for ARM lack it."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class HalfLinear(nn.Module):
    """[num_tokens, in] -> [num_tokens, out] of the same dtype, for a weight [out, in] of any floating dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight_bytes = 2 * weight.numel()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return product.to(x.dtype)


class PlainLinear(nn.Module):
    """[num_tokens, in] -> [num_tokens, out], as vLLM computes the model's own linear layers."""

    def __init__(self, weight: torch.Tensor) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        super().__init__()
        self.weight_bytes = weight.nbytes
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.cpu_linear: Callable[..., torch.Tensor]  # written by vLLM
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cpu_linear(x, self.weight, None)


class Int8Linear(nn.Module):
    """[num_tokens, in] bfloat16 -> [num_tokens, out], for a weight [out, in] of any floating dtype."""

    def __init__(self, weight: torch.Tensor, quantised: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """quantised: what `int8_codes` gives, where it is known."""
        super().__init__()
        self.size = len(weight)
        codes, scale = quantised or int8_codes(weight)
        if missing := -self.size % MULTIPLE:
            codes, scale = (F.pad(part, (0, 0, 0, missing)) for part in (codes, scale))
        self.weight_bytes = codes.numel()
        self.fused = has_fused_int8(codes.shape[1])
        # Named as vLLM's kernels read them.
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.input_scale = self.input_zero_point = self.azp_adj = self.bias = None
        self.logical_widths = [len(codes)]
        if self.fused:
            self.weight = nn.Parameter(torch.ops._C.convert_weight_packed(codes), requires_grad=False)
        else:
            self._choose_kernel()

    def _choose_kernel(self) -> None:
        from vllm.model_executor.kernels.linear import init_int8_linear_kernel

        self.kernel = init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="ramps"
        )
        with set_default_torch_dtype(torch.bfloat16):  # what some of the kernels take for that of their output
            self.kernel.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.fused:
            return self.kernel.apply_weights(self, x)[:, : self.size]
        product: torch.Tensor = torch.ops._C.int8_scaled_mm_with_quant(
            x, self.weight, self.weight_scale, None, x.dtype, True
        )
        return product[:, : self.size]


def has_fused_int8(size_in: int) -> bool:
    """vLLM's kernel that quantises rows, multiplies and scales in one call. vLLM takes it with AMX alone; with AVX-512
    a row took 0.085 ms of 0.127 for 8,192 x 896, eight took 0.16 of 0.21."""
    names = ("int8_scaled_mm_with_quant", "convert_weight_packed")
    return size_in % 32 == 0 and all(hasattr(torch.ops._C, name) for name in names) and has_avx512_int8()


def has_avx512_int8() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and torch.cpu._is_vnni_supported()


def int8_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] int8, and its scales [out, 1] float32, one for each output channel."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight), 1, dtype=torch.float32)  # while a model is loaded the default is another
    for first in range(0, len(weight), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        rows = weight[part].float()
        scale[part] = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
        codes[part] = (rows / scale[part]).round().to(torch.int8)
    return codes, scale


class QuantisedHead(nn.Module):
    """A `FusedHead` for serving: the same function of the same inputs, within its linears' precision.

    All its weights are read in five calls; the normalisations are vLLM's kernels, as torch's take ten times as long for
    a few rows.
    """

    reads_lookup = True

    def __init__(self, head: FusedHead, linear: type[Int8Linear] | type[HalfLinear] | type[PlainLinear]) -> None:
        super().__init__()
        current_platform.import_kernels()  # a resumed preparation may train and measure without having run vLLM
        self.eps = head.eps
        self.enter_linear = linear(head.enter_weight)
        self.fuse = linear(head.fuse)
        self.gate_up = linear(head.gate_up)
        self.down = linear(head.down)
        self.head = linear(torch.cat([head.head, head.pointer]))
        self.match, self.norm = head.match, head.norm
        self.ones = nn.Parameter(torch.ones_like(head.norm), requires_grad=False)

    def enter(self, final: torch.Tensor, aux: list[torch.Tensor]) -> torch.Tensor:
        entered: torch.Tensor = self.enter_linear(self._normed(final, *aux))
        return entered

    def forward(
        self, hidden: torch.Tensor, state: torch.Tensor, lookup: LookupFeature
    ) -> tuple[torch.Tensor, torch.Tensor]:
        proposed = lookup.embedding * (lookup.lengths > 0)[:, None]
        fused = self.fuse(self._normed(hidden, state, proposed)) + F.embedding(lookup.lengths, self.match)
        state = fused + self.down(silu_and_mul(self.gate_up(rms_norm(fused, self.ones, self.eps))))
        scores = self.head(rms_norm(state, self.norm, self.eps))
        scores[:, -1].masked_fill_(~lookup.outside, float("-inf"))
        return scores, state

    def _normed(self, *parts: torch.Tensor) -> torch.Tensor:
        """[num_tokens, number of parts x hidden_size], each part with a root mean square of one."""
        stacked = torch.stack(parts, dim=1)
        return rms_norm(stacked.flatten(0, 1), self.ones, self.eps).view(len(stacked), -1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, eps)
    return out


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(len(x), x.shape[1] // 2)
    torch.ops._C.silu_and_mul(out, x)
    return out
