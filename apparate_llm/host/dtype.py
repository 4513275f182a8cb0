"""In which dtype a model is served on this machine. vLLM by itself takes one of 16 bits, and on CPUs without AVX-512 it
has no kernels for these: every row reads all weights again, so prompts and batches are slow."""

import json
import math
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from apparate_llm.config import ConfigError
from apparate_llm.launch import is_cpu_build
from apparate_llm.machine import total_memory_bytes
from apparate_llm.vllm_flags import given_value, value_of

CPU_INFO = Path("/proc/cpuinfo")
NEEDED = "avx512f"  # of a CPU by Intel or AMD
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
WHOLE = "consolidated"  # Mistral's own file, beside the others
FLOAT32 = "float32"
SHORT_NAMES = {"half": "float16", "float": FLOAT32}  # that vLLM takes as well
SIZES = {FLOAT32: 4}  # bytes of a stored value; 2 of all others
COPIES = 2  # of weights at most: as they were loaded, and packed for vLLM's kernels
MOST_FRAC = 0.6  # of this machine's memory, for the weights in float32
DEFAULT_KV_CACHE_BYTES = 4 << 30  # at most, where nobody says how many
CACHE_FLAG, SHARE_FLAG, CONTEXT_FLAG = "kv-cache-memory-bytes", "gpu-memory-utilization", "max-model-len"
QUANTISATION = ("quantization_config", "compression_config")  # in config.json
QUANTISATION_FILE = "hf_quant_config.json"
FOUR_BITS, BITS = 4, ("bits", "w_bit", "num_bits")  # names in a quantization_config
NEED_KERNELS, COMPRESSED, PACKED = ("awq", "gptq"), "compressed-tensors", "pack-quantized"


def has_16_bit_kernels(cpu_info: Path = CPU_INFO) -> bool:
    """Whether vLLM has fast ones for this CPU; as far as is known it has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        return NEEDED in cpu_info.read_text().split()
    except OSError:
        return True


def dtype_of(model: Path, vllm_flags: Sequence[str] = (), *, num_servers: int = 1) -> str:
    """What to give to vLLM for a model folder: float32 where prompts and batches are faster in it and `num_servers`
    beside each other fit in memory, else what was asked for. vllm_flags: in one spelling."""
    asked = asked_dtype(vllm_flags)
    if asked != "auto" or not is_cpu_build() or has_16_bit_kernels():
        return asked
    config = _config_of(model)
    is_quantised = quantisation_of(model) is not None or given_value([*vllm_flags], "quantization") is not None
    return asked if not config or is_quantised or not _fits(model, config, vllm_flags, num_servers) else FLOAT32


def asked_dtype(vllm_flags: Sequence[str]) -> str:
    name = given_value([*vllm_flags], "dtype") or "auto"
    return SHORT_NAMES.get(name, name)


def dtype_flags(model: Path, vllm_flags: Sequence[str], *, num_servers: int = 1) -> list[str]:
    """To be added to these, so that vLLM takes the dtype of `dtype_of`."""
    dtype = dtype_of(model, vllm_flags, num_servers=num_servers)
    return [] if dtype == asked_dtype(vllm_flags) else ["--dtype", dtype]


def dtype_line(model: Path, vllm_flags: Sequence[str]) -> str | None:
    """On these flags, `dtype_flags` among them, for whoever asked for none."""
    if has_16_bit_kernels() or not is_cpu_build():
        return None
    if asked_dtype(vllm_flags) == FLOAT32:
        return (
            "Dtype: float32, in which prompts and several clients are faster without AVX-512 (vLLM's: --dtype bfloat16)"
        )
    if quantisation_of(model) is not None:
        return None
    return "Note: without AVX-512 models in 16 bits are slow, and this one may not fit in memory in float32"


def element_size(model: Path) -> int:
    """Bytes of a value that is computed with."""
    return SIZES.get(dtype_of(model), 2)


def check_kernels(model: Path) -> None:
    """Raises ConfigError for a model folder in 4 bits where vLLM's build for this CPU has no kernels for them."""
    if has_16_bit_kernels() or not is_cpu_build():
        return
    how = quantisation_of(model)
    if how is not None and _needs_kernels(how):
        raise ConfigError(
            f"cannot serve {model}: its weights are in 4 bits ({how.get('quant_method')}), and vLLM has no kernels for "
            "these on a CPU without AVX-512 (allowed: models in 16 or 32 bits, and in int8)"
        )


def _needs_kernels(how: dict[str, Any]) -> bool:
    """AWQ and GPTQ say their bits at the top, compressed-tensors for each group, whose format may be its own."""
    if how.get("quant_method") in NEED_KERNELS:
        return any(how.get(name) == FOUR_BITS for name in BITS)
    groups = how.get("config_groups")
    if how.get("quant_method") != COMPRESSED or not isinstance(groups, dict):
        return False
    return any(
        (group.get("format") or how.get("format")) == PACKED
        and isinstance(weights := group.get("weights"), dict)
        and weights.get("num_bits") == FOUR_BITS
        for group in groups.values()
        if isinstance(group, dict)
    )


def quantisation_of(model: Path) -> dict[str, Any] | None:
    """What a model folder says of how its weights are quantised, where vLLM looks for it; empty where only that they
    are, None where they are not."""
    how = _how_quantised(_config_of(model))
    if how is None and not (model / QUANTISATION_FILE).exists():
        return None
    return how if isinstance(how, dict) else {}


def _how_quantised(config: dict[str, Any]) -> object | None:
    inner = config.get("text_config")
    places = [config, inner] if isinstance(inner, dict) else [config]
    return next((how for place in places for name in QUANTISATION if (how := place.get(name))), None)


def _fits(model: Path, config: dict[str, Any], vllm_flags: Sequence[str], num_servers: int) -> bool:
    """The weights, and a KV cache for the model's whole context."""
    stored = SIZES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    weights = _weight_bytes(model) / stored * SIZES[FLOAT32] * COPIES
    context = _number(vllm_flags, CONTEXT_FLAG, config.get("max_position_embeddings") or 0)
    cache = (
        math.inf if given_value([*vllm_flags], SHARE_FLAG) else _number(vllm_flags, CACHE_FLAG, DEFAULT_KV_CACHE_BYTES)
    )
    has_cache = kv_bytes_per_token(config, SIZES[FLOAT32]) * context <= cache
    return has_cache and weights * num_servers <= MOST_FRAC * total_memory_bytes()


def _number(vllm_flags: Sequence[str], name: str, default: float) -> float:
    """That a flag gives; what is none, vLLM finds out."""
    number = value_of(given_value([*vllm_flags], name) or "")
    return number if isinstance(number, int | float) else default


def _weight_bytes(model: Path) -> int:
    for kind in WEIGHTS:
        files = [*model.glob(kind)]
        parts = [path for path in files if not path.name.startswith(WHOLE)] or files
        size = 0
        for path in parts:
            with suppress(OSError):  # whoever loads it says what is wrong
                size += path.stat().st_size
        if size:
            return size
    return 0


def kv_bytes_per_token(config: dict[str, Any], value_bytes: int) -> int:
    """Of the KV cache, by a model's config.json; 0 where that does not say."""
    heads = config.get("num_attention_heads") or 1
    head_dim = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * (config.get("num_hidden_layers") or 0) * kv_heads * head_dim * value_bytes)


def _config_of(model: Path) -> dict[str, Any]:
    """Empty where it cannot be read: whoever loads the model says what is wrong."""
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
