"""The vLLM settings that switch early exits on, for the CLI, the docs and the tests. Imports nothing heavy."""

from typing import TYPE_CHECKING, Any

from apparate_llm.config import ADDITIONAL_CONFIG_KEY, EarlyExitConfig
from apparate_llm.engine.proposer import SCHEDULER_CLASS, WORKER_CLASS
from apparate_llm.models.architectures import early_exit_architecture

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PLAIN_WORKER_CLASS = "apparate_llm.engine.invariant_worker.BatchInvariantWorker"
PROPOSER_CLASS = "apparate_llm.engine.proposer.RampProposer"


def vllm_args(config: EarlyExitConfig, architecture: str) -> dict[str, Any]:
    """Engine arguments of vLLM by name; with policy `off` those of plain vLLM, batch-invariant where that is asked
    for."""
    if config.policy == "off":
        if not config.batch_invariant:
            return {}
        return {
            "additional_config": {ADDITIONAL_CONFIG_KEY: config.model_dump(mode="json", exclude_unset=True)},
            "worker_cls": PLAIN_WORKER_CLASS,
        }
    return {
        "hf_overrides": {"architectures": [early_exit_architecture(architecture)]},
        "speculative_config": {
            "method": "custom_class",
            "model": PROPOSER_CLASS,
            "num_speculative_tokens": config.max_exits,
        },
        "additional_config": {ADDITIONAL_CONFIG_KEY: config.model_dump(mode="json", exclude_unset=True)},
        "worker_cls": WORKER_CLASS,
        "scheduler_cls": SCHEDULER_CLASS,
    }


def forget_options(vllm_config: "VllmConfig", aux_depths: list[int]) -> None:
    """vLLM's compile cache has the additional settings in its key. All that shapes the compiled pass are the states it
    gives out; the options were read before."""
    additional = vllm_config.additional_config
    assert isinstance(additional, dict), f"options came out of {type(additional)}"
    others = {k: v for k, v in additional.items() if k != ADDITIONAL_CONFIG_KEY}
    vllm_config.additional_config = others | {"early_exit_aux_depths": aux_depths}
