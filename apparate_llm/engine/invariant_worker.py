"""vLLM's CPU worker with batch invariance: all there is of ours where a server runs with `--policy off`."""

from contextlib import suppress
from pathlib import Path

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from apparate_llm.config import config_from_vllm
from apparate_llm.coverage import VLLM_KERNELS, keep
from apparate_llm.engine.batch import attention_groups
from apparate_llm.engine.batch_invariance import Coverage, before_loading, before_serving, cover
from apparate_llm.engine.compared_passes import different_passes
from apparate_llm.host.choice import ZENTORCH
from apparate_llm.machine import cache_folder
from apparate_llm.naming import model_name
from apparate_llm.patches.ledger import apply_all
from apparate_llm.patches.overrides import check_those_of

logger = init_logger("vllm.apparate")
COVERED = "early_exit_batch_invariance"  # in vLLM's additional settings, which its compile cache has in its key


class BatchInvariantWorker(CPUWorker):
    coverage: Coverage | None = None  # None: not asked for

    def init_device(self) -> None:
        if config_from_vllm(self.vllm_config).batch_invariant:
            self.coverage = Coverage({}, [])
            before_loading(self.vllm_config)
        check_those_of("engine.invariant_worker", "engine.batch_invariance")
        for target in apply_all():  # before vLLM's worker builds a runner, which builds the logits processors
            logger.info("Patched %s", target)
        super().init_device()  # type: ignore[no-untyped-call]  # vLLM's

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        if self.coverage is not None:
            dtype, additional = self.model_config.dtype, self.vllm_config.additional_config
            assert isinstance(dtype, torch.dtype) and isinstance(additional, dict), f"got {dtype}, {type(additional)}"
            self.coverage = cover(self.model_runner.get_model(), dtype)
            self.vllm_config.additional_config = additional | {COVERED: self.coverage.least_rows}

    def compile_or_warm_up_model(self) -> CompilationTimes:
        if self.coverage is not None:
            before_serving(attention_groups(self.model_runner))
        times = super().compile_or_warm_up_model()
        if self.coverage is not None:
            self._compare_passes(self.coverage)
            self._say(self.coverage)
        return times

    def _say(self, coverage: Coverage) -> None:
        say = logger.info if coverage.holds else logger.warning
        say("Batch invariance: %s", coverage.sentence())
        if self.rank == 0:
            name = model_name(Path(self.model_config.model))
            dtype = str(self.model_config.dtype).removeprefix("torch.")
            with suppress(OSError):  # it is for `doctor` alone
                outcome = (torch.get_num_threads(), coverage.sentence(), coverage.holds)
                keep(cache_folder(), name, dtype, *outcome, kernels=kernels_in_use())

    def _compare_passes(self, coverage: Coverage) -> None:
        try:
            coverage.passes_compared, different = different_passes(self.model_runner)
        except Exception as error:  # a model of another make; serving needs none of this
            logger.info("Batch invariance: whole passes were not compared: %s", error)
            return
        if different:
            coverage.not_covered.append(f"{different} of {coverage.passes_compared} whole passes differ")


def kernels_in_use() -> str:
    return ZENTORCH if current_platform.is_zen_cpu() else VLLM_KERNELS
