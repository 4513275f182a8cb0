"""Weights in huge pages where no runner of ours moves them: plain vLLM, and our server with `--policy off`."""

import os
from functools import wraps
from typing import TYPE_CHECKING

from apparate_llm.host.choice import HUGE_PAGES
from apparate_llm.patches.guard import Target, is_ours
from apparate_llm.patches.overrides import check_those_of

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker


def move_after_loading() -> None:
    """In a process of vLLM's for which they are wanted: each worker of it moves its weights once it has loaded them.
    Raises PatchMismatchError."""
    if os.environ.get(HUGE_PAGES) != "1":
        return
    from vllm.v1.worker.gpu_worker import Worker  # the CPU's is one

    if hasattr(Worker.load_model, "__wrapped__"):
        return
    check_those_of("engine.plain_pages")
    setattr(Worker, "load_model", wrapped(Worker.load_model))  # noqa: B010


def wrapped(original: Target) -> Target:
    @wraps(original)
    def load_model(self: "Worker", **kwargs: object) -> None:
        from apparate_llm.engine.huge_pages import use_huge_pages

        original(self, **kwargs)
        if not is_ours(self.vllm_config.speculative_config):  # with exits the runner does, by its own option
            use_huge_pages()

    return load_model
