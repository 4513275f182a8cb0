"""Stage 2 of ramp preparation: what the full model computes on its own text.

One row per token position i of a conversation: the token itself, the full-depth hidden state (after the final norm),
the hidden states at the wanted depths, and the full model's `TOP` best next tokens with their log-probabilities.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

TOP = 16


class Rows(NamedTuple):
    """Rows of all conversations one after another; N rows, H hidden size."""

    tokens: torch.Tensor  # [N] int32
    documents: torch.Tensor  # [N] int32, conversation the row belongs to
    is_answer: torch.Tensor  # [N] bool, whether the *next* token was written by the model as an answer
    final: torch.Tensor  # [N, H] full-depth hidden state after the final norm
    hidden: dict[int, torch.Tensor]  # depth -> [N, H] residual stream after that many blocks; depth 0 is left out
    top_ids: torch.Tensor  # [N, TOP] int32
    top_logprobs: torch.Tensor  # [N, TOP] float16


@torch.inference_mode()
def collect(
    model, path: Path, *, depths: tuple[int, ...], skip_prefix: int, max_rows: int, batch_tokens: int = 4096
) -> Rows:
    """Run `model` (a transformers causal LM) over the conversations in `path`, shortest batches last.

    `skip_prefix` leading tokens of each conversation (the constant system prompt) give no rows.
    """
    from tqdm import tqdm

    conversations = []
    total = 0
    for line in path.read_text().splitlines():
        record = json.loads(line)
        ids = record["prompt"] + record["answer"]
        if len(record["answer"]) >= 4:
            conversations.append((ids, len(record["prompt"])))
            total += len(ids) - skip_prefix
        if total >= max_rows:
            break
    order = sorted(range(len(conversations)), key=lambda index: -len(conversations[index][0]))
    parts: list[Rows] = []
    with tqdm(total=total, unit="row", desc="collect") as bar:
        while order:
            longest = len(conversations[order[0]][0])
            take, order = order[: max(1, batch_tokens // longest)], order[max(1, batch_tokens // longest) :]
            ids = torch.zeros(len(take), longest, dtype=torch.int64)
            for row, index in enumerate(take):
                ids[row, : len(conversations[index][0])] = torch.tensor(conversations[index][0])
            # Right padding and causal attention: padded positions cannot reach the rows kept below.
            out = model.model(ids, output_hidden_states=True, use_cache=False)
            for row, index in enumerate(take):
                length, prompt_length = len(conversations[index][0]), conversations[index][1]
                keep = slice(skip_prefix, length)
                final = out.last_hidden_state[row, keep]
                top = model.lm_head(final).float().log_softmax(-1).topk(TOP, dim=-1)
                position = torch.arange(skip_prefix, length)
                parts.append(
                    Rows(
                        tokens=ids[row, keep].int(),
                        documents=torch.full((length - skip_prefix,), index, dtype=torch.int32),
                        is_answer=position >= prompt_length - 1,
                        final=final.clone(),
                        hidden={k: out.hidden_states[k][row, keep].clone() for k in depths if k > 0},
                        top_ids=top.indices.int(),
                        top_logprobs=top.values.half(),
                    )
                )
                bar.update(length - skip_prefix)
    return _concatenate(parts)


def _concatenate(parts: list[Rows]) -> Rows:
    def join(name):
        return torch.cat([getattr(part, name) for part in parts])

    return Rows(
        tokens=join("tokens"),
        documents=join("documents"),
        is_answer=join("is_answer"),
        final=join("final"),
        hidden={k: torch.cat([part.hidden[k] for part in parts]) for k in parts[0].hidden},
        top_ids=join("top_ids"),
        top_logprobs=join("top_logprobs"),
    )
