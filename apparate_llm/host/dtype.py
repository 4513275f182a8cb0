"""In which dtype a model is served on this machine. vLLM by itself takes one of 16 bits, and on CPUs without AVX-512 it
has no kernels for these: every row reads all weights again, prompts and batches are slow, and exits cannot pay."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apparate_llm.config import ConfigError
from apparate_llm.launch import is_cpu_build
from apparate_llm.machine import total_memory_bytes
from apparate_llm.vllm_flags import given_value

CPU_INFO = Path("/proc/cpuinfo")
NEEDED = "avx512f"  # of a CPU by Intel or AMD
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
FLOAT32 = "float32"
SIZES = {FLOAT32: 4}  # bytes of a stored value; 2 of all others
FOUR_BITS, BITS = 4, ("bits", "w_bit", "num_bits")  # names in a quantization_config
ACTIVATIONS = "input_activations"
COPIES = 2  # vLLM keeps weights as they were loaded, and packed for its kernels
MOST_FRAC = 0.6  # of this machine's memory, for the weights in float32


def has_16_bit_kernels(cpu_info: Path = CPU_INFO) -> bool:
    """Whether vLLM has fast ones for this CPU; as far as is known it has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        return NEEDED in cpu_info.read_text().split()
    except OSError:
        return True


def dtype_of(model: Path, vllm_flags: Sequence[str] = ()) -> str:
    """What to give to vLLM for a model folder: float32 where that is faster and fits in memory, else what was asked
    for. vllm_flags: in one spelling."""
    asked = given_value([*vllm_flags], "dtype") or "auto"
    if asked != "auto" or not is_cpu_build() or has_16_bit_kernels():
        return asked
    config = _config_of(model)
    is_quantised = "quantization_config" in config or given_value([*vllm_flags], "quantization") is not None
    return asked if is_quantised or not _fits(model, config) else FLOAT32


def dtype_flags(model: Path, vllm_flags: Sequence[str]) -> list[str]:
    """To be added to these, so that vLLM takes the dtype of `dtype_of`."""
    asked, dtype = given_value([*vllm_flags], "dtype") or "auto", dtype_of(model, vllm_flags)
    return [] if dtype == asked else ["--dtype", dtype]


def dtype_line(vllm_flags: Sequence[str]) -> str | None:
    """On these flags, `dtype_flags` among them, for whoever gave none."""
    if has_16_bit_kernels() or not is_cpu_build():
        return None
    if given_value([*vllm_flags], "dtype") == FLOAT32:
        return "Dtype: float32, which is faster on a CPU without AVX-512 (--dtype bfloat16: as vLLM by itself)"
    return "Note: this CPU has no AVX-512: models in 16 bits and quantised ones are slow here, and exits do not pay"


def element_size(model: Path) -> int:
    """Bytes of a value that is computed with."""
    return SIZES.get(dtype_of(model), 2)


def check_kernels(model: Path) -> None:
    """Raises ConfigError for a model folder in 4 bits where vLLM's build for this CPU has no kernels for them."""
    if has_16_bit_kernels() or not is_cpu_build():
        return
    how = _config_of(model).get("quantization_config")
    if isinstance(how, dict) and FOUR_BITS in _bits_in(how):
        raise ConfigError(
            f"cannot serve {model}: its weights are in 4 bits ({how.get('quant_method')}), and vLLM has no kernels for "
            "these on a CPU without AVX-512 (allowed: models in 16 or 32 bits, and in int8)"
        )


def _bits_in(how: object) -> set[object]:
    """Of weights, wherever a quantization_config says them: AWQ and GPTQ at the top, compressed-tensors by group."""
    if not isinstance(how, dict):
        return set()
    inner = [bits for name, part in how.items() if name != ACTIVATIONS for bits in _bits_in(part)]
    return {how[name] for name in BITS if isinstance(how.get(name), int)} | set(inner)


def _fits(model: Path, config: dict[str, Any]) -> bool:
    size = next((size for kind in WEIGHTS if (size := sum(path.stat().st_size for path in model.glob(kind)))), 0)
    stored = SIZES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    return size / stored * SIZES[FLOAT32] * COPIES <= MOST_FRAC * total_memory_bytes()


def _config_of(model: Path) -> dict[str, Any]:
    """Empty where it cannot be read: whoever loads the model says what is wrong."""
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
