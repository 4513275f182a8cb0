"""Stage train: one fused head per depth on the collected rows.

Loss per draft step: cross entropy against the full model's best tokens (distillation, within the ramp vocabulary).
Draft steps after the first run on the head's own output state, as they do when serving; a row where an earlier one
disagreed counts little there, since serving would have stopped.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from apparate_llm.files import replacing
from apparate_llm.prepare.records import HeadRecord
from apparate_llm.prepare.rows import LEAD, TRAIN, VALIDATION, Rows
from apparate_llm.ramps.checkpoint import HeadShape
from apparate_llm.ramps.heads import FusedHead, Head, LookupFeature

NUM_POSITIONS = 4  # of exits in an engine step that are measured and calibrated
DISAGREED_WEIGHT = 0.2  # of a row after a draft step that disagreed with the full model
FINAL_LEARNING_RATE = 0.02  # of the highest one
WARM_UP_STEPS = 100
BATCH_ROWS = 1024
CHECKPOINT_EVERY_S = 60.0
EVALUATE_EVERY = 0.1  # of the training
MAX_EVALUATED_ROWS = 12_000
RELEASE_EVERY = 4  # steps, after which mapped rows are given back
VOCABULARY_CHUNK = 1 << 18  # rows looked at together


class BaseParts(NamedTuple):
    """What training needs of the frozen base model."""

    embedding: torch.Tensor  # [vocab, H]
    lm_head: torch.Tensor  # [vocab, H]
    norm: torch.Tensor  # [H] final norm weight
    eps: float

    @classmethod
    def of(cls, model_dir: Path) -> "BaseParts":
        """Read the parts from a model folder."""
        from apparate_llm.ramps.base_weights import BaseWeights

        weights = BaseWeights.of(model_dir)
        config = json.loads((model_dir / "config.json").read_text())
        return cls(weights.embedding(), weights.head(), weights.norm, config["rms_norm_eps"])


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


def ramp_vocabulary(rows: Rows, size: int) -> torch.Tensor:
    """The `size` tokens with the most probability under the full model in training rows, sorted by id."""
    wanted = torch.zeros(0, dtype=torch.float64)
    for index in starts(rows, split=TRAIN).split(VOCABULARY_CHUNK):
        tokens, probabilities = rows.top_ids[index].long().flatten(), rows.top_logprobs[index].double().exp().flatten()
        counted = torch.bincount(tokens, weights=probabilities, minlength=len(wanted))
        counted[: len(wanted)] += wanted
        wanted = counted
    return wanted.topk(min(size, len(wanted))).indices.sort().values


def starts(rows: Rows, *, split: int) -> torch.Tensor:
    """Rows in which a first draft step can run: those of answers."""
    return torch.nonzero((rows.answer_index > LEAD) & (rows.split == split))[:, 0]


def thinned(index: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows, evenly spread."""
    return index[:: max(1, math.ceil(len(index) / most))]


