"""The ledger after a failure: wherever it came, all adds up and nothing is under way."""

import pytest

from apparate_llm.controller.budget import NANO, AccuracyBudget, Bucket
from apparate_llm.core import Exit, Outcome
from apparate_llm.exits.ledger import RequestExits, VerdictLedger
from apparate_llm.exits.recount import drop_exits
from apparate_llm.exits.token_origins import Trace


def exits(first: int, count: int) -> list[Exit]:
    return [Exit(first + i, 5, depth=2, draft_step=i, confidence=0.9) for i in range(count)]


def ledger_with(released: list[Exit]) -> VerdictLedger:
    ledger = VerdictLedger(AccuracyBudget(0.5))
    ledger.add_request("a", RequestExits(releasable=True, bucket=Bucket.of_request(0.5), trace=Trace("k")))
    ledger.emit("a", 10, now_s=0.0)
    ledger.emit("a", 1, now_s=0.1)
    for _ in released:
        ledger.budget.release(ledger.requests["a"].bucket)
    ledger.release("a", released)
    ledger.check_integrity()
    return ledger


def test_what_is_out_without_a_verdict_stays_paid_and_unverified():
    ledger = ledger_with(exits(11, 3))
    ledger.requests["a"].held = exits(14, 2)
    drop_exits(ledger, undone={}, emitted={"a": 14}, now_s=1.0)
    ledger.check_integrity()
    request, counts = ledger.requests["a"], ledger.counts
    assert (request.outstanding, request.held, counts.outstanding, counts.unverified) == ([], [], 0, 3)
    assert counts.emitted == 14 and ledger.budget.spent_nano == request.bucket.spent_nano == 3 * NANO
    assert len(request.trace.origins) == len(request.trace.depths) == 14


def test_what_does_not_go_out_is_neither_counted_nor_paid():
    released = exits(11, 3)
    ledger = ledger_with(released)
    drop_exits(ledger, undone={"a": released}, emitted={"a": 11}, now_s=1.0)
    ledger.check_integrity()
    counts = ledger.counts
    assert (counts.released, counts.emitted, counts.unverified) == (0, 11, 0)
    assert ledger.budget.spent_nano == ledger.requests["a"].bucket.spent_nano == 0
    assert len(ledger.requests["a"].trace.origins) == 11


def test_tokens_that_went_out_uncounted_are_counted():
    ledger = ledger_with([])
    ledger.add_request("b", RequestExits(releasable=True, bucket=Bucket.of_request(0.5)))
    drop_exits(ledger, undone={}, emitted={"a": 13, "b": 1}, now_s=1.0)
    ledger.check_integrity()
    assert ledger.counts.emitted == 14 and ledger.counts.decode_tokens == 12
    assert ledger.requests["b"].first_token_s == 1.0


@pytest.mark.parametrize("lost", ["settle", "remove", "verified", "held"])
def test_a_step_that_was_cut_off_anywhere_adds_up(lost):
    ledger = ledger_with(exits(11, 3))
    request, counts = ledger.requests["a"], ledger.counts
    if lost == "settle":
        counts.settle(Outcome.RELEASED_DIVERGENCE, 2)
    elif lost == "remove":
        request.outstanding.pop()
    elif lost == "verified":
        counts.verified += 2
    else:
        counts.held += 5
        counts.accepted += 3
    with pytest.raises(AssertionError):
        ledger.check_integrity()
    drop_exits(ledger, undone={}, emitted={"a": 14}, now_s=1.0)
    ledger.check_integrity()
    assert counts.outstanding == 0
