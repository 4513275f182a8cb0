"""wrap: how a reader waits at a queue between engine and worker.

It looks at the queue again and again until a second after it read something, on a core that is to compute. Here it
sleeps until the writer's notice, which vLLM's writers send with each message.
"""

import os
import time
from functools import wraps
from typing import TYPE_CHECKING

from apparate_llm.host.choice import QUEUES
from apparate_llm.patches.guard import Patch, Target, check_target

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

FIRST_S = 5.0  # in which a notice may have come before the reader heard notices
FIRST_WAIT_MS = 20
BEGAN = "began_to_wait_s"


def wrapped(original: Target) -> Target:
    """`wait(self, timeout_ms)` that never looks again before something has come, or time is up."""

    @wraps(original)
    def wait(self: "SpinCondition", timeout_ms: int | None = None) -> None:
        self.busy_loop_s = 0.0
        now_s = time.monotonic()
        if now_s - vars(self).setdefault(BEGAN, now_s) < FIRST_S:
            timeout_ms = FIRST_WAIT_MS if timeout_ms is None else min(FIRST_WAIT_MS, timeout_ms)
        original(self, timeout_ms)

    return wait


def apply(patch: Patch) -> bool:
    if os.environ.get(QUEUES) != "block":
        return False
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    original = SpinCondition.wait
    if hasattr(original, "__wrapped__"):
        return False
    check_target(patch, original)
    setattr(SpinCondition, "wait", wrapped(original))  # noqa: B010
    return True
