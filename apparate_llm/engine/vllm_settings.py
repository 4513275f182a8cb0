"""What vLLM is started with: our settings, merged with the user's flags."""

import json
import os
from collections.abc import Mapping
from typing import Any

from apparate_llm.config import ADDITIONAL_CONFIG_KEY, ConfigError, EarlyExitConfig
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.host.dtype import DEFAULT_KV_CACHE_BYTES
from apparate_llm.launch import is_cpu_build
from apparate_llm.machine import available_memory_bytes
from apparate_llm.vllm_flags import given_value, normalised, parse_object, without

SPECULATION = "speculative_config"  # a setting of every server with exits, and of no other
SPECULATION_FLAGS = ("spec-method", "spec-model", "spec-tokens")  # parts of it
DEFAULTS = ("", "None", "auto")  # values by which a flag of vLLM's is as if it were not given
YOURS = "contradicts early exits; with --policy off it is yours"


def settings_of(config: EarlyExitConfig, architecture: str, vllm_flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Our settings of vLLM's, and the flags that are left."""
    settings = vllm_args(config, architecture)
    if config.policy == "off" and (given_value(vllm_flags, "worker-cls") is not None or not is_cpu_build()):
        settings = {}  # plain vLLM, its texts as they come
    return merge_settings(settings, vllm_flags)


def own_options(flags: list[str]) -> dict[str, object]:
    """Early exits' part of the user's `--additional-config`; raises ConfigError."""
    text = given_value(flags, "additional-config")
    options = {} if text is None else parse_object("additional-config", text).get(ADDITIONAL_CONFIG_KEY, {})
    if not isinstance(options, dict):
        raise ConfigError(f"--additional-config: {ADDITIONAL_CONFIG_KEY} must be an object of options, got {options!r}")
    return options


def merge_settings(settings: dict[str, Any], flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Our settings with those that the user's flags have for the same names, and the flags that are left; raises
    ConfigError where the two contradict each other."""
    if not settings:
        return {}, flags
    for name in SPECULATION_FLAGS:
        if SPECULATION in settings and given_value(flags, name) is not None:
            raise ConfigError(f"--{name} {YOURS}")
    merged, rest = {}, flags
    for setting, ours in settings.items():
        name = setting.replace("_", "-")
        merged[setting] = ours
        if (text := given_value(rest, name)) is None:
            continue
        rest = without(rest, name)
        if not isinstance(ours, dict):
            if text not in (ours, *DEFAULTS):
                raise ConfigError(f"--{name} {text} {YOURS}")
            continue
        theirs = {} if text in DEFAULTS else parse_object(name, text)
        if setting == SPECULATION and theirs not in ({}, ours):
            raise ConfigError(f"--{name} {YOURS}")
        if setting == "hf_overrides" and theirs.get("architectures", ours["architectures"]) != ours["architectures"]:
            raise ConfigError(f"--{name}: architectures {theirs['architectures']} {YOURS}")
        merged[setting] = {**theirs, **ours}
    return merged, rest


def as_flags(settings: Mapping[str, object]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        flags += ["--" + name.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def memory_flags(vllm_flags: list[str], num_servers: int = 1) -> list[str]:
    """On a CPU, vLLM by itself takes nearly all memory for the KV cache and fails where some is in use already.
    num_servers: that will run beside each other."""
    given = normalised(vllm_flags)
    if any(given_value(given, name) is not None for name in ("kv-cache-memory-bytes", "gpu-memory-utilization")):
        return []
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ or not is_cpu_build():
        return []
    size = min(DEFAULT_KV_CACHE_BYTES, available_memory_bytes() // (4 * num_servers))
    return ["--kv-cache-memory-bytes", str(size)]
