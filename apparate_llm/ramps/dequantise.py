"""The weight of a linear layer out of what a quantised checkpoint stores of it.

Formats by the names of a layer's tensors; groups are along its inputs, eight codes of four bits share an int32:

    weight, weight_scale                        compressed-tensors `int-quantized`: [out, in] int8
    weight_packed, weight_scale                 compressed-tensors `pack-quantized`: [out, in / 8], codes less half
    qweight [in / 8, out], scales [groups, out] GPTQ, symmetric as vLLM serves it: codes less half
    qweight [in, out / 8], scales, qzeros       AWQ: codes in an order of its own, less a zero point per group
"""

from collections.abc import Callable, Mapping

import torch

from apparate_llm.ramps.fingerprint import WeightsError

WORD_BITS = 32
BITS = (4, 8)  # of a code
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which code of a word is a row's first, second, ...
ROWS_AT_ONCE = 4096

Parts = Mapping[str, torch.Tensor]  # by name within the layer
Reader = Callable[[Parts, slice, int], torch.Tensor]


def dequantised(parts: Parts, size_in: int, dtype: torch.dtype) -> torch.Tensor:
    """[size_out, size_in] of a layer's stored tensors; raises WeightsError for a format that is none of the above."""
    read, size_out = _reader_of(parts)
    weight = torch.empty(size_out, size_in, dtype=dtype)
    for first in range(0, size_out, ROWS_AT_ONCE):
        rows = slice(first, min(first + ROWS_AT_ONCE, size_out))
        weight[rows] = read(parts, rows, size_in)
    return weight


def unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes out of int32 [rows, columns], the lowest bits first, where those along `dim` were packed."""
    shape = [1, 1, 1]
    shape[dim + 1] = -1
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32).view(shape)
    return ((words.unsqueeze(dim + 1) >> shifts) & ((1 << bits) - 1)).flatten(dim, dim + 1)


def _reader_of(parts: Parts) -> tuple[Reader, int]:
    """What reads the format, and size_out."""
    if "weight_packed" in parts and "weight_scale" in parts:
        return _packed, len(parts["weight_packed"])
    if "qweight" in parts and "scales" in parts:
        size_out = parts["scales"].shape[1]
        if parts["qweight"].shape[1] == size_out:
            return _gptq, size_out
        if "qzeros" in parts:
            return _awq, size_out
    if "weight" in parts and "weight_scale" in parts:
        return _int8, len(parts["weight"])
    raise WeightsError(f"stored as {', '.join(sorted(parts)) or 'nothing'}, which ramps cannot read")


def _int8(parts: Parts, rows: slice, size_in: int) -> torch.Tensor:
    codes = parts["weight"][rows].float()
    if (zeros := parts.get("weight_zero_point")) is not None:
        codes = codes - _by_row(zeros, rows, codes)
    return codes * _by_row(parts["weight_scale"], rows, codes)


def _packed(parts: Parts, rows: slice, size_in: int) -> torch.Tensor:
    words = parts["weight_packed"]
    bits = _bits(words.shape[1], size_in)
    codes = unpacked(words[rows], bits, dim=1).float()
    zeros: float | torch.Tensor = 1 << (bits - 1)
    if (stored := parts.get("weight_zero_point")) is not None:
        zeros = _by_row(unpacked(stored, bits, dim=0)[: len(words)], rows, codes)
    return (codes - zeros) * _by_row(parts["weight_scale"], rows, codes)


def _gptq(parts: Parts, rows: slice, size_in: int) -> torch.Tensor:
    words = parts["qweight"]
    bits = _bits(len(words), size_in)
    codes = unpacked(words[:, rows], bits, dim=0).T.float()
    return (codes - (1 << (bits - 1))) * _by_row(parts["scales"].T, rows, codes)


def _awq(parts: Parts, rows: slice, size_in: int) -> torch.Tensor:
    per_word = len(AWQ_ORDER)
    _bits(parts["qweight"].shape[1], parts["scales"].shape[1], allowed=(4,))
    words = slice(rows.start // per_word, -(-rows.stop // per_word))

    def codes_of(name: str) -> torch.Tensor:
        stored = unpacked(parts[name][:, words], 4, dim=1).unflatten(1, (-1, per_word))
        codes: torch.Tensor = stored[:, :, AWQ_ORDER].flatten(1).T
        return codes[: rows.stop - rows.start].float()

    codes = codes_of("qweight")
    zeros = codes_of("qzeros")
    return (codes - _spread(zeros, codes)) * _by_row(parts["scales"].T, rows, codes)


def _by_row(values: torch.Tensor, rows: slice, like: torch.Tensor) -> torch.Tensor:
    """Of each row and input: values of the whole layer, of each row, or of each row and group."""
    values = values.reshape(-1, 1) if values.dim() < 2 else values
    return _spread(values if len(values) == 1 else values[rows], like)


def _spread(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[rows, groups] -> [rows, inputs]."""
    return values.float().repeat_interleave(like.shape[1] // values.shape[1], dim=1)


def _bits(num_words: int, num_codes: int, allowed: tuple[int, ...] = BITS) -> int:
    bits = WORD_BITS * num_words // num_codes
    if bits not in allowed or WORD_BITS * num_words != bits * num_codes:
        raise WeightsError(
            f"stored with {WORD_BITS * num_words / num_codes:g} bits a weight, of which ramps can read "
            f"{' and '.join(map(str, allowed))}"
        )
    return bits
