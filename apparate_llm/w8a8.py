"""W8A8 folders: the linear layers of a model's blocks in int8 with a scale for each output channel, their inputs
quantised token by token as they come, both symmetric. Embedding, norms and head stay as they are. It takes no data.

Weights are made and described by compressed-tensors' own functions, as vLLM and transformers read them.
"""

import json
import re
import shutil
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apparate_llm.config import ConfigError
from apparate_llm.host.dtype import quantisation_of
from apparate_llm.machine import cache_folder, writable_cache
from apparate_llm.models.architectures import ARCHITECTURES, architecture_of
from apparate_llm.naming import model_name
from apparate_llm.progress import Stage
from apparate_llm.ramps.checkpoint import sha256_of
from apparate_llm.sealed import COMPLETE, is_complete, made_once

if TYPE_CHECKING:
    import torch

SCHEME = "W8A8"  # compressed-tensors' name for it
FORMAT = "int-quantized"
LOAD_FORMAT = "hf"  # vLLM's, of the weights that are taken
HEAD = "lm_head"
LINEAR = re.compile(r"model\.layers\.\d+\..+_proj\.weight")
LAYERS = "model.layers.N.*_proj.weight"  # for a user
SAFETENSORS, INDEX = ".safetensors", "model.safetensors.index.json"
WEIGHT_SUFFIXES = (SAFETENSORS, ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def check_quantisable(model: Path) -> None:
    """Raises ConfigError, WeightsError or UnsupportedModelError for a model folder that `write_w8a8` cannot take."""
    from apparate_llm.ramps.fingerprint import MISTRAL_FILES, weight_files

    check_config(model)
    if any(path.match(MISTRAL_FILES) for path in weight_files(model)):
        raise ConfigError(f"cannot quantise {model}: its weights are in Mistral's own format ({MISTRAL_FILES})")


def check_config(model: Path) -> None:
    """The same of a folder whose weights need not be there yet."""
    if find_spec("compressed_tensors") is None:
        raise ConfigError("quantising needs the package compressed-tensors, which comes with vLLM")
    if (architecture := architecture_of(model)) not in ARCHITECTURES:
        raise ConfigError(f"cannot quantise {model}: architecture {architecture} (allowed: {', '.join(ARCHITECTURES)})")
    if (there := quantisation_of(model)) is not None:
        method = there.get("quant_method") or "in an unknown way"
        raise ConfigError(f"cannot quantise {model}: it is quantised already ({method})")


def int8_model(model: Path) -> Path:
    """The W8A8 folder of a model in the cache, made on the first call, known by the content of the model's files.
    Raises as `check_quantisable` does, and ConfigError where it cannot be written."""
    check_quantisable(model)
    name = f"{model_name(model.resolve()).replace('/', '--')}-{SCHEME}-{_digest(model)[:12]}"
    folder = cache_folder() / "int8" / name
    if is_complete(folder):  # in a cache that need not be writable
        return folder
    folder = writable_cache() / "int8" / name
    return made_once(
        folder,
        lambda work, stage: write_w8a8(model, work, stage),
        name="int8 weights",
        facts=f"quantising {model} once to {folder}",
    )


def write_w8a8(model: Path, out: Path, stage: Stage) -> None:
    """Fill the folder `out`; raises WeightsError for weights that cannot be read or are not finite, ConfigError where
    they cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from apparate_llm.ramps.fingerprint import WeightsError, weight_files

    files = weight_files(model)
    copy_others(model, out)
    stage.unit, stage.total = "layers", sum(1 for file in files for name in names_of(file) if LINEAR.fullmatch(name))
    if not stage.total:
        raise WeightsError(f"cannot quantise {model}: no tensor of its weights is called {LAYERS}")
    stage.update(0, stage.facts)
    places: dict[str, str] = {}
    done = num_bytes = 0
    for file in files:
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            if LINEAR.fullmatch(name):
                tensors |= quantised(name, tensor)
                done += 1
                stage.update(done, stage.facts)
            else:
                tensors[name] = tensor
        try:
            save_file(tensors, out / file.name, metadata={"format": "pt"})
        except SafetensorError as error:  # in the place of the system's
            raise ConfigError(f"cannot write {out / file.name}: {error}") from None
        places |= dict.fromkeys(tensors, file.name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2))
    describe(out)


def quantised(name: str, weight: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """The stored tensors of a linear layer's weight [out, in]; raises WeightsError."""
    from compressed_tensors.compressors import IntQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    from apparate_llm.ramps.fingerprint import WeightsError

    if weight.dim() != 2 or not weight.numel():
        raise WeightsError(f"{name} has shape {tuple(weight.shape)}, rows and columns of a layer are expected")
    is_whole = weight.is_floating_point() and weight.dtype.itemsize > 1  # no float8, which are codes
    if not (is_whole and weight.isfinite().all()):
        raise WeightsError(f"{name} holds values that are not finite, or no numbers of a layer ({weight.dtype})")
    scheme, values = w8a8_scheme(), weight.float()
    scale, _ = calculate_qparams(values.amin(1, keepdim=True), values.amax(1, keepdim=True), scheme.weights)
    stored = IntQuantizationCompressor.compress({"weight": values, "weight_scale": scale}, scheme)
    layer = name.removesuffix("weight")
    return {layer + part: tensor.contiguous() for part, tensor in stored.items()}


def w8a8_scheme() -> Any:
    """compressed-tensors' QuantizationScheme."""
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(SCHEME, ["Linear"])


def describe(folder: Path) -> None:
    """Say in the folder's config.json how its weights are stored."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = QuantizationConfig(
        config_groups={"group_0": w8a8_scheme()},
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[HEAD],
    )
    ModelCompressor(quantization_config=config).update_config(str(folder))


def copy_others(model: Path, out: Path) -> None:
    for path in _others(model):
        shutil.copyfile(path, out / path.name)


def _others(model: Path) -> list[Path]:
    """All files of a model folder but its weights."""
    return [
        path
        for path in sorted(model.iterdir())
        if path.is_file()
        and not path.name.endswith(".index.json")
        and path.suffix not in WEIGHT_SUFFIXES
        and path.name != COMPLETE
    ]


def _digest(model: Path) -> str:
    """Of all that its W8A8 folder is made of: a chat template or a row may change without all else."""
    from apparate_llm.ramps.fingerprint import weight_files

    whole = sha256()
    for path in (*_others(model), *weight_files(model)):
        whole.update(f"{path.name} {sha256_of(path)}\n".encode())
    return whole.hexdigest()


def names_of(file: Path) -> Iterator[str]:
    """Of the tensors in a file; raises WeightsError."""
    from safetensors import SafetensorError, safe_open

    from apparate_llm.ramps.fingerprint import WeightsError

    try:
        with safe_open(file, framework="pt") as tensors:
            yield from list(tensors.keys())
    except SafetensorError as error:
        raise WeightsError(f"damaged {file}: {error}") from None
