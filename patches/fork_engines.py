"""wrap: vLLM's settings for the CPU, by which every engine and worker is a process started anew.

Such a process imports vLLM again, one after the other. A fork of the server has it already, and with it OpenMP's
runtime, which takes the cores to bind its threads to from variables that vLLM sets for each worker. Intel's runtime
starts over in a fork and reads them there; GNU's, as vLLM's executor notes, is not safe to fork.
"""

import os
from functools import wraps

import torch

from apparate_llm.patches.guard import Patch, Target, check_target

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
INTEL_OPENMP = "libiomp"


def wrapped(original: Target) -> Target:
    """`check_and_update_config(cls, vllm_config)` that leaves vLLM's default for other platforms."""

    @wraps(original)
    def check_and_update_config(cls: type, vllm_config: object) -> None:
        original(vllm_config)
        os.environ[METHOD] = "fork"

    return check_and_update_config


def start_over() -> None:
    """In a fork: as many threads as vLLM wants there. What else a fork must not share is in `lifeline`."""
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def apply(patch: Patch) -> bool:
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform

    if not current_platform.is_cpu() or INTEL_OPENMP not in os.environ.get("LD_PRELOAD", ""):
        return False
    if os.environ.get(METHOD, "fork") != "fork":
        return False  # the user's choice
    original = CpuPlatform.check_and_update_config
    if hasattr(original, "__wrapped__"):
        return False
    check_target(patch, original)
    setattr(CpuPlatform, "check_and_update_config", classmethod(wrapped(original)))  # noqa: B010
    os.environ.setdefault("KMP_AFFINITY", "none")  # of the engine; vLLM sets it for workers
    os.register_at_fork(after_in_child=start_over)
    return True
