"""What ramps are trained and measured on: one row per answer token, kept in one file per finished group.

Row r of a conversation stands for the token before answer token r: row 0 is the prompt's last token. The *lead* row
before it is there for its full-depth state only.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from apparate_llm.files import replacing
from apparate_llm.ramps.copying import copies

TOP = 16  # best next tokens of the full model kept per row
LEAD = -1  # `answer_index` of a lead row
HELD_OUT_EVERY = 20  # one conversation in this many is held out


class Rows(NamedTuple):
    """N rows of one or more conversations, H hidden size."""

    tokens: torch.Tensor  # [N] int32, the row's own token: the newest one when its ramp runs
    conversations: torch.Tensor  # [N] int32
    held_out: torch.Tensor  # [N] bool, never trained on
    answer_index: torch.Tensor  # [N] int32, 0, 1, ... or LEAD
    states: dict[int, torch.Tensor]  # depth -> [N, H] residual stream after that many blocks
    final: torch.Tensor  # [N, H] full-depth hidden state after the final norm
    copied: torch.Tensor  # [N] int32, what followed the longest recent match, see ramps/copying.py
    copy_lengths: torch.Tensor  # [N] int8, tokens that match; 0: none, `copied` means nothing
    top_ids: torch.Tensor  # [N, TOP] int32, the full model's best next tokens; undefined in lead rows
    top_logprobs: torch.Tensor  # [N, TOP] float16


class Conversation(NamedTuple):
    prompt: list[int]
    answer: list[int]
    states: dict[int, torch.Tensor]  # depth -> [A + 1, H], the lead row first
    final: torch.Tensor  # [A + 1, H]
    top_ids: torch.Tensor  # [A + 1, TOP]
    top_logprobs: torch.Tensor  # [A + 1, TOP]


def rows_of(conversations: list[Conversation]) -> Rows:
    parts = [_rows_of_one(number, conversation) for number, conversation in enumerate(conversations)]
    return join(parts)


def _rows_of_one(number: int, conversation: Conversation) -> Rows:
    num_answer = len(conversation.answer)
    context = np.array(conversation.prompt + conversation.answer, dtype=np.int32)
    first = len(conversation.prompt) - 2
    copied, lengths = copies(context)
    keep = slice(first, first + num_answer + 1)
    return Rows(
        tokens=torch.from_numpy(context[keep].copy()),
        conversations=torch.full((num_answer + 1,), number, dtype=torch.int32),
        held_out=torch.full((num_answer + 1,), is_held_out(number)),
        answer_index=torch.arange(LEAD, num_answer, dtype=torch.int32),
        states=conversation.states,
        final=conversation.final,
        copied=torch.from_numpy(copied[keep].copy()),
        copy_lengths=torch.from_numpy(lengths[keep].copy()),
        top_ids=conversation.top_ids.int(),
        top_logprobs=conversation.top_logprobs.half(),
    )


def is_held_out(number: int) -> bool:
    """`number` of the conversation within its group."""
    return number % HELD_OUT_EVERY == 0


def join(parts: list[Rows]) -> Rows:
    """Rows of one group from the rows of its conversations, in order."""

    def cat(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    fields = {name: cat(name) for name in Rows._fields if name != "states"}
    states = {depth: torch.cat([part.states[depth] for part in parts]) for depth in parts[0].states}
    return Rows(**fields, states=states)


def bytes_per_row(hidden_size: int, num_states: int, element_size: int) -> int:
    """Of one row on disk and in memory; `num_states` without the final one."""
    return (num_states + 1) * hidden_size * element_size + TOP * (4 + 2) + 4 * 4 + 2


def save_rows(path: Path, rows: Rows, texts: dict[str, torch.Tensor]) -> None:
    """Write atomically: the file is complete or not there. `texts` are further tensors kept beside the rows."""
    from safetensors.torch import save_file

    tensors = {name: value for name, value in rows._asdict().items() if name != "states"}
    tensors |= {f"states.{depth}": value for depth, value in rows.states.items()} | texts
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)


def load_rows(paths: list[Path], *, depths: tuple[int, ...]) -> Rows:
    """The rows of several files with the states at `depths` only; conversations are numbered on from file to file.

    Every tensor is allocated once and filled: the peak is one file more than the result.
    """
    from safetensors import safe_open

    names = [name for name in Rows._fields if name != "states"] + [f"states.{depth}" for depth in depths]
    lengths = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            lengths.append(file.get_slice("tokens").get_shape()[0])
    tensors: dict[str, torch.Tensor] = {}
    start = next_conversation = 0
    for path, length in zip(paths, lengths, strict=True):
        with safe_open(path, framework="pt") as file:
            for name in names:
                part = file.get_tensor(name)
                if name not in tensors:
                    tensors[name] = torch.empty((sum(lengths), *part.shape[1:]), dtype=part.dtype)
                if name == "conversations":
                    part += next_conversation
                    next_conversation = int(part[-1]) + 1
                tensors[name][start : start + length] = part
        start += length
    states = {depth: tensors.pop(f"states.{depth}") for depth in depths}
    return Rows(**tensors, states=states)
