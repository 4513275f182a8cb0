"""What ramps are trained and measured on: one row per answer token.

Row r of a conversation stands for the token before answer token r: row 0 is the prompt's last token. The *lead* row
before it is there for its full-depth state only.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from apparate_llm.ramps.lookup import lookup_features

TOP = 16  # best next tokens of the full model kept per row
LEAD = -1  # `answer_index` of a lead row
TRAIN, VALIDATION, TEST = range(3)  # splits: to train on, to choose and calibrate with, to report from
SPLIT_NAMES = ("training", "validation", "test")


class Rows(NamedTuple):
    """N rows of one or more conversations, H hidden size."""

    tokens: torch.Tensor  # [N] int32, the row's own token: the newest one when its ramp runs
    conversations: torch.Tensor  # [N] int32
    split: torch.Tensor  # [N] int8
    answer_index: torch.Tensor  # [N] int32, 0, 1, ... or LEAD
    states: dict[int, torch.Tensor]  # depth -> [N, H] residual stream after that many blocks
    final: torch.Tensor  # [N, H] full-depth hidden state after the final norm
    lookup_tokens: torch.Tensor  # [N] int32, of the lookup feature, see ramps/lookup.py
    lookup_lengths: torch.Tensor  # [N] int8, of their n-grams; 0: none, and the token means nothing
    top_ids: torch.Tensor  # [N, TOP] int32, the full model's best next tokens; undefined in lead rows
    top_logprobs: torch.Tensor  # [N, TOP] float16


class Conversation(NamedTuple):
    """A prompt and its answer of A tokens, with what the model computed for them."""

    prompt: list[int]
    answer: list[int]
    states: dict[int, torch.Tensor]  # depth -> [A + 1, H], the lead row first
    final: torch.Tensor  # [A + 1, H]
    top_ids: torch.Tensor  # [A + 1, TOP]
    top_logprobs: torch.Tensor  # [A + 1, TOP]
    split: int = TEST
    kind: int = 0  # of its prompt


def rows_of(conversations: list[Conversation], *, first_number: int = 0) -> Rows:
    """Rows of the conversations in their order, which are numbered from `first_number` on."""
    parts = [_rows_of_one(number, conversation) for number, conversation in enumerate(conversations, first_number)]

    def cat(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    fields = {name: cat(name) for name in Rows._fields if name != "states"}
    states = {depth: torch.cat([part.states[depth] for part in parts]) for depth in parts[0].states}
    return Rows(**fields, states=states)


def _rows_of_one(number: int, conversation: Conversation) -> Rows:
    num_answer = len(conversation.answer)
    context = np.array(conversation.prompt + conversation.answer, dtype=np.int32)
    first = len(conversation.prompt) - 2
    proposed, lengths = lookup_features(context)
    keep = slice(first, first + num_answer + 1)
    return Rows(
        tokens=torch.from_numpy(context[keep].copy()),
        conversations=torch.full((num_answer + 1,), number, dtype=torch.int32),
        split=torch.full((num_answer + 1,), conversation.split, dtype=torch.int8),
        answer_index=torch.arange(LEAD, num_answer, dtype=torch.int32),
        states=conversation.states,
        final=conversation.final,
        lookup_tokens=torch.from_numpy(proposed[keep].copy()),
        lookup_lengths=torch.from_numpy(lengths[keep].copy()),
        top_ids=conversation.top_ids.int(),
        top_logprobs=conversation.top_logprobs.half(),
    )


def meaningless_rows(number: int, hidden_size: int, depths: Iterable[int], dtype: torch.dtype) -> Rows:
    """Rows to train on, and a lead row before them, of one conversation."""
    size = number + 1
    states = {depth: torch.randn(size, hidden_size).to(dtype) for depth in depths}
    return Rows(
        tokens=torch.zeros(size, dtype=torch.int32),
        conversations=torch.zeros(size, dtype=torch.int32),
        split=torch.full((size,), TRAIN, dtype=torch.int8),
        answer_index=torch.arange(LEAD, number, dtype=torch.int32),
        states=states,
        final=torch.randn(size, hidden_size).to(dtype),
        lookup_tokens=torch.zeros(size, dtype=torch.int32),
        lookup_lengths=torch.zeros(size, dtype=torch.int8),
        top_ids=torch.arange(TOP, dtype=torch.int32).expand(size, TOP),
        top_logprobs=torch.full((size, TOP), -1.0, dtype=torch.float16),
    )


def bytes_per_row(hidden_size: int, num_states: int, element_size: int) -> int:
    """Of one row on disk; `num_states` without the final one."""
    return (num_states + 1) * hidden_size * element_size + TOP * (4 + 2) + 3 * 4 + 4 + 2
