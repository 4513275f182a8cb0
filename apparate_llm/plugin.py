"""vLLM entry points. Both run in every vLLM process, also where our package is merely installed."""

import logging
import os

from apparate_llm.host.choice import KERNELS

logger = logging.getLogger("vllm.apparate")


def platform() -> str | None:
    """Of `vllm.platform_plugins`: vLLM's own for a CPU, where it would take zentorch's. None: as vLLM does."""
    return "vllm.platforms.cpu.CpuPlatform" if os.environ.get(KERNELS) == "stock" else None


def register() -> None:
    """Of `vllm.general_plugins`: our model classes are made known, and corrections applied that every process needs."""
    from vllm import ModelRegistry

    from apparate_llm.engine.plain_pages import move_after_loading
    from apparate_llm.lifeline import tie_to_parent
    from apparate_llm.log_watch import sign_our_lines
    from apparate_llm.models.architectures import ARCHITECTURES
    from apparate_llm.patches.guard import PatchMismatchError
    from apparate_llm.patches.ledger import apply_all
    from apparate_llm.redact import hide_digests_in_vllm_log

    hide_digests_in_vllm_log()
    sign_our_lines()
    tie_to_parent()
    known = ModelRegistry.get_supported_archs()
    for name, class_path in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, class_path)
    try:
        apply_all("any")
        move_after_loading()
    except PatchMismatchError as error:  # no reason to stop a server without exits; one with exits stops by itself
        logger.warning("%s", error)