class DraftData:
    """Gathers one batch's inputs and targets from the rows."""

    def __init__(
        self, rows: Rows, base: BaseParts, *, depth: int, aux_layers: tuple[int, ...], vocabulary: torch.Tensor
    ) -> None:
        self.rows, self.depth, self.aux_layers = rows, depth, aux_layers
        self.embedding = base.embedding.to(rows.final.dtype)
        self.position = torch.full((base.lm_head.shape[0],), -1, dtype=torch.int64)
        self.position[vocabulary] = torch.arange(len(vocabulary))
        self.vocabulary_size = len(vocabulary)

    def enter(self, head: Head, index: torch.Tensor) -> torch.Tensor:
        """State of the first draft step in the rows `index`: that of the token before."""
        before = index - 1
        aux = [self.rows.states[depth][before] for depth in self.aux_layers]
        return head.enter(self.rows.final[before], aux)

    def inputs(self, index: torch.Tensor) -> tuple[torch.Tensor, LookupFeature]:
        """Hidden states and the lookup feature of a draft step in the rows `index`."""
        rows, embedding = self.rows, self.embedding
        if self.depth == 0:
            hidden = F.embedding(rows.tokens[index].long(), embedding)
        else:
            hidden = rows.states[self.depth][index]
        tokens, lengths = rows.lookup_tokens[index].long(), rows.lookup_lengths[index].long()
        outside = (lengths > 0) & (self.position[tokens] < 0)
        return hidden, LookupFeature(F.embedding(tokens, embedding), lengths, outside)

    def follows(self, index: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `number` places on, and whether those are of the same conversation."""
        later = (index + number).clamp(max=len(self.rows.tokens) - 1)
        return later, self.rows.conversations[later] == self.rows.conversations[index]

    def columns(self, index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Column of the scores of the rows `index` that stands for each of `tokens` [B, n], -1 for none."""
        column = self.position[tokens]
        points = (self.rows.lookup_tokens[index][:, None] == tokens) & (self.rows.lookup_lengths[index] > 0)[:, None]
        return torch.where((column < 0) & points, self.vocabulary_size, column)

    def targets(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns [B, TOP] and probabilities [B, TOP] of the full model's best tokens, 0 where there is no column."""
        column = self.columns(index, self.rows.top_ids[index].long())
        return column.clamp(min=0), self.rows.top_logprobs[index].float().exp() * (column >= 0)

    def best(self, index: torch.Tensor) -> torch.Tensor:
        """Column [B] of the full model's best token, -1 where there is none."""
        return self.columns(index, self.rows.top_ids[index, :1].long())[:, 0]


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
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = data.enter(head, index)
    for number, step_weight in enumerate(step_weights):
        later, inside = data.follows(index, number)
        position, probability = data.targets(later)
        hidden, lookup = data.inputs(later)
        with torch.autocast("cpu", dtype=torch.bfloat16):
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


class Measured(NamedTuple):
    """One position on rows of one split; n rows in which all earlier draft steps agreed."""

    rows: torch.Tensor  # [n] index of the row the draft step ran in
    confidence: torch.Tensor  # [n] highest probability of the ramp
    agrees: torch.Tensor  # [n] bool, with the full model's best token


@torch.inference_mode()
def measure_head(
    head: Head, data: DraftData, index: torch.Tensor, *, num_positions: int = NUM_POSITIONS
) -> list[Measured]:
    """By position, draft steps starting at the rows `index`.

    A later one counts only where those before it agreed, as serving runs it only then.
    """
    parts: list[list[Measured]] = [[] for _ in range(num_positions)]
    for first in index.split(2048):
        alive = torch.ones(len(first), dtype=torch.bool)
        state = data.enter(head, first)
        for number in range(num_positions):
            later, inside = data.follows(first, number)
            alive &= inside
            hidden, lookup = data.inputs(later)
            scores, state = head(hidden, state, lookup)
            confidence, choice = scores.float().softmax(-1).max(-1)
            agrees = choice == data.best(later)
            parts[number].append(Measured(later[alive], confidence[alive], agrees[alive]))
            # The next draft step reads this one's token: where the text went another way there is no row for it.
            after, _ = data.follows(later, 1)
            alive &= agrees & (data.rows.tokens[after] == data.rows.top_ids[later, 0])
    return [Measured(*(torch.cat(field) for field in zip(*part, strict=True))) for part in parts]


def accepted_per_step(by_position: list[Measured]) -> float:
    """Expected accepted tokens per engine step, the mean acceptance length less one, if draft steps go on for as long
    as the ramp agrees."""
    expected, joint_acceptance = 0.0, 1.0
    for measured in by_position:
        joint_acceptance *= float(measured.agrees.float().mean()) if len(measured.agrees) else 0.0
        expected += joint_acceptance
    return expected


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
) -> tuple[FusedHead, HeadRecord]:
    """Train until `epochs` or the time budget is used up; the learning rate follows whichever ends first.

    Returns the state that was best on validation rows, and the training record. `initial` weights, of another depth's
    head, save a good part of the way: only what reads the hidden state differs. With `checkpoint` the training goes on
    from that file after an interruption; time spent before counts. `release` gives memory of mapped rows back.
    """
    run = _Training(rows, base, vocabulary, settings)
    if initial is not None:
        run.head.load_state_dict({name: value.float() for name, value in initial.items()}, strict=False)
    if checkpoint is not None and checkpoint.is_file():
        run.restore(checkpoint)
    saved_at = time.monotonic()
    while not run.finished:
        run.step()
        on_progress(run.done_frac, {"steps": run.steps, "loss": run.recent_loss, "accepted_per_step": run.best_score})
        if run.steps % RELEASE_EVERY == 0:
            release()
        if checkpoint is not None and time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
            run.save(checkpoint)
            saved_at = time.monotonic()
    run.evaluate()
    if checkpoint is not None:
        run.save(checkpoint)
    return run.best_head(), run.record()


class _Training:
    def __init__(self, rows: Rows, base: BaseParts, vocabulary: torch.Tensor, settings: TrainSettings) -> None:
        self.settings = settings
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
        self.validation = thinned(starts(rows, split=VALIDATION), MAX_EVALUATED_ROWS)
        self.total = max(1, int(settings.epochs * len(self.index) / settings.batch_rows))
        self.order = torch.randperm(len(self.index), generator=self.generator)
        self.offset = self.steps = 0
        self.spent_s = 0.0
        self.next_evaluation = EVALUATE_EVERY
        self.recent_loss = math.nan
        self.best_score = -1.0
        self.best: dict[str, torch.Tensor] = {}

    @property
    def done_frac(self) -> float:
        return max(self.steps / self.total, self.spent_s / self.settings.time_budget_s)

    @property
    def finished(self) -> bool:
        return self.done_frac >= 1.0

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
        if self.done_frac >= self.next_evaluation:
            self.evaluate()
            self.next_evaluation += EVALUATE_EVERY
        self.spent_s += time.monotonic() - began

    def evaluate(self) -> None:
        """Keep the head if it is the best so far on validation rows."""
        if not len(self.validation):
            score = self.best_score
        else:
            score = accepted_per_step(measure_head(working_copy(self.head, self.dtype), self.data, self.validation))
        if score >= self.best_score:
            self.best_score = score
            self.best = {
                name: value.detach().clone() for name, value in self.head.state_dict().items() if name != "head"
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
        }

    PLAIN = ("offset", "steps", "spent_s", "next_evaluation", "recent_loss", "best_score")

    def save(self, path: Path) -> None:
        """Atomically: a kill leaves the last checkpoint."""
        state = {name: getattr(self, name) for name in self.PLAIN}
        state |= {
            "head": {name: value for name, value in self.head.state_dict().items() if name != "head"},
            "optimizer": self.optimizer.state_dict(),
            "order": self.order,
            "generator": self.generator.get_state(),
            "dropout_generator": torch.get_rng_state(),
            "best": self.best,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.head.load_state_dict(state["head"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.order, self.best = state["order"], state["best"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["dropout_generator"])
