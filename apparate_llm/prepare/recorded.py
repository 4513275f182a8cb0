"""Conversations of the model with what a ramp said at each of their tokens: what a prediction is made from."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from apparate_llm.prepare.acceptance import Measured
from apparate_llm.prepare.rows import Rows
from apparate_llm.ramps.load import calibrated_all
from apparate_llm.ramps.lookup import MIN_LOOKUP_LENGTH, look_up

Tensors = Mapping[str, torch.Tensor]
Texts = Mapping[int, tuple[list[int], list[int]]]  # conversation -> prompt, answer in token ids


class Proposal(NamedTuple):
    """One draft step in one row."""

    confidence: float  # calibrated
    agrees: bool


@dataclass(frozen=True, slots=True)
class Recorded:
    """One conversation. Row i is where token i of the answer is proposed."""

    kind: str
    prompt_tokens: int
    positions: tuple[tuple[Proposal, ...], ...]  # [num_positions][rows]
    lookup_lengths: tuple[int, ...] = ()  # [rows] tokens repeated, where enough for prompt lookup; else 0
    lookups_right: tuple[int, ...] = ()  # [rows] tokens from there on that it gets right

    @property
    def num_tokens(self) -> int:
        return len(self.positions[0])

    @property
    def acceptance_rate(self) -> float:
        """At position 0."""
        return sum(proposal.agrees for proposal in self.positions[0]) / self.num_tokens

    def proposal(self, row: int, number: int) -> Proposal:
        """Draft step `number` (from 0) in a row; later ones than were recorded are like the last."""
        return self.positions[min(number, len(self.positions) - 1)][min(row, self.num_tokens - 1)]


def measured_tensors(measured: Sequence[Measured], rows: Rows, kinds: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `recorded` and the calibration read, per position N from 0: `N.confidence`, `N.agrees`, `N.conversation`,
    `N.kind` and `N.row`, the row's place in its answer. kinds: [number of conversations] index of each one's kind."""
    tensors: dict[str, torch.Tensor] = {}
    for number, part in enumerate(measured):
        conversations = rows.conversations[part.rows]
        tensors |= {
            f"{number}.confidence": part.confidence,
            f"{number}.agrees": part.agrees,
            f"{number}.conversation": conversations,
            f"{number}.kind": kinds[conversations.long()],
            f"{number}.row": rows.answer_index[part.rows],
        }
    return tensors


def num_positions(tensors: Tensors) -> int:
    return sum(name.endswith(".confidence") for name in tensors)


def recorded(
    tensors: Tensors, calibration: Sequence[tuple[float, float]], kinds: Sequence[str], texts: Texts
) -> list[Recorded]:
    """The conversations that a ramp was measured on. tensors: see `measured_tensors`; calibration: of each
    position; texts: of these conversations at least.

    Where a draft step did not run in a row, as one before it disagreed, it is taken to say what the one before it says
    there. Where even the first did not, as only some rows were measured, the next row that was stands for it.
    """
    proposals = [_proposals(tensors, number, calibration) for number in range(num_positions(tensors))]
    by_conversation: dict[int, list[dict[int, Proposal]]] = {}
    for number, of_position in enumerate(proposals):
        owners, rows = tensors[f"{number}.conversation"].tolist(), tensors[f"{number}.row"].tolist()
        for owner, row, one in zip(owners, rows, of_position, strict=True):
            by_conversation.setdefault(owner, [{} for _ in proposals])[number][row] = one
    kind_of = dict(zip(tensors["0.conversation"].tolist(), tensors["0.kind"].tolist(), strict=True))
    return [
        _conversation(by_position, kinds[kind_of[owner]], *texts[owner])
        for owner, by_position in by_conversation.items()
        if by_position[0]
    ]


def _conversation(by_position: list[dict[int, Proposal]], kind: str, prompt: list[int], answer: list[int]) -> Recorded:
    known = sorted(by_position[0])
    positions = [[by_position[0][known[min(bisect_left(known, row), len(known) - 1)]] for row in range(len(answer))]]
    for later in by_position[1:]:
        before = positions[-1]
        positions.append([later.get(row, before[row]) for row in range(len(answer))])
    return Recorded(kind, len(prompt), tuple(map(tuple, positions)), *lookups_of(prompt, answer))


def _proposals(tensors: Tensors, number: int, calibration: Sequence[tuple[float, float]]) -> list[Proposal]:
    confidence = calibrated_all(tensors[f"{number}.confidence"], *calibration[min(number, len(calibration) - 1)])
    return [Proposal(*pair) for pair in zip(confidence.tolist(), tensors[f"{number}.agrees"].tolist(), strict=True)]


def lookups_of(prompt: Sequence[int], answer: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`lookup_lengths` and `lookups_right` of a conversation: where its text repeats itself at length, a server asks no
    ramp."""
    text = np.array([*prompt, *answer], dtype=np.int64)
    lengths, numbers_right = [], []
    for place in range(len(prompt), len(text)):
        lookup = look_up(text[:place])
        lengths.append(lookup.length)
        right = 0
        if lookup.length >= MIN_LOOKUP_LENGTH:
            while place + right < len(text) and text[place + right] == text[lookup.start + right]:
                right += 1
        numbers_right.append(right)
    return tuple(lengths), tuple(numbers_right)
