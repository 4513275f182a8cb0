"""Stage 3 of ramp preparation: train one fused head per depth on the collected rows, then calibrate it.

Loss per round: cross entropy against the full model's top tokens (distillation, within the ramp vocabulary) plus a
smooth-L1 pull of the output state towards the full-depth state it stands for. Rounds after the first run on the
head's own output state, as they do when serving.
"""

import math
import time
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from apparate_llm.ramps.heads import FusedHead
from apparate_llm.ramps.prepare.collect import Rows

ROUND_WEIGHTS = (1.0, 0.8, 0.6)
STATE_LOSS_WEIGHT = 0.2
BATCH_ROWS = 1024
LEARNING_RATE = 1e-3
HELD_OUT_EVERY = 20  # one conversation in this many is never trained on


class BaseParts(NamedTuple):
    """What training needs of the frozen base model."""

    embedding: torch.Tensor  # [vocab, H]
    lm_head: torch.Tensor  # [vocab, H]
    norm: torch.Tensor  # [H] final norm weight
    eps: float


def ramp_vocabulary(rows: Rows, size: int) -> torch.Tensor:
    """The `size` tokens the full model most often wants next, sorted by id."""
    wanted = torch.bincount(rows.top_ids[rows.is_answer, 0].long())
    wanted += torch.bincount(rows.top_ids[:, :2].flatten().long(), minlength=len(wanted))[: len(wanted)] // 8
    return wanted.topk(min(size, len(wanted))).indices.sort().values


def starts(rows: Rows, num_rounds: int, *, held_out: bool) -> torch.Tensor:
    """Rows i with a row before and `num_rounds` - 1 rows behind in the same conversation."""
    index = torch.arange(1, len(rows.tokens) - num_rounds)
    documents = rows.documents
    inside = (documents[index - 1] == documents[index]) & (documents[index] == documents[index + num_rounds - 1])
    index = index[inside]
    is_held_out = documents[index] % HELD_OUT_EVERY == 0
    return index[is_held_out & rows.is_answer[index]] if held_out else index[~is_held_out]


class RoundData:
    """Gathers one batch's inputs and targets from the rows."""

    def __init__(self, rows: Rows, base: BaseParts, depth: int, vocabulary: torch.Tensor) -> None:
        self.rows, self.base, self.depth = rows, base, depth
        self.position = torch.full((base.lm_head.shape[0],), -1, dtype=torch.int64)
        self.position[vocabulary] = torch.arange(len(vocabulary))

    def hidden(self, index: torch.Tensor) -> torch.Tensor:
        if self.depth == 0:
            return F.embedding(self.rows.tokens[index].long(), self.base.embedding)
        return self.rows.hidden[self.depth][index]

    def targets(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ramp positions [B, TOP] and probabilities [B, TOP] of the full model's best tokens, 0 outside."""
        position = self.position[self.rows.top_ids[index].long()]
        return position.clamp(min=0), self.rows.top_logprobs[index].float().exp() * (position >= 0)

    def best(self, index: torch.Tensor) -> torch.Tensor:
        """Ramp position of the full model's best token, -1 outside the ramp vocabulary."""
        return self.position[self.rows.top_ids[index, 0].long()]


def new_head(base: BaseParts, vocabulary: torch.Tensor, intermediate_size: int) -> FusedHead:
    hidden_size = base.norm.shape[0]
    head = FusedHead(
        hidden_size=hidden_size, ramp_vocab=len(vocabulary), eps=base.eps, intermediate_size=intermediate_size
    )
    with torch.no_grad():
        for name in ("norm_hidden", "norm_state", "norm_mlp"):
            getattr(head, name).fill_(1.0)
        for name in ("fuse", "gate_up", "down"):
            weight = getattr(head, name)
            weight.normal_(0.0, 1.0 / math.sqrt(weight.shape[1]))
        head.down.mul_(0.1)
        head.norm.copy_(base.norm)
        head.head.copy_(base.lm_head[vocabulary])
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name != "head")
    return head


