"""The worker class named in `--worker-cls`: vLLM's own, with the early-exit runner."""

from collections.abc import Mapping
from dataclasses import asdict
from time import monotonic

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from apparate_llm.config import ConfigError, public_config
from apparate_llm.engine.background import run_in_background
from apparate_llm.engine.invariant_worker import BatchInvariantWorker
from apparate_llm.engine.runner import EarlyExitRunner
from apparate_llm.exits.token_origins import TokenReport
from apparate_llm.patches.overrides import check_those_of

logger = init_logger("vllm.apparate")


class EarlyExitWorker(BatchInvariantWorker):
    model_runner: EarlyExitRunner  # type: ignore[assignment]

    def init_device(self) -> None:
        check_supported(self.vllm_config)
        check_those_of("engine.worker", "engine.runner", "engine.fallback", "models.")
        super().init_device()
        # vLLM's worker builds its own runner; nothing is loaded into it yet.
        self.model_runner = EarlyExitRunner(self.vllm_config, torch.device("cpu"))
        if not self.model_config.enforce_eager:
            run_in_background(hash_compilers, "hash-compilers")

    def compile_or_warm_up_model(self) -> CompilationTimes:
        times = super().compile_or_warm_up_model()
        drafter = self.model_runner.exit_drafter
        if drafter is not None:  # those of a depth that is chosen later would have to be compiled while serving
            drafter.model.compile(drafter.policy.depth)
        return times

    # One message to this process per step instead of three, where nothing has to come in between.

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        output: ModelRunnerOutput | AsyncModelRunnerOutput | None = super().execute_model(scheduler_output)
        if output is not None or not self.model_runner.num_spec_tokens:
            return output
        if scheduler_output.has_structured_output_requests:
            return None  # vLLM calls `sample_tokens` when it has the grammar's masks
        return self.sample_tokens(None)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        output: ModelRunnerOutput | AsyncModelRunnerOutput = super().sample_tokens(grammar_output)
        runner = self.model_runner
        if not runner.num_spec_tokens or runner.step.later or not isinstance(output, ModelRunnerOutput):
            return output
        return runner.with_drafts(output)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        try:
            return super().take_draft_token_ids()
        except Exception:
            logger.exception("Drafts are left out")
            return None

    # Reached with `collective_rpc`.

    def early_exit_status(self) -> dict[str, object]:
        """Options, depth in use and running totals, as plain values."""
        runner = self.model_runner
        policy = runner.exit_drafter.policy if runner.exit_drafter else None
        return {
            "clock_s": monotonic(),
            "active": policy is not None,
            "failure": runner.safety.status(monotonic()),
            "running": len(runner.ledger.requests),
            "depth": policy.depth if policy else None,
            "config": public_config(runner.exit_config),
            "tenants": {name: share.as_dict() for name, share in runner.ledger.tenants.items()},
            "counts": runner.ledger.counts.as_dict(),
            "audit": asdict(runner.ledger.audit),
            "distributions": runner.ledger.distributions.as_dict(),
            "budget_fill_frac": runner.ledger.budget.fill_frac,
            "budget_left": runner.ledger.budget.server.balance,
            "controller": policy.status() if policy else {},
            "batch_invariance": self.coverage.as_dict() if self.coverage is not None else None,
        }

    def early_exit_configure(self, changes: Mapping[str, object], is_trial: bool = False) -> str | None:
        """Change options from the next step on; one line on why not, where they are not allowed. is_trial: change
        nothing."""
        try:
            if is_trial:
                self.model_runner.check_change(changes)
            else:
                self.model_runner.reconfigure(changes)
        except ConfigError as error:
            return str(error)
        return None

    def early_exit_forget(self) -> bool:
        """Drop what the controller has learned; totals go on. False where it was not done."""
        return self.model_runner.forget()

    def early_exit_report(self, key: str) -> dict[str, TokenReport]:
        """Of the answers asked for with this key, by request id: where their tokens came from."""
        return self.model_runner.ledger.report(key)

    def early_exit_check_integrity(self) -> None:
        self.model_runner.check_integrity()


def hash_compilers() -> None:
    """What the key of vLLM's compile cache has of torch's and Triton's files: seconds of reading, done and kept by the
    time it is asked for."""
    from torch._inductor.codecache import CacheBase, torch_key

    CacheBase.get_system()
    torch_key()


def check_supported(vllm_config: VllmConfig) -> None:
    """Raise ValueError for a server set-up that early exits cannot serve."""
    if not current_platform.is_cpu():
        device = current_platform.device_type
        raise ValueError(
            f"early exits have a CPU worker only, this vLLM is for {device}; --policy off serves plain vLLM"
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ValueError(f"early exits need --pipeline-parallel-size 1, got {stages}; --policy off serves plain vLLM")
    if vllm_config.lora_config is not None:
        raise ValueError("early exits do not work with --enable-lora; --policy off serves plain vLLM")
