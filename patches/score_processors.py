"""wrap: vLLM's choice of logits processors, which with drafts leaves out min_p's, logit_bias's and all of the user's.

Requests that one of them may act on have no drafts here, and a request without drafts has one row at its own index,
as without speculation.
"""

from copy import copy
from functools import wraps
from typing import TYPE_CHECKING

from apparate_llm.patches.guard import Patch, Target, check_target, is_ours

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def wrapped(original: Target) -> Target:
    """`build_logitsprocs(vllm_config, ...)` that builds for our server what it builds without drafts."""

    @wraps(original)
    def build_logitsprocs(vllm_config: "VllmConfig", *args: object, **kwargs: object) -> object:
        if is_ours(vllm_config.speculative_config):
            vllm_config = copy(vllm_config)
            vllm_config.speculative_config = None
        return original(vllm_config, *args, **kwargs)

    return build_logitsprocs


def apply(patch: Patch) -> bool:
    from vllm.v1.worker import gpu_model_runner

    original = vars(gpu_model_runner)["build_logitsprocs"]  # that module's own name for it
    if hasattr(original, "__wrapped__"):
        return False
    check_target(patch, original)
    vars(gpu_model_runner)["build_logitsprocs"] = wrapped(original)
    return True