def train_head(
    rows: Rows,
    base: BaseParts,
    vocabulary: torch.Tensor,
    *,
    depth: int,
    intermediate_size: int,
    epochs: float,
    seed: int,
    time_budget_s: float,
    batch_rows: int = BATCH_ROWS,
) -> tuple[FusedHead, dict[str, Any]]:
    """Train until `epochs` or `time_budget_s` is used up; the learning rate follows whichever ends first."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    data = RoundData(rows, base, depth, vocabulary)
    head = new_head(base, vocabulary, intermediate_size)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    train_rows = starts(rows, len(ROUND_WEIGHTS), held_out=False)
    total = int(epochs * len(train_rows) / batch_rows)
    began = time.monotonic()
    permutation = torch.randperm(len(train_rows))
    with tqdm(total=total, desc=f"train depth {depth}", unit="step") as bar:
        for step in range(total):
            done_frac = max(step / total, (time.monotonic() - began) / time_budget_s)
            if done_frac >= 1.0:
                break
            warm = min(1.0, (step + 1) / 100)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done_frac)))
            offset = step * batch_rows % (len(train_rows) - batch_rows)
            if offset < batch_rows:
                permutation = torch.randperm(len(train_rows))
            index = train_rows[permutation[offset : offset + batch_rows]]
            loss = _loss(head, data, index)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            bar.update(1)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    head.requires_grad_(False)
    return head, {"rows": len(train_rows), "steps": step, "seconds": round(time.monotonic() - began)}


def _loss(head: FusedHead, data: RoundData, index: torch.Tensor) -> torch.Tensor:
    loss = torch.zeros(())
    state = data.rows.final[index - 1]
    for number, weight in enumerate(ROUND_WEIGHTS):
        position, probability = data.targets(index + number)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, state = head(data.hidden(index + number).bfloat16(), state.bfloat16())
        log_probability = torch.gather(scores.float(), 1, position) - scores.float().logsumexp(-1, keepdim=True)
        loss = loss - weight * (probability * log_probability).sum(-1).mean()
        wanted = data.rows.final[index + number].float()
        loss = loss + weight * STATE_LOSS_WEIGHT * F.smooth_l1_loss(state.float(), wanted)
    return loss


@torch.inference_mode()
def evaluate_head(
    head: FusedHead, rows: Rows, base: BaseParts, vocabulary: torch.Tensor, *, depth: int, num_rounds: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per round: (raw confidence [n], whether the ramp agrees with the full model [n]) on held-out answers.

    A later round counts only where the rounds before it agreed: a held exit is followed up only then.
    """
    data = RoundData(rows, base, depth, vocabulary)
    index = starts(rows, num_rounds, held_out=True)
    confidences: list[list[torch.Tensor]] = [[] for _ in range(num_rounds)]
    agreements: list[list[torch.Tensor]] = [[] for _ in range(num_rounds)]
    for part in index.split(2048):
        state = rows.final[part - 1].float()
        alive = torch.ones(len(part), dtype=torch.bool)
        for number in range(num_rounds):
            scores, state = head(data.hidden(part + number).float(), state)
            confidence, choice = scores.softmax(-1).max(-1)
            # The next round's input must be this round's token: where the text went another way there is no row.
            followed = data.rows.tokens[part + number + 1].long() == vocabulary[choice]
            agrees = choice == data.best(part + number)
            confidences[number].append(confidence[alive])
            agreements[number].append(agrees[alive])
            alive &= agrees & followed
    return [(torch.cat(c), torch.cat(a)) for c, a in zip(confidences, agreements, strict=True)]


def calibrate(confidence: torch.Tensor, agrees: torch.Tensor) -> tuple[float, float]:
    """Platt scaling: (scale, offset) of sigmoid(scale * logit(confidence) + offset), by Newton's method."""
    with torch.inference_mode(False):
        x = torch.logit(confidence.double().clone(), eps=1e-6)
        y = agrees.double().clone()
        design = torch.stack([x, torch.ones_like(x)], dim=1)
        weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
        for _ in range(50):
            p = torch.sigmoid(design @ weights)
            gradient = design.T @ (p - y) + 1e-3 * weights
            hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-3 * torch.eye(2, dtype=torch.float64)
            step = torch.linalg.solve(hessian, gradient)
            weights = weights - step
            if step.abs().max() < 1e-9:
                break
    return float(weights[0]), float(weights[1])
