"""Tensor parallelism: all ranks run the same rounds, rank 0's ramp is the one that counts.

All else that decides (verdicts, budget, policy) is computed alike on every rank from the same logits and from rank
0's clock.
"""

from typing import Any

import torch

from apparate_llm.ramps.load import Prediction


def share_prediction(prediction: Prediction, group: Any) -> Prediction:
    """Rank 0's tokens and confidences, on every rank of vLLM's group coordinator."""
    if group.world_size == 1:
        return prediction
    confidences = torch.tensor(prediction.confidences, dtype=torch.float64)
    shared = torch.stack([prediction.token_ids.double(), confidences])  # [2, num_rows]; token ids are exact in float64
    torch.distributed.broadcast(shared, src=group.ranks[0], group=group.cpu_group)
    return prediction._replace(token_ids=shared[0].long(), confidences=shared[1].tolist())
