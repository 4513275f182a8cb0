"""Held exits that differ from the full model's choice: which are let through."""

from types import SimpleNamespace

import torch

from apparate_llm.controller.budget import AccuracyBudget, Bucket
from apparate_llm.core import Exit
from apparate_llm.exits.ledger import RequestExits, VerdictLedger
from apparate_llm.exits.verify import verify_held

VOCAB, STOP = 10, 7


def verified(
    *drafts: int, best: list[int], stops: frozenset[int] = frozenset({STOP}), may_diverge: bool = True
) -> tuple[VerdictLedger, list[int]]:
    """The ledger after a pass over one request's drafts, and the best tokens that vLLM's sampler then sees."""
    ledger = VerdictLedger(AccuracyBudget(0.9))
    held = [Exit(5 + i, token, 0, i, 0.9) for i, token in enumerate(drafts)]
    ledger.add_request(
        "a", RequestExits(releasable=True, bucket=Bucket.of_request(0.9), held=held, stop_token_ids=stops)
    )
    ledger.budget.server.earn(10 * 10**9)
    logits = torch.zeros(len(best), VOCAB)
    logits[range(len(best)), best] = 2.0
    metadata = SimpleNamespace(
        num_draft_tokens=[len(drafts)],
        target_logits_indices=torch.arange(len(drafts)),
        draft_token_ids=torch.tensor(drafts),
    )
    policy = SimpleNamespace(verify_divergence=lambda *args: True, may_diverge=lambda exit_: may_diverge)
    verify_held(logits, metadata, ["a"], ledger=ledger, policy=policy, may_diverge=lambda request_id: True)
    return ledger, logits.argmax(1).tolist()


def test_a_wrong_token_is_let_through_where_the_budget_allows_it():
    ledger, seen = verified(3, 4, best=[2, 4, 5])
    assert seen == [3, 4, 5] and ledger.counts.accepted_divergences == 1


def test_a_wrong_end_is_not():
    ledger, seen = verified(STOP, 4, best=[2, 4, 5])
    assert seen == [2, 4, 5] and ledger.counts.accepted_divergences == 0
    ledger, seen = verified(STOP, 4, best=[2, 4, 5], stops=frozenset())
    assert seen == [STOP, 4, 5] and ledger.counts.accepted_divergences == 1


def test_a_wrong_token_in_place_of_an_end_is():
    ledger, seen = verified(3, best=[STOP, 5])
    assert seen == [3, 5] and ledger.counts.accepted_divergences == 1


def test_no_wrong_token_is_where_the_policy_has_not_heard_enough():
    ledger, seen = verified(3, 4, best=[2, 4, 5], may_diverge=False)
    assert seen == [2, 4, 5] and ledger.counts.accepted_divergences == 0
