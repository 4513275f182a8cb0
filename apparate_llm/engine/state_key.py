"""Whose experience a controller's is."""

from pathlib import Path
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform

from apparate_llm.engine.fallback import FallbackRunner
from apparate_llm.host.choice import ZENTORCH
from apparate_llm.machine import cpu_name
from apparate_llm.naming import model_name


def state_key_of(runner: FallbackRunner, depths: list[int]) -> dict[str, object]:
    """What the controller's experience is worth nothing without: model, ramps at `depths`, machine and how it is
    used."""
    kernels = {ZENTORCH: True} if current_platform.is_zen_cpu() else {}  # by themselves vLLM's own
    model: Any = runner.get_model()
    # Siblings that share ramps, and maybe a name, have different weights.
    weights = {} if model.sibling is None else {"weights": model.weights_fingerprint}
    key: dict[str, object] = {
        "model": model_name(Path(runner.model_config.model)),
        "ramps": model.ramps_sha256,
        **weights,
        "depths": depths,
        "policy": runner.exit_config.policy,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "ranks": get_tp_group().world_size,
        "dtype": str(runner.dtype),
        "compiled": not runner.model_config.enforce_eager,
    }
    return key | kernels
