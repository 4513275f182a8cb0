"""The ledger after a failure, wherever in a step it came: no exit is under way any more, and all adds up again."""

from collections.abc import Mapping, Sequence

from apparate_llm.controller.budget import NANO
from apparate_llm.core import Exit, ExitCounts, Outcome
from apparate_llm.exits.ledger import RequestExits, VerdictLedger


def drop_exits(
    ledger: VerdictLedger, *, undone: Mapping[str, Sequence[Exit]], emitted: Mapping[str, int], now_s: float
) -> None:
    """What was released and has no verdict stays unverified: the tokens are out, and paid for.

    undone: by request, exits that the step under way released and that do not go out after all; emitted: tokens of
    each request that went out.
    """
    for request_id, request in ledger.requests.items():
        withdrawn = undone.get(request_id, ())
        for _ in withdrawn:
            ledger.budget.prove_right(request.bucket)
        out = [exit_ for exit_ in request.outstanding if not any(exit_ is other for other in withdrawn)]
        ledger.leave_unverified(request, out)
        request.outstanding, request.held, request.not_taken, request.num_since_pass = [], [], None, 0
        if request_id in emitted:
            _count_rest(ledger, request, emitted[request_id], now_s)
    _recount(ledger.counts)
    _balance(ledger)


def _count_rest(ledger: VerdictLedger, request: RequestExits, num_emitted: int, now_s: float) -> None:
    """Tokens that went out uncounted; fewer than none where exits were counted that did not."""
    missing = num_emitted - request.num_emitted
    if missing:
        is_first = request.first_token_s is None
        if is_first:
            request.first_token_s = request.last_token_s = now_s
        ledger.count_emitted(request, missing, missing - is_first, 0.0)
        request.num_unshared = max(0, request.num_unshared)
    if request.trace is not None:
        request.trace.align(num_emitted)


def _recount(counts: ExitCounts) -> None:
    """The totals that follow from what became of each exit."""
    released = (Outcome.RELEASED_RIGHT, Outcome.RELEASED_DIVERGENCE, Outcome.RELEASED_UNVERIFIED)
    accepted = (Outcome.HELD_ACCEPTED, Outcome.HELD_ACCEPTED_DIVERGENCE)
    counts.released_divergences = counts.settled(Outcome.RELEASED_DIVERGENCE)
    counts.unverified = counts.settled(Outcome.RELEASED_UNVERIFIED)
    counts.released = counts.settled(*released)
    counts.verified = counts.released - counts.unverified
    counts.accepted_divergences = counts.settled(Outcome.HELD_ACCEPTED_DIVERGENCE)
    counts.accepted = counts.settled(*accepted)
    counts.held = counts.accepted + counts.settled(Outcome.HELD_REJECTED)
    by_depth: dict[int, int] = {}
    for outcome in (*released, *accepted):
        for depth, number in counts.outcomes[outcome].items():
            by_depth[depth] = by_depth.get(depth, 0) + number
    counts.exits_by_depth = by_depth
    counts.lookup_exits = min(counts.lookup_exits, counts.released + counts.accepted)
    counts.emitted = max(counts.emitted, counts.released + counts.accepted)


def _balance(ledger: VerdictLedger) -> None:
    """What was spent is what may be divergences, and no bucket owes more than it ever had."""
    budget, counts = ledger.budget, ledger.counts
    if budget.kind == "agreement":
        budget.spent_nano = (counts.divergences + counts.unverified) * NANO
    buckets = [request.bucket for request in ledger.requests.values()]
    for bucket in (*budget.shared(), *(share.bucket for share in ledger.tenants.values()), *buckets):
        bucket.earned_nano = max(bucket.earned_nano, bucket.spent_nano)
