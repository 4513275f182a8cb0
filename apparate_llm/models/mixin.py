"""What early exits add to a vLLM decoder class: depth-limited forward, auxiliary hidden states, ramps.

Works on any class whose `model` has `embed_input_ids`, `layers` called as `layer(positions, hidden, residual)` and a
final `norm`, which is how vLLM writes Llama, Mistral, Qwen2 and Qwen3.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apparate_llm.config import config_from_vllm
from apparate_llm.models.quantised_heads import quantised_head
from apparate_llm.ramps.base_weights import BaseWeights
from apparate_llm.ramps.checkpoint import choose_depth
from apparate_llm.ramps.fitting import Sibling, fitting_ramps
from apparate_llm.ramps.load import RampSet, load_ramps

if TYPE_CHECKING:
    from vllm.model_executor.models.llama import LlamaForCausalLM as _Base
else:
    _Base = object


class EarlyExitMixin(_Base):
    """Put before a vLLM `...ForCausalLM` class. Blocks and KV cache are shared with the full model."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.early_exit_config = config_from_vllm(vllm_config)
        self.ramps = nn.ModuleDict()  # depth, as text -> RampSet
        self.default_depth: int | None = None  # this and what follows is written by load_weights
        self.ramps_sha256: str | None = None
        self.weights_fingerprint: str | None = None
        self.sibling: Sibling | None = None  # where the ramps were made for another model
        # Answers the next call for scores, once, where it can: see engine/screening.py.
        self.next_scores: Callable[[torch.Tensor], torch.Tensor | None] | None = None
        self._compiled_shallow: dict[int, Callable[..., torch.Tensor]] = {}
        self._dtype = vllm_config.model_config.dtype
        self._folder = Path(vllm_config.model_config.model)

    def forward_shallow(self, depth: int, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Residual stream after blocks [0, depth): [num_tokens, hidden_size].

        Needs a forward context whose attention metadata covers these rows; writes the KV of these blocks, which the
        verification pass later writes again with the same values.
        """
        compiled = self._compiled_shallow.get(depth)
        return self._shallow(depth, input_ids, positions) if compiled is None else compiled(input_ids, positions)

    def compile_shallow(self, depth: int, num_tokens: int) -> None:
        """Compile `forward_shallow` at this depth, for any number of tokens; `num_tokens`, more than 1, to try it with.
        Needs a forward context, without metadata."""
        compiled = torch.compile(lambda *rows: self._shallow(depth, *rows), dynamic=True, options=compile_options())
        rows = torch.zeros(num_tokens, dtype=torch.long)
        compiled(rows, rows.clone())
        self._compiled_shallow[depth] = compiled

    def _shallow(self, depth: int, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.model.embed_input_ids(input_ids), None
        for layer in self.model.layers[:depth]:
            hidden, residual = layer(positions, hidden, residual)
        states: torch.Tensor = hidden if residual is None else hidden + residual
        return states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        screened, self.next_scores = self.next_scores, None
        scores = None if screened is None else screened(hidden_states)
        return super().compute_logits(hidden_states) if scores is None else scores

    def set_aux_state_depths(self, depths: tuple[int, ...]) -> None:
        """Make the full pass return (final states, [residual stream after d blocks for d in depths])."""
        self.model._set_aux_hidden_state_layers(depths)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base model, then the ramps that fit it; raises RampError where they don't."""
        base = BaseWeights()
        loaded = super().load_weights(base.watch(weights))
        self.weights_fingerprint = base.fingerprint
        config = self.early_exit_config
        if config.policy != "off":
            folder, manifest, self.sibling = fitting_ramps(
                base, self._folder, None if config.ramps is None else Path(config.ramps)
            )
            self.default_depth = choose_depth(manifest, config.depth)
            self.ramps_sha256 = manifest.sha256()
            base_weights = {"norm": base.norm, "head": base.head()}
            for depth in manifest.depths if config.depth == "auto" else [self.default_depth]:
                ramps = load_ramps(folder, manifest, depth=depth, base_weights=base_weights, dtype=self._dtype)
                ramps.head = quantised_head(ramps.head, self._dtype)
                self.ramps[str(depth)] = ramps
            loaded |= {f"ramps.{name}" for name, _ in self.ramps.named_parameters()}
        return loaded


def compile_options() -> dict[str, Any]:
    """As vLLM compiles the model: nothing that could be checked in each call ever changes, and checking takes time."""
    asserts = ("size_asserts", "alignment_asserts", "scalar_asserts")
    return {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, **dict.fromkeys(asserts, False)}


def ramps_of(model: nn.Module) -> tuple[dict[int, RampSet], int]:
    """A loaded model's ramps by depth, and the depth to begin with; raises ValueError for a model class without."""
    ramps, depth = getattr(model, "ramps", None), getattr(model, "default_depth", None)
    if not ramps or depth is None:
        raise ValueError(f"{type(model).__name__} has no ramps: give --hf-overrides an EarlyExit architecture")
    return {int(name): ramp for name, ramp in ramps.items()}, depth
