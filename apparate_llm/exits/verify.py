"""Verdicts on exits: from the logits of the verification pass that vLLM's rejection sampler is about to read, or
from the tokens it took."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from apparate_llm.argmax import best_tokens
from apparate_llm.controller.policy import Policy
from apparate_llm.core import Exit
from apparate_llm.exits.ledger import RequestExits, Verdict, VerdictLedger


class Drafts(Protocol):
    """What is read of vLLM's SpecDecodeMetadata."""

    num_draft_tokens: list[int]  # of each request
    draft_token_ids: torch.Tensor  # [num_drafts]
    target_logits_indices: torch.Tensor  # [num_drafts]: rows of the logits that tell of them


def best_and_regret(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[list[int], list[float]]:
    """Of each row of logits [num_tokens, vocab]: the best token, and by how many nats it is better than that of
    `token_ids` [num_tokens]."""
    best = best_tokens(logits)
    scores = logits.gather(1, torch.stack([best, token_ids.long()], dim=1)).float()
    return best.tolist(), (scores[:, 0] - scores[:, 1]).tolist()


def verify_held(
    logits: torch.Tensor,
    metadata: Drafts,
    request_ids: list[str],
    *,
    ledger: VerdictLedger,
    policy: Policy,
    may_diverge: Callable[[str], bool],
) -> list[Verdict]:
    """Verdicts on the held exits of requests that take the full model's best token, in order.

    Where the budget and the policy allow it, a held exit that differs is let through: its logit is raised above all
    others, so that vLLM's sampler accepts it. logits [num_tokens, vocab] are changed in place.
    """
    spans = _held_spans(metadata.num_draft_tokens, request_ids, ledger)
    if not spans:
        return []
    num_drafts = sum(metadata.num_draft_tokens)
    rows = metadata.target_logits_indices[:num_drafts].long()
    best, regrets = best_and_regret(logits[rows], metadata.draft_token_ids[:num_drafts])
    verdicts: list[Verdict] = []
    for request_id, request, start, count in spans:
        held = request.held[:count]
        assert len(held) == count, f"{count} drafts of {request_id}, {len(held)} held exits"
        diverging = may_diverge(request_id)
        passes = True
        for i, exit_ in enumerate(held):
            row, regret = start + i, regrets[start + i]
            agrees = best[row] == exit_.token_id
            verdicts.append(Verdict(request_id, exit_, False, agrees, regret, follows_text=passes))
            if agrees or not passes:
                continue
            passes = diverging and _verify_divergence(exit_, regret, held[i + 1 :], request, ledger, policy)
            if passes:
                ledger.accept_divergence(request_id, exit_, regret)
                logits[rows[row], exit_.token_id] += regret + 1.0  # one above the best
    return verdicts


class _HeldSpan(NamedTuple):
    """The drafts of one request, among those of all."""

    request_id: str
    request: RequestExits
    start: int
    num_drafts: int


def _held_spans(num_draft_tokens: list[int], request_ids: list[str], ledger: VerdictLedger) -> list[_HeldSpan]:
    """Of requests whose drafts are held exits that the full model's best tokens are to be compared with."""
    spans = []
    start = 0
    for request_id, count in zip(request_ids, num_draft_tokens, strict=True):
        request = ledger.requests.get(request_id)
        if count and request is not None and request.releasable and request.held:
            spans.append(_HeldSpan(request_id, request, start, count))
        start += count
    return spans


def _verify_divergence(
    exit_: Exit, regret: float, later: list[Exit], request: RequestExits, ledger: VerdictLedger, policy: Policy
) -> bool:
    """Whether a held exit that differs may be let through, and `later` ones with it."""
    return (
        exit_.token_id not in request.stop_token_ids  # a divergence there would cut the answer off
        and policy.may_diverge(exit_)
        and ledger.budget.verify_divergence(request.bucket, regret)
        and policy.verify_divergence(regret, later, ledger.budget.fill_frac_of(request.bucket))
    )


def verify_sampled(
    request_id: str, exits: RequestExits, checked: list[int], end: int, num_drafts: int
) -> list[Verdict]:
    """Verdicts that the sampled tokens show, of which the last is at `end` - 1: on `num_drafts` held exits, and on the
    one that was not taken."""
    num_accepted = len(checked) - 1
    verdicts = [
        Verdict(request_id, exit_, False, i < num_accepted)
        for i, exit_ in enumerate(exits.held[: min(num_drafts, num_accepted + 1)])
    ]
    not_taken = exits.not_taken
    if not_taken is not None and end - len(checked) <= not_taken.position < end:
        agrees = checked[not_taken.position - end] == not_taken.token_id
        verdicts.append(Verdict(request_id, not_taken, False, agrees))
    exits.held, exits.not_taken = [], None
    return verdicts
