"""wrap: vLLM's engine, which asks the worker for drafts after every step, a message there and one back.

Where they came with the step's output, the scheduler has them already.
"""

from functools import wraps
from typing import TYPE_CHECKING

from apparate_llm.patches.guard import Patch, Target, check_target

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore


def wrapped(original: Target) -> Target:
    """`post_step(self, model_executed)` that asks only for drafts which the scheduler does not have."""

    @wraps(original)
    def post_step(self: "EngineCore", model_executed: bool) -> None:
        if not getattr(self.scheduler, "has_drafts", False):
            original(self, model_executed)

    return post_step


def apply(patch: Patch) -> bool:
    from vllm.v1.engine.core import EngineCore

    original = EngineCore.post_step
    if hasattr(original, "__wrapped__"):
        return False
    check_target(patch, original)
    EngineCore.post_step = wrapped(original)  # type: ignore[method-assign]
    return True
