"""Where the best token of each row is all that a pass is asked for, the head is screened: models/screened_head.py."""

from time import perf_counter
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from apparate_llm.models.quantised_heads import has_fast_int8
from apparate_llm.models.screened_head import ScreenedHead

logger = init_logger("vllm.apparate")


def screened_head(model: Any) -> ScreenedHead | None:
    """Of a loaded model, if its scores are a plain product in bfloat16 and this machine is faster so."""
    if (weight := plain_weight(model)) is None or not has_fast_int8():
        return None
    began_s = perf_counter()
    head = ScreenedHead(weight, model.compute_logits)
    most_rows = head.try_here()
    took = f"{perf_counter() - began_s:.1f} s"
    if not most_rows:
        logger.info("Head: not screened in int8, which is no faster here (%s)", took)
        return None
    logger.info("Head: screened in int8 for up to %d greedy rows (%s)", most_rows, took)
    return head


def plain_weight(model: Any) -> torch.Tensor | None:
    """[vocab, hidden_size] of a head whose scores are its product with a row and nothing else."""
    head, processor = getattr(model, "lm_head", None), getattr(model, "logits_processor", None)
    weight = getattr(head, "weight", None)
    if (
        not isinstance(weight, torch.Tensor)
        or weight.dtype != torch.bfloat16
        or weight.dim() != 2
        or not isinstance(getattr(head, "quant_method", None), UnquantizedEmbeddingMethod)
        or getattr(head, "bias", None) is not None
        or getattr(head, "tp_size", 1) != 1
        or processor is None
        or processor.scale != 1.0
        or processor.soft_cap is not None
        or processor.head_dtype not in (None, torch.bfloat16)
        or len(weight) < processor.org_vocab_size
    ):
        return None
    return weight.detach()[: processor.org_vocab_size]
