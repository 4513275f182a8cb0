"""Batch invariance on a CPU: the bits of a token do not depend on what else is in its batch.

vLLM's CPU backend depends on it in three places: some linear layers round a lone row in another order than one of
several, attention splits a request's keys over threads as the batch leaves it room, and it takes keys in portions whose
size depends on how many rows of the request are computed together. Here each is computed so that it does not.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.config.compilation import DynamicShapesType
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.v1.worker.utils import AttentionGroup

logger = init_logger("vllm.apparate")

SPLIT_KEYS = "VLLM_CPU_ATTN_SPLIT_KV"  # vLLM's switch, on by default
LEAST_ROWS = (1, 2, 4, 8, 16)  # tried in turn: what fewer rows are filled up to
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48)  # rows, compared with all at once
ROWS_PER_PIECE = 8  # of a query, see patches/attention_pieces.py
TRIED_ROWS = 64
TRIED_ROWS_OF_HEAD = 16  # a row of it takes milliseconds
MANY = 1 << 14  # outputs, from which a layer is tried as a head is

Linear = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class LinearKind:
    """Layers that run the same kernel."""

    size_in: int
    size_out: int
    method: str
    has_bias: bool

    def __str__(self) -> str:
        return f"{self.size_in}x{self.size_out}"


@dataclass(slots=True)
class Coverage:
    """What was found, and what is done about it. Written to the start's log, the status and `doctor`."""

    least_rows: dict[str, int]  # of linear layers that have one, by kind: fewer rows are filled up
    not_covered: list[str]  # one line each: what still depends on the batch
    num_kinds: int = 0
    passes_compared: int | None = None  # of whole passes, whose states and scores were the same; None: not tried

    @property
    def holds(self) -> bool:
        return not self.not_covered

    def as_dict(self) -> dict[str, object]:
        return {
            "holds": self.holds,
            "linear_kinds": self.num_kinds,
            "least_rows": self.least_rows,
            "passes_compared": self.passes_compared,
            "not_covered": self.not_covered,
        }

    def sentence(self) -> str:
        padded = ", ".join(f"{kind} at least {rows} rows" for kind, rows in self.least_rows.items())
        linear = f"{self.num_kinds} kinds of linear layers" + (f" ({padded})" if padded else "")
        tried = "whole passes not compared" if self.passes_compared is None else f"{self.passes_compared} passes alike"
        if self.holds:
            attention = f"attention in pieces of {ROWS_PER_PIECE} rows"
            return f"a token's bits do not depend on its batch: {linear}, {attention}, {tried}"
        return f"a token's bits still depend on its batch: {'; '.join(self.not_covered)}"


def before_loading(vllm_config: VllmConfig) -> None:
    """Settings of vLLM that have to be there before it builds the model. What the user set stays."""
    os.environ.setdefault(SPLIT_KEYS, "0")
    shapes = vllm_config.compilation_config.dynamic_shapes_config
    if shapes.type is DynamicShapesType.BACKED:
        # By that a compiled pass were right for two rows and more, and what is done for a lone one left out.
        shapes.type = DynamicShapesType.BACKED_SIZE_OBLIVIOUS


def before_serving(groups: Iterable[AttentionGroup]) -> None:
    """Once vLLM has made its metadata builders: long queries are computed in pieces."""
    for group in groups:
        for builder in group.metadata_builders:
            vars(builder)["rows_per_piece"] = ROWS_PER_PIECE  # read by patches/attention_pieces.py


def cover(model: nn.Module, dtype: torch.dtype) -> Coverage:
    """Try the linear layers of a loaded model, one of each kind, and fill up the rows of those that need it. Before
    vLLM compiles it."""
    coverage = Coverage({}, [])
    if os.environ.get(SPLIT_KEYS) != "0":
        coverage.not_covered.append(f"attention splits keys over threads ({SPLIT_KEYS} is set)")
    rows_by_kind: dict[LinearKind, int | None] = {}
    for layer in linear_layers(model):
        kind = kind_of(layer)
        if kind not in rows_by_kind:
            rows_by_kind[kind] = least_rows(layer, kind, dtype)
        rows = rows_by_kind[kind]
        if rows is not None and rows > 1:
            layer.quant_method.apply = filled_up(layer.quant_method.apply, rows)
    coverage.num_kinds = len(rows_by_kind)
    coverage.least_rows = {str(kind): rows for kind, rows in rows_by_kind.items() if rows is not None and rows > 1}
    coverage.not_covered += [f"linear layers {kind}" for kind, rows in rows_by_kind.items() if rows is None]
    return coverage


def linear_layers(model: nn.Module) -> Iterator[Any]:
    """Those whose product one method of theirs computes, the head among them."""
    for module in model.modules():
        is_tied_head = isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear")
        if is_tied_head or isinstance(module, LinearBase | ParallelLMHead):
            yield module


def kind_of(layer: Any) -> LinearKind:
    is_head = isinstance(layer, VocabParallelEmbedding)
    size_in = layer.embedding_dim if is_head else layer.input_size_per_partition
    size_out = layer.num_embeddings_per_partition if is_head else layer.output_size_per_partition
    method = type(layer.quant_method).__name__
    if (scheme := getattr(layer, "scheme", None)) is not None:  # of compressed-tensors, which has one method for all
        method += f" {type(scheme).__name__} {getattr(scheme, 'group_size', '')}".rstrip()
    return LinearKind(size_in, size_out, method, getattr(layer, "bias", None) is not None)


def least_rows(layer: Any, kind: LinearKind, dtype: torch.dtype) -> int | None:
    """The fewest rows with which a row of this layer is the same in every batch tried; None: it is not with any."""
    generator = torch.Generator().manual_seed(kind.size_in)
    num_tokens = TRIED_ROWS if kind.size_out < MANY else TRIED_ROWS_OF_HEAD
    rows = torch.randn(num_tokens, kind.size_in, generator=generator).to(dtype)
    bias = getattr(layer, "bias", None)

    def compute(part: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = layer.quant_method.apply(layer, part.contiguous(), bias)
        return product

    whole = compute(rows)
    for least in LEAST_ROWS:
        filled = filled_up(compute, least)
        if all(torch.equal(torch.cat([filled(part) for part in torch.split(rows, size)]), whole) for size in BATCHES):
            return least
    return None


def filled_up(linear: Linear, least: int) -> Linear:
    """`linear(..., rows [num_tokens, size_in], ...)` of at least so many rows, the others zero and left out again."""

    def apply(*args: Any, **kwargs: Any) -> torch.Tensor:
        index = next(i for i, value in enumerate(args) if isinstance(value, torch.Tensor))
        rows = args[index]
        num_tokens = rows.shape[0]
        if rows.dim() != 2 or (not torch.compiler.is_compiling() and num_tokens >= least):
            return linear(*args, **kwargs)
        rows = F.pad(rows, (0, 0, 0, torch.sym_max(num_tokens, least) - num_tokens))
        return linear(*args[:index], rows, *args[index + 1 :], **kwargs)[:num_tokens]

    return apply
