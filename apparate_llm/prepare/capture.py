"""Takes training rows out of vLLM while it generates, so that no second forward pass is needed."""

from collections import defaultdict
from typing import Any

import torch

from apparate_llm.prepare.engine import runner_of
from apparate_llm.prepare.rows import TOP, Conversation

SEGMENT = 64


class Capture:
    """Records what an in-process vLLM engine computes for the tokens of its answers.

    llm: a `vllm.LLM` with enforce_eager=True and without prefix caching, in this process
    (VLLM_ENABLE_V1_MULTIPROCESSING=0). depths: residual streams to keep; depth 0, the embedding, needs none.
    """

    def __init__(self, llm: Any, *, depths: tuple[int, ...]) -> None:
        self.runner = runner_of(llm)
        model = self.runner.model
        num_layers = len(model.model.layers)
        if bad := [depth for depth in depths if not 0 < depth < num_layers]:
            raise ValueError(f"cannot record depth {bad[0]} (allowed: 1 to {num_layers - 1})")
        self.depths = depths
        self._seen: dict[int, torch.Tensor] = {}  # residual streams of the pass under way
        self._steps: list[dict[int | str, torch.Tensor]] = []
        self._where: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)  # request -> position -> (step, row)
        self._keep: list[int] = []
        self._top_rows: list[tuple[int, int]] = []  # (row of the logits, row of the step)
        for depth in depths:
            model.model.layers[depth].register_forward_pre_hook(self._layer_hook(depth))
        self._forward, self.runner._model_forward = self.runner._model_forward, self._watched_forward
        self._compute_logits, model.compute_logits = model.compute_logits, self._watched_logits

    def _layer_hook(self, depth: int) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            _positions, hidden, residual = args[:3]
            self._seen[depth] = hidden if residual is None else hidden + residual

        return hook

    def _watched_forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self._forward(*args, **kwargs)
        batch, starts = self.runner.input_batch, self.runner.query_start_loc.np
        keep: list[int] = []
        self._top_rows = []
        for index, request_id in enumerate(batch.req_ids):
            first, end = int(starts[index]), int(starts[index + 1])
            position = int(batch.num_computed_tokens_cpu[index])
            lead = int(batch.num_prompt_tokens[index]) - 2
            request_id = request_id.rpartition("-")[0]  # vLLM appends random characters to the caller's id
            for row in range(first + max(0, lead - position), end):
                self._where[request_id][position + row - first] = (len(self._steps), len(keep))
                keep.append(row)
            if position + end - first > lead + 1:  # past the prompt: this request's logits are its next token's
                self._top_rows.append((index, len(keep) - 1))
        rows = torch.tensor(keep, dtype=torch.int64)
        self._steps.append({"final": out[rows], **{depth: value[rows] for depth, value in self._seen.items()}})
        self._seen.clear()
        return out

    def _watched_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self._compute_logits(hidden_states)
        step = self._steps[-1]
        ids = torch.zeros(len(step["final"]), TOP, dtype=torch.int32)
        logprobs = torch.zeros(len(step["final"]), TOP, dtype=torch.float16)
        if self._top_rows:
            wanted, rows = (torch.tensor(part) for part in zip(*self._top_rows, strict=True))
            values, best = top_tokens(logits[wanted])
            ids[rows], logprobs[rows] = best.int(), values.half()
        step["top_ids"], step["top_logprobs"] = ids, logprobs
        return logits

    def take(self, request_id: str, prompt: list[int], answer: list[int]) -> Conversation:
        """The rows of a finished request. vLLM's last sampled token has none: nothing came after it."""
        where = self._where.pop(request_id)
        places = [where[position] for position in range(len(prompt) - 2, len(prompt) + len(answer) - 1)]

        def gather(key: int | str) -> torch.Tensor:
            return torch.stack([self._steps[step][key][row] for step, row in places])

        return Conversation(
            prompt=prompt,
            answer=answer,
            states={depth: gather(depth) for depth in self.depths},
            final=gather("final"),
            top_ids=gather("top_ids"),
            top_logprobs=gather("top_logprobs"),
        )

    def clear(self) -> None:
        """Forget everything recorded; only between requests."""
        self._steps.clear()
        self._where.clear()


def top_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [n, TOP] (float32) and ids [n, TOP] of the best tokens; logits [n, vocab].

    The best TOP values lie in the TOP segments with the greatest maxima: one pass instead of a sort of every row.
    """
    num_rows, vocab = logits.shape
    normalizer = logits.float().logsumexp(-1, keepdim=True)
    if vocab < TOP * SEGMENT:
        best = logits.topk(min(TOP, vocab), dim=-1)
        return best.values.float() - normalizer, best.indices
    padding = -vocab % SEGMENT
    segments = torch.nn.functional.pad(logits, (0, padding), value=float("-inf")).view(num_rows, -1, SEGMENT)
    chosen = segments.amax(-1).topk(TOP, dim=-1).indices
    candidates = torch.gather(segments, 1, chosen[..., None].expand(-1, -1, SEGMENT)).flatten(1)
    best = candidates.topk(TOP, dim=-1)
    ids = torch.gather(chosen, 1, best.indices // SEGMENT) * SEGMENT + best.indices % SEGMENT
    return best.values.float() - normalizer, ids
