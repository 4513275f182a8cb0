"""Stage train: one fused head per depth on the collected rows.

Loss per draft step: cross entropy against the full model's best tokens (distillation, within the ramp vocabulary).
Draft steps after the first run on the head's own output state, as they do when serving; a row where an earlier one
disagreed counts little there, since serving would have stopped.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from apparate_llm.prepare.acceptance import accepted_per_step, measure_head
from apparate_llm.prepare.draft_data import BaseParts, DraftData, starts, thinned
from apparate_llm.prepare.records import HeadRecord
from apparate_llm.prepare.rows import TRAIN, VALIDATION, Rows, meaningless_rows
from apparate_llm.prepare.workspace import save_state
from apparate_llm.ramps.checkpoint import HeadShape
from apparate_llm.ramps.heads import FusedHead

DISAGREED_WEIGHT = 0.2  # of a row after a draft step that disagreed with the full model
FINAL_LEARNING_RATE = 0.02  # of the highest one
WARM_UP_STEPS = 100
BATCH_ROWS = 1024
CHECKPOINT_EVERY_S, KEPT_WITHIN_S = 60.0, 110.0  # the latter where a step or an evaluation takes long
EVALUATE_EVERY = 0.1  # of the training
MAX_EVALUATED_ROWS, MIN_EVALUATED_ROWS, PROBED_ROWS = 12_000, 2_000, 256
EVALUATION_SHARE, EVALUATIONS_SHARE = 0.03, 0.2  # of a training's time, for one evaluation and for all of them
CLOSING = 2  # evaluations after the last step: of the last weights, and of the best ones on training rows
RELEASE_EVERY = 4  # steps, after which mapped rows are given back
TIMED_ROWS, TIMED_STEPS = 256, 3  # to know what a row costs: the fastest step counts


@dataclass(frozen=True, slots=True)
class TrainSettings:
    depth: int
    aux_layers: tuple[int, ...] = ()  # blocks before the auxiliary hidden states that the first state joins
    intermediate_size: int = 1536
    batch_rows: int = BATCH_ROWS
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    epochs: float = 3.0
    time_budget_s: float = math.inf
    step_weights: tuple[float, ...] = (1.0, 0.8, 0.6)
    seed: int = 0


def new_head(base: BaseParts, vocabulary: torch.Tensor, settings: TrainSettings) -> FusedHead:
    shape = HeadShape(
        hidden_size=base.norm.shape[0],
        ramp_vocab=len(vocabulary),
        eps=base.eps,
        intermediate_size=settings.intermediate_size,
        num_aux_layers=len(settings.aux_layers),
    )
    head = FusedHead(shape)
    head.dropout = settings.dropout
    with torch.no_grad():
        for name in ("enter_weight", "fuse", "gate_up", "down", "pointer"):
            weight = getattr(head, name)
            weight.normal_(0.0, 1.0 / math.sqrt(weight.shape[1]))
        head.down.mul_(0.1)
        head.match.zero_()
        head.norm.copy_(base.norm)
        head.head.copy_(base.lm_head[vocabulary])
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name != "head")
    return head


class _Distillation(torch.autograd.Function):
    """Mean of weight * -sum(probability * log softmax(scores)[position]), its gradient made in the forward pass:
    the scores are by far the largest tensor here and are gone over as few times as possible."""

    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, position: torch.Tensor, probability: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        shares = scores.softmax(-1)
        loss = -(probability * shares.gather(1, position).float().clamp(min=1e-9).log()).sum(-1)
        scale = weight / len(weight)
        gradient = shares.mul_((probability.sum(-1) * scale)[:, None].to(shares.dtype))
        gradient.scatter_add_(1, position, -(probability * scale[:, None]).to(shares.dtype))
        ctx.save_for_backward(gradient)
        return (loss * scale).sum()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        return ctx.saved_tensors[0] * outputs[0].to(ctx.saved_tensors[0].dtype), None, None, None


def batch_loss(head: FusedHead, data: DraftData, index: torch.Tensor, step_weights: tuple[float, ...]) -> torch.Tensor:
    loss = torch.zeros(())
    weight = torch.ones(len(index))
    in_16_bits = data.rows.final.dtype != torch.float32  # as the model is served
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_16_bits):
        state = data.enter(head, index)
    for number, step_weight in enumerate(step_weights):
        later, inside = data.follows(index, number)
        position, probability = data.targets(later)
        hidden, lookup = data.inputs(later)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_16_bits):
            scores, state = head(hidden, state, lookup)
        weight = weight * inside
        top = scores.detach().amax(-1)
        # torch leaves `apply` without a type.
        distilled: torch.Tensor = _Distillation.apply(scores, position, probability, weight)  # type: ignore[no-untyped-call]
        loss = loss + step_weight * distilled
        best = data.best(later)
        agrees = (scores.detach().gather(1, best.clamp(min=0)[:, None])[:, 0] >= top) & (best >= 0)
        weight = weight * torch.where(agrees, 1.0, DISAGREED_WEIGHT)
    return loss


def working_copy(head: FusedHead, dtype: torch.dtype) -> FusedHead:
    """The head as it is served: in the base model's dtype."""
    import copy

    return copy.deepcopy(head).requires_grad_(False).eval().to(dtype)


