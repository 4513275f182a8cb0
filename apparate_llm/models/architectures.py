"""The supported decoder families, by vLLM's architecture name. Imports nothing heavy."""

import json
from pathlib import Path
from typing import Any

# vLLM architecture -> (ours, its class path as vLLM's ModelRegistry takes it)
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("EarlyExitLlamaForCausalLM", "apparate_llm.models.classes:EarlyExitLlama"),
    "MistralForCausalLM": ("EarlyExitMistralForCausalLM", "apparate_llm.models.classes:EarlyExitMistral"),
    "Qwen2ForCausalLM": ("EarlyExitQwen2ForCausalLM", "apparate_llm.models.classes:EarlyExitQwen2"),
    "Qwen3ForCausalLM": ("EarlyExitQwen3ForCausalLM", "apparate_llm.models.classes:EarlyExitQwen3"),
}


class UnsupportedModelError(ValueError):
    """A model that early exits cannot serve. The message is one line for the user."""


def architecture_of(model_dir: Path) -> str:
    """The (first) architecture in a model folder's config.json; raises UnsupportedModelError."""
    architectures = _config_of(model_dir).get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise UnsupportedModelError(f"{model_dir / 'config.json'} names no architecture")
    return architectures[0]


def layers_of(model_dir: Path) -> int:
    """Number of decoder blocks; raises UnsupportedModelError."""
    layers = _config_of(model_dir).get("num_hidden_layers")
    if not isinstance(layers, int):
        raise UnsupportedModelError(f"{model_dir / 'config.json'} does not say num_hidden_layers")
    return layers


def _config_of(model_dir: Path) -> dict[str, Any]:
    if not model_dir.is_dir():
        raise UnsupportedModelError(f"model folder not found: {model_dir}")
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UnsupportedModelError(f"not a model folder (no config.json): {model_dir}") from None
    except ValueError as error:  # no JSON, or no text at all
        raise UnsupportedModelError(f"damaged {path}: {error}") from None
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"damaged {path}: an object is expected, got {type(config).__name__}")
    return config


def early_exit_architecture(architecture: str) -> str:
    """Our architecture name for one of vLLM's; raises UnsupportedModelError."""
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"early exits do not support architecture {architecture} (supported: {', '.join(ARCHITECTURES)}); "
            "--policy off serves it as plain vLLM"
        )
    return ARCHITECTURES[architecture][0]
