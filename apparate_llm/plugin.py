"""vLLM entry point `vllm.general_plugins`: our model classes are made known, and corrections applied that every process
needs. Runs in every vLLM process, also where our package is merely installed."""

import logging

logger = logging.getLogger("vllm.apparate")


def register() -> None:
    from vllm import ModelRegistry

    from apparate_llm.lifeline import tie_to_parent
    from apparate_llm.models.architectures import ARCHITECTURES
    from apparate_llm.patches.guard import PatchMismatchError
    from apparate_llm.patches.ledger import apply_all
    from apparate_llm.redact import hide_digests_in_vllm_log

    hide_digests_in_vllm_log()
    tie_to_parent()
    known = ModelRegistry.get_supported_archs()
    for name, class_path in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, class_path)
    try:
        apply_all("any")
    except PatchMismatchError as error:  # no reason to stop a server without exits; one with exits stops by itself
        logger.warning("%s", error)