def train_head(
    rows: Rows,
    base: BaseParts,
    vocabulary: torch.Tensor,
    settings: TrainSettings,
    *,
    initial: dict[str, torch.Tensor] | None = None,
    checkpoint: Path | None = None,
    on_progress: Callable[[float, dict[str, float]], None] = lambda done, facts: None,
    release: Callable[[], None] = lambda: None,
    left_s: Callable[[], float] = lambda: math.inf,
) -> tuple[FusedHead, HeadRecord]:
    """Train until `epochs` or the time budget is used up; the learning rate follows whichever ends first.

    left_s: of the time budget, for all that takes time beside steps: loading, saves, starts again, what a kill lost.

    Returns the state that was best on validation rows, and the training record. `initial` weights, of another depth's
    head, save a good part of the way: only what reads the hidden state differs. With `checkpoint` the training goes on
    from that file after an interruption; time spent before counts. `release` gives memory of mapped rows back.
    """
    run = _Training(rows, base, vocabulary, settings, left_s)
    if initial is not None:
        run.head.load_state_dict({name: value.float() for name, value in initial.items()}, strict=False)
    if checkpoint is not None and checkpoint.is_file():
        run.restore(checkpoint)
    saved_at = time.monotonic()
    while run.evaluation_is_due or not run.finished:
        if run.evaluation_is_due:
            run.evaluate()
        else:
            run.step()
        on_progress(run.done_frac, run.facts())
        if run.steps % RELEASE_EVERY == 0:
            release()
        if checkpoint is not None and time.monotonic() - saved_at > run.keep_after_s:
            run.save(checkpoint)
            saved_at = time.monotonic()
    if checkpoint is not None:
        run.save(checkpoint)
    return run.best_head(), run.record()


def seconds_of_trained_row(
    base: BaseParts, vocabulary: torch.Tensor, settings: TrainSettings, dtype: torch.dtype
) -> float:
    """That a training takes for a row and epoch, by rows in `dtype` that mean nothing."""
    hidden_size, depths = base.norm.shape[0], {settings.depth, *settings.aux_layers} - {0}
    rows = meaningless_rows(TIMED_ROWS, hidden_size, depths, dtype)
    run = _Training(rows, base, vocabulary, replace(settings, batch_rows=TIMED_ROWS), lambda: math.inf)
    spent_s = []
    for _ in range(TIMED_STEPS):
        before_s = run.spent_s
        run.step()
        spent_s.append(run.spent_s - before_s)
    return min(spent_s) / TIMED_ROWS


