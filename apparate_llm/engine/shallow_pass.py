"""Passes through the first blocks of a vLLM runner's model, with its KV cache: what exits are drafted with."""

from typing import cast

import torch
from vllm.config import CompilationMode
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from apparate_llm.engine.batch import append_tokens, attention_of_rows, batch_of, num_slots
from apparate_llm.engine.parallel import Peers
from apparate_llm.exits.batch import Batch
from apparate_llm.models.mixin import EarlyExitMixin

logger = init_logger("vllm.apparate")

WARM_ROWS = 4  # for torch a number of 1 were a constant


class ShallowPass:
    """`exits/draft.py` says what it is for."""

    def __init__(self, runner: GPUModelRunner, peers: Peers) -> None:
        self.runner = runner
        self.peers = peers

    @property
    def _model(self) -> EarlyExitMixin:
        return cast(EarlyExitMixin, self.runner.model)  # vLLM's runner says only that it is a module

    def compile(self, depth: int) -> None:
        """Before serving, where vLLM compiles the model. Blocks that are not or cannot be compiled run as they are; so
        do those of several ranks, which could not meet for the exchanges of compiled ones."""
        config = self.runner.vllm_config
        if depth == 0 or not self.peers.alone or config.compilation_config.mode == CompilationMode.NONE:
            return
        try:
            with set_forward_context(None, config, num_tokens=WARM_ROWS), torch.inference_mode():
                self._model.compile_shallow(depth, WARM_ROWS)
        except Exception:
            logger.exception("Draft steps at depth %d take longer, as their blocks could not be compiled", depth)

    def batch(self) -> Batch:
        return batch_of(self.runner)

    def num_slots(self, request_index: int) -> int:
        return num_slots(self.runner, request_index)

    def append(self, request_index: int, tokens: list[int]) -> None:
        append_tokens(self.runner, request_index, tokens)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        with self.peers.meeting_in_model():
            embedded: torch.Tensor = self._model.model.embed_input_ids(tokens)
        return embedded

    def states(
        self, depth: int, request_indices: list[int], tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        if depth == 0:
            with self.peers.meeting_in_model():
                hidden = self._model.forward_shallow(0, tokens, positions)
            return hidden
        attention, slots = attention_of_rows(self.runner, request_indices, positions)
        config = self.runner.vllm_config
        with (
            set_forward_context(attention, config, num_tokens=len(request_indices), slot_mapping=slots),
            self.peers.meeting_in_model(),
        ):
            hidden = self._model.forward_shallow(depth, tokens, positions)
        return hidden
