"""The class named in `--speculative-config`. It only announces that exits exist: the runner makes them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER_CLASS = "apparate_llm.engine.worker.EarlyExitWorker"
SCHEDULER_CLASS = "apparate_llm.engine.scheduler.EarlyExitScheduler"


class RampProposer:
    """Checks at start that the parts which must go together do."""

    def __init__(self, vllm_config: "VllmConfig") -> None:
        given = {
            "--worker-cls": (vllm_config.parallel_config.worker_cls, WORKER_CLASS),
            "--scheduler-cls": (vllm_config.scheduler_config.scheduler_cls, SCHEDULER_CLASS),
        }
        for flag, (got, needed) in given.items():
            if got != needed:
                raise ValueError(f"early exits need {flag} {needed}, got {got}")

    def load_model(self, model: object) -> None:
        """Called by vLLM's runner once the model is loaded; the ramps came with it."""

    def propose(self, *args: object, **kwargs: object) -> list[list[int]]:
        raise AssertionError("exits are made by the early-exit runner, which does not ask its proposer")