class _Training:
    def __init__(
        self,
        rows: Rows,
        base: BaseParts,
        vocabulary: torch.Tensor,
        settings: TrainSettings,
        left_s: Callable[[], float],
    ) -> None:
        self.settings, self.left_s = settings, left_s
        self.dtype = rows.final.dtype
        self.data = DraftData(rows, base, depth=settings.depth, aux_layers=settings.aux_layers, vocabulary=vocabulary)
        self.generator = torch.Generator().manual_seed(settings.seed)
        torch.manual_seed(settings.seed)
        self.head = new_head(base, vocabulary, settings)
        self.trained = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
        )
        self.index = starts(rows, split=TRAIN)
        self.validation = starts(rows, split=VALIDATION)
        self.num_evaluated: int | None = None  # rows of an evaluation, at most; known by the first one
        self.evaluate_s = self.save_s = 0.0  # the last one
        self.evaluated_at = -1  # steps
        self.total = max(1, int(settings.epochs * len(self.index) / settings.batch_rows))
        self.order = torch.randperm(len(self.index), generator=self.generator)
        self.offset = self.steps = 0
        self.spent_s = self.longest_step_s = 0.0
        self.next_evaluation = EVALUATE_EVERY
        self.recent_loss = math.nan
        self.best_score = -1.0
        self.best: dict[str, torch.Tensor] = {}

    @property
    def done_frac(self) -> float:
        closing_s = CLOSING * self.evaluate_s + self.save_s
        return max(self.steps / self.total, (self.used_s + closing_s) / self.settings.time_budget_s)

    @property
    def used_s(self) -> float:
        """Of the time budget."""
        left_s = self.left_s()
        return self.spent_s if math.isinf(left_s) else max(self.spent_s, self.settings.time_budget_s - left_s)

    @property
    def finished(self) -> bool:
        """A late one has a step, too."""
        return self.steps > 0 and self.done_frac >= 1.0

    @property
    def evaluation_is_due(self) -> bool:
        is_new = self.steps > 0 and self.evaluated_at != self.steps
        return is_new and self.done_frac >= min(1.0, self.next_evaluation)

    @property
    def keep_after_s(self) -> float:
        """How old the last checkpoint may be when the next step begins."""
        return min(CHECKPOINT_EVERY_S, KEPT_WITHIN_S - self.next_s - self.save_s)

    @property
    def next_s(self) -> float:
        """What the next step or evaluation may take; nobody knows it of the first evaluation."""
        return (self.evaluate_s or math.inf) if self.evaluation_is_due else self.longest_step_s

    def step(self) -> None:
        began = time.monotonic()
        settings, done = self.settings, self.done_frac
        fall = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (self.steps + 1) / WARM_UP_STEPS) * fall
        if self.offset >= len(self.order):
            self.order, self.offset = torch.randperm(len(self.index), generator=self.generator), 0
        chosen = self.index[self.order[self.offset : self.offset + settings.batch_rows]]
        self.offset += settings.batch_rows
        loss = batch_loss(self.head, self.data, chosen, settings.step_weights)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        value = loss.item()
        self.recent_loss = value if math.isnan(self.recent_loss) else 0.98 * self.recent_loss + 0.02 * value
        self.steps += 1
        step_s = time.monotonic() - began
        self.spent_s += step_s
        self.longest_step_s = max(self.longest_step_s, step_s)

    def evaluate(self) -> None:
        """Keep the head if it is the best so far on validation rows."""
        began = time.monotonic()
        score, head = self.best_score, working_copy(self.head, self.dtype)
        if len(self.validation):
            if self.num_evaluated is None:
                self.num_evaluated = self._affordable_rows(head)
            score = accepted_per_step(measure_head(head, self.data, thinned(self.validation, self.num_evaluated)))
        self.evaluated_at = self.steps
        self.evaluate_s = time.monotonic() - began
        self.spent_s += self.evaluate_s
        share = self.evaluate_s / EVALUATIONS_SHARE / self.settings.time_budget_s
        self.next_evaluation = max(self.next_evaluation + EVALUATE_EVERY, self.done_frac + share)
        if score >= self.best_score:
            self.best_score = score
            self.best = {
                name: value.detach().clone() for name, value in self.head.state_dict().items() if name != "head"
            }

    def _affordable_rows(self, head: FusedHead) -> int:
        """Of an evaluation: as many as its share of the time is enough for, by the faster of two tries."""
        if math.isinf(self.settings.time_budget_s):
            return MAX_EVALUATED_ROWS
        spent = []
        for _ in range(2):
            began = time.monotonic()
            measure_head(head, self.data, self.validation[:PROBED_ROWS])
            spent.append(time.monotonic() - began)
        most = EVALUATION_SHARE * self.settings.time_budget_s / max(1e-9, min(spent)) * PROBED_ROWS
        return int(min(MAX_EVALUATED_ROWS, max(MIN_EVALUATED_ROWS, most)))

    def facts(self) -> dict[str, float]:
        return {
            "steps": self.steps,
            "steps_per_s": self.steps / max(1e-9, self.spent_s),
            "loss": self.recent_loss,
            "accepted_per_step": self.best_score,
        }

    def best_head(self) -> FusedHead:
        self.head.load_state_dict(self.best, strict=False)
        return working_copy(self.head, self.dtype)

    def record(self) -> HeadRecord:
        return {
            "rows": len(self.index),
            "steps": self.steps,
            "seconds": round(self.spent_s),
            "validation_accepted_per_step": round(self.best_score, 4),
            "evaluated_rows": len(thinned(self.validation, self.num_evaluated)) if self.num_evaluated else None,
            "evaluate_s": round(self.evaluate_s, 3),
        }

    PLAIN = ("offset", "steps", "spent_s", "next_evaluation", "recent_loss", "best_score")
    TIMED = ("num_evaluated", "evaluate_s", "evaluated_at", "save_s")  # not in checkpoints of before

    def save(self, path: Path) -> None:
        """Atomically: a kill leaves the last checkpoint."""
        began = time.monotonic()
        state = {name: getattr(self, name) for name in (*self.PLAIN, *self.TIMED)}
        state |= {
            "head": {name: value for name, value in self.head.state_dict().items() if name != "head"},
            "optimizer": self.optimizer.state_dict(),
            "order": self.order,
            "generator": self.generator.get_state(),
            "dropout_generator": torch.get_rng_state(),
            "best": self.best,
        }
        save_state(state, path)
        self.save_s = time.monotonic() - began
        self.spent_s += self.save_s

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in self.PLAIN:
            setattr(self, name, state[name])
        for name in self.TIMED:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.head.load_state_dict(state["head"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.order, self.best = state["order"], state["best"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["dropout_generator"])
