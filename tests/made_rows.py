"""Rows that a small head can learn, and a machine on which that takes as long as told."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from apparate_llm.prepare import train, train_stage
from apparate_llm.prepare.acceptance import Measured, measure_head
from apparate_llm.prepare.draft_data import BaseParts
from apparate_llm.prepare.rows import TOP, Conversation
from apparate_llm.prepare.splits import split_of
from apparate_llm.prepare.train import TrainSettings
from apparate_llm.prepare.workspace import save_state
from tests.preparation import Clock

VOCAB, HIDDEN = 50, 16
NUMBER = 200


def base_parts() -> BaseParts:
    torch.manual_seed(0)
    return BaseParts(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.ones(HIDDEN), 1e-5)


def made_conversations(base: BaseParts) -> list[Conversation]:
    generator = torch.Generator().manual_seed(1)
    return [_conversation(base, generator)._replace(split=split_of(number, "0")) for number in range(NUMBER)]


def _conversation(base: BaseParts, generator: torch.Generator) -> Conversation:
    """The next token is a function of the last two: the final state holds the older, the embedding the newer one."""
    tokens = torch.randint(0, VOCAB, (2,), generator=generator).tolist()
    while len(tokens) < 24:
        tokens.append((3 * tokens[-1] + 5 * tokens[-2] + 7) % VOCAB)
    prompt, answer = tokens[:6], tokens[6:]
    states = torch.stack([base.embedding[token] for token in tokens[4:-1]])
    best = torch.tensor([0, *answer])
    others = torch.arange(1, TOP)
    top_ids = (best[:, None] + torch.cat([torch.zeros(1), others])) % VOCAB
    probability = torch.full((len(best), TOP), 0.1 / (TOP - 1))
    probability[:, 0] = 0.9
    return Conversation(prompt, answer, {2: states + 1}, states, top_ids, probability.log())


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"depth": 0, "intermediate_size": 32, "batch_rows": 256, "epochs": 30.0, **changes})


class Slow(Clock):
    """A machine on which a training's steps, evaluations and saves take as long as told; `time` for its modules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, step_s: float, row_s: float, save_s: float = 0.0) -> None:
        self.now, self.evaluations, self.saves = 0.0, list[int](), list[float]()
        loss = train.batch_loss

        def slow_loss(*args: Any) -> torch.Tensor:
            self.now += step_s
            return loss(*args)

        def slow_measure(head: Any, data: Any, index: torch.Tensor, **others: Any) -> Sequence[Measured]:
            self.now += row_s * len(index)
            self.evaluations.append(len(index))
            return measure_head(head, data, index, **others)

        def slow_save(state: Any, path: Path) -> None:
            self.now += save_s
            self.saves.append(self.now)
            save_state(state, path)

        monkeypatch.setattr(train, "time", self)
        monkeypatch.setattr(train, "batch_loss", slow_loss)
        monkeypatch.setattr(train, "save_state", slow_save)
        for module in (train, train_stage):
            monkeypatch.setattr(module, "measure_head", slow_measure)
