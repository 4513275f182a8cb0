"""Takes training rows out of vLLM while it generates, so that no second forward pass is needed.

Tokens that are not greedy are drawn here as well, among the best ones that are at hand: all requests are greedy to
vLLM, which else draws over the whole vocabulary for every request of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from apparate_llm.patches.overrides import check_those_of
from apparate_llm.prepare.engine import CACHE_BLOCK, runner_of
from apparate_llm.prepare.rows import TOP, Conversation

SEGMENT = 64
DRAWN_FROM = 64  # of the best tokens one is drawn
MOST_STEPS = 32  # kept whole before their rows go to their requests


@dataclass(slots=True)
class _Watched:
    """A request's rows so far: places in the kept steps, and what was taken out of earlier ones."""

    next_position: int
    places: list[tuple[int, int]] = field(default_factory=list)  # (step, row)
    parts: list[dict[int | str, torch.Tensor]] = field(default_factory=list)


class Capture:
    """Records what an in-process vLLM engine computes for the tokens of its answers.

    llm: a `vllm.LLM` with enforce_eager=True in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0). Where it caches
    prefixes, see `needs_last_rows`. depths: residual streams to keep; depth 0, the embedding, needs none.
    """

    def __init__(self, llm: Any, *, depths: tuple[int, ...]) -> None:
        check_those_of("prepare.capture", "models.")
        self.runner = runner_of(llm)
        model = self.runner.model
        num_layers = len(model.model.layers)
        if bad := [depth for depth in depths if not 0 < depth < num_layers]:
            raise ValueError(f"cannot record depth {bad[0]} (allowed: 1 to {num_layers - 1})")
        self.depths = depths
        self.keys: tuple[int | str, ...] = (*depths, "final", "top_ids", "top_logprobs")
        self._watched: dict[str, _Watched] = {}
        self._temperatures: dict[str, float] = {}  # of requests whose tokens are drawn
        self._seen: dict[int, torch.Tensor] = {}  # residual streams of the pass under way
        self._steps: list[dict[int | str, torch.Tensor]] = []
        self._top_rows: list[tuple[int, int]] = []  # (row of the logits, row of the step)
        self._drawn_rows: list[tuple[int, float]] = []  # (row of the logits, temperature)
        for depth in depths:
            model.model.layers[depth].register_forward_pre_hook(self._layer_hook(depth))
        self._forward, self.runner._model_forward = self.runner._model_forward, self._watched_forward
        self._compute_logits, model.compute_logits = model.compute_logits, self._watched_logits

    def watch(self, request_id: str, num_prompt: int) -> None:
        """Keep the rows of this request from the last but one of its prompt's `num_prompt` tokens on."""
        self._watched[request_id] = _Watched(next_position=num_prompt - 2)

    def draw(self, request_id: str, temperature: float) -> None:
        """Draw this request's tokens among the DRAWN_FROM best ones instead of taking the best."""
        self._temperatures[request_id] = temperature

    def forget(self, request_id: str) -> None:
        self._watched.pop(request_id, None)
        self._temperatures.pop(request_id, None)

    def _layer_hook(self, depth: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            _positions, hidden, residual = args[:3]
            self._seen[depth] = hidden if residual is None else hidden + residual

        return hook

    def _watched_forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        from apparate_llm.engine.batch import batch_of  # vLLM is imported with it

        out: torch.Tensor = self._forward(*args, **kwargs)
        if len(self._steps) >= MOST_STEPS:
            self._hand_out()
        batch = batch_of(self.runner)
        keep: list[int] = []
        self._top_rows, self._drawn_rows = [], []
        for index, given in enumerate(batch.request_ids):
            request_id = given.rpartition("-")[0]  # vLLM appends random characters to the caller's id
            if temperature := self._temperatures.get(request_id):
                self._drawn_rows.append((index, temperature))
            if (watched := self._watched.get(request_id)) is None:
                continue
            first, end = int(batch.first_rows[index]), int(batch.first_rows[index + 1])
            position = int(batch.num_computed_tokens[index])
            # A request that was preempted computes again what it has rows of: those are left out.
            skipped = max(0, watched.next_position - position)
            for row in range(first + skipped, end):
                watched.places.append((len(self._steps), len(keep)))
                keep.append(row)
            if first + skipped < end:
                watched.next_position = position + end - first
                self._top_rows.append((index, len(keep) - 1))
        rows = torch.tensor(keep, dtype=torch.int64)
        self._steps.append({"final": out[rows], **{depth: value[rows] for depth, value in self._seen.items()}})
        self._seen.clear()
        return out

    def _watched_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._compute_logits(hidden_states)
        step = self._steps[-1]
        ids = torch.zeros(len(step["final"]), TOP, dtype=torch.int32)
        logprobs = torch.zeros(len(step["final"]), TOP, dtype=torch.float16)
        if self._top_rows:
            wanted, rows = (torch.tensor(part) for part in zip(*self._top_rows, strict=True))
            values, best = top_tokens(logits[wanted], TOP)
            ids[rows], logprobs[rows] = best.int(), values.half()
        if self._drawn_rows:
            drawn_rows, temperatures = (torch.tensor(part) for part in zip(*self._drawn_rows, strict=True))
            values, best = top_tokens(logits[drawn_rows], DRAWN_FROM)
            # The greatest of log-probabilities with Gumbel noise is a sample (Gumbel 1954; Maddison et al., NeurIPS
            # 2014).
            noise = -torch.empty_like(values).exponential_().log()
            chosen = (values / temperatures[:, None] + noise).argmax(-1, keepdim=True)
            logits[drawn_rows, best.gather(1, chosen)[:, 0]] = torch.finfo(logits.dtype).max
        step["top_ids"], step["top_logprobs"] = ids, logprobs
        return logits

    def _hand_out(self) -> None:
        """Move the rows of the kept steps to the requests they belong to."""
        for watched in self._watched.values():
            if watched.places:
                watched.parts.append(
                    {
                        key: torch.stack([self._steps[step][key][row] for step, row in watched.places])
                        for key in self.keys
                    }
                )
                watched.places = []
        self._steps.clear()

    def rows_so_far(self, request_id: str) -> dict[int | str, torch.Tensor]:
        """Name or depth -> the rows that a request has; it goes on."""
        self._hand_out()
        watched = self._watched[request_id]
        if not watched.parts:
            return {}
        watched.parts = [{key: torch.cat([part[key] for part in watched.parts]) for key in watched.parts[0]}]
        return watched.parts[0]

    def take(self, request_id: str, prompt: list[int], answer: list[int]) -> Conversation:
        """The rows of a finished request. vLLM's last sampled token has none: nothing came after it."""
        rows = self.rows_so_far(request_id)
        self.forget(request_id)
        return conversation_of(prompt, answer, rows)


def conversation_of(prompt: list[int], answer: list[int], rows: dict[int | str, torch.Tensor]) -> Conversation:
    """`rows`: at least one for each token of the answer, and the lead row."""
    kept = {key: value[: len(answer) + 1] for key, value in rows.items()}
    return Conversation(
        prompt=prompt,
        answer=answer,
        states={key: value for key, value in kept.items() if isinstance(key, int)},
        final=kept["final"],
        top_ids=kept["top_ids"],
        top_logprobs=kept["top_logprobs"],
    )


def needs_last_rows(num_prompt: int) -> bool:
    """Whether a prefix cache may hold all of a prompt but its last token: then the row before that would be missing, so
    such a prompt must not be read from it."""
    return (num_prompt - 1) % CACHE_BLOCK == 0


def top_tokens(logits: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [n, number] (float32) and ids [n, number] of the best tokens; logits [n, vocab].

    The best values lie in as many segments with the greatest maxima: one pass instead of a sort of every row.
    """
    num_tokens, vocab = logits.shape
    normalizer = logits.float().logsumexp(-1, keepdim=True)
    if vocab < number * SEGMENT:
        best = logits.topk(min(number, vocab), dim=-1)
        return best.values.float() - normalizer, best.indices
    padding = -vocab % SEGMENT
    segments = torch.nn.functional.pad(logits, (0, padding), value=float("-inf")).view(num_tokens, -1, SEGMENT)
    chosen = segments.amax(-1).topk(number, dim=-1).indices
    candidates = torch.gather(segments, 1, chosen[..., None].expand(-1, -1, SEGMENT)).flatten(1)
    best = candidates.topk(number, dim=-1)
    ids = torch.gather(chosen, 1, best.indices // SEGMENT) * SEGMENT + best.indices % SEGMENT
    return best.values.float() - normalizer, ids
