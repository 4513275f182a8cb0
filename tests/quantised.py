"""Quantised copies of a model folder, packed as the formats' own tools store them: the nearest codes, no data."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from apparate_llm.progress import Stage
from apparate_llm.ramps.dequantise import AWQ_ORDER
from apparate_llm.w8a8 import HEAD, INDEX, LINEAR, describe, quantised, write_w8a8

GROUP = 32
Packed = dict[str, torch.Tensor]  # by name within a layer


def stage() -> Stage:
    return Stage("test", math.inf, "", "", monotonic)


def w8a8(model: Path, out: Path, *, head: bool = False) -> Path:
    out.mkdir()
    if not head:
        write_w8a8(model, out, stage())
        return out
    _packed_copy(model, out, lambda weight: {k.split(".")[-1]: v for k, v in quantised("x.weight", weight).items()})
    describe(out)
    _target_head(out)
    return out


def w4a16(model: Path, out: Path, *, head: bool = False) -> Path:
    """compressed-tensors' `pack-quantized`, symmetric."""
    from compressed_tensors.compressors import ModelCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=True)
    )

    def pack(weight: torch.Tensor) -> Packed:
        _, scale, _ = codes_of(weight, symmetric=True)
        packed: Packed = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        return packed

    out.mkdir()
    _packed_copy(model, out, pack, head=head)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[HEAD],
    )
    ModelCompressor(quantization_config=config).update_config(str(out))
    if head:
        _target_head(out)
    return out


def awq(model: Path, out: Path, *, head: bool = False) -> Path:
    def pack(weight: torch.Tensor) -> Packed:
        codes, scale, zeros = codes_of(weight, symmetric=False)
        return {"qweight": _awq_words(codes.T), "qzeros": _awq_words(zeros.T), "scales": scale.T.contiguous()}

    out.mkdir()
    _packed_copy(model, out, pack, head=head)
    _say(out, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "lm_head": head})
    return out


def gptq(model: Path, out: Path, *, head: bool = False) -> Path:
    def pack(weight: torch.Tensor) -> Packed:
        codes, scale, zeros = codes_of(weight, symmetric=True)
        return {
            "qweight": words(codes.T, dim=0),
            "qzeros": words(zeros.T - 1, dim=1),
            "scales": scale.T.contiguous(),
            "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
        }

    out.mkdir()
    _packed_copy(model, out, pack, head=head)
    says = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "lm_head": head}
    _say(out, says)
    return out


FORMATS: dict[str, Callable[..., Path]] = {"W8A8": w8a8, "W4A16": w4a16, "AWQ": awq, "GPTQ": gptq}


def codes_of(weight: torch.Tensor, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [out, in] of 4 bits, scales [out, groups], zero points [out, groups]) of a weight [out, in]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    if symmetric:
        scale = groups.abs().amax(2) / 7.5
        zeros = torch.full_like(scale, 8.0)
    else:
        least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (most - least) / 15
        zeros = (-least / scale).round().clamp(0, 15)
    scale = scale.half().float()
    codes = ((groups / scale[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15)
    return codes.flatten(1).int(), scale, zeros.int()


def words(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight codes along `dim` of [rows, columns] in an int32, the first one lowest."""
    parts = codes.long().unflatten(dim, (-1, 8))
    shape = [1, 1, 1]
    shape[dim + 1] = 8
    whole = (parts << (4 * torch.arange(8)).view(shape)).sum(dim + 1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int().contiguous()


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    places = codes.unflatten(1, (-1, 8))
    stored = torch.empty_like(places)
    stored[:, :, AWQ_ORDER] = places
    return words(stored.flatten(1), dim=1)


def _packed_copy(model: Path, out: Path, pack: Callable[[torch.Tensor], Packed], *, head: bool = True) -> None:
    from safetensors.torch import load_file, save_file

    assert not (model / INDEX).exists(), "of a single file only"
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    tensors: Packed = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if LINEAR.fullmatch(name) or (head and name == f"{HEAD}.weight"):
            layer = name.removesuffix("weight")
            tensors |= {layer + part: value.contiguous() for part, value in pack(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _target_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantisation = config["quantization_config"]
    quantisation["ignore"] = []
    quantisation["config_groups"]["group_0"]["targets"] = ["Linear", f"re:.*{HEAD}"]
    (folder / "config.json").write_text(json.dumps(config))


def _say(folder: Path, quantisation: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
