"""Who owes a verdict, and what the verdicts said. Owned by the runner; one instance per server."""

from typing import NamedTuple

from apparate_llm.core import ExitCounts, Outstanding, RequestExits


class PendingVerdict(NamedTuple):
    request_id: str
    exit: Outstanding
    row: int  # row of the completion pass whose logits give the verdict


class VerdictLedger:
    """Exits between release and verdict, and the running totals.

    The verdict on a token at position i comes from the full model's logits at position i - 1, so it is due in
    whichever pass computes that position: the next step normally, a later one after a preemption or a short chunk.
    """

    def __init__(self) -> None:
        self.counts = ExitCounts()
        self.requests: dict[str, RequestExits] = {}

    def add_request(self, request_id: str, *, releasable: bool) -> None:
        self.requests[request_id] = RequestExits(releasable=releasable)

    def end_request(self, request_id: str) -> None:
        """The request finished or was aborted: what is still outstanding stays unverified."""
        request = self.requests.pop(request_id, None)
        if request is not None:
            self.counts.unverified += len(request.outstanding)

    def release(self, request_id: str, exits: list[Outstanding]) -> None:
        request = self.requests[request_id]
        assert request.releasable, f"released an exit of request {request_id}, which takes none"
        request.outstanding.extend(exits)
        self.counts.released += len(exits)
        self.counts.emitted += len(exits)

    def due(self, request_id: str, *, first_position: int, num_scheduled: int, first_row: int) -> list[PendingVerdict]:
        """Verdicts that a pass over [first_position, first_position + num_scheduled) will give."""
        request = self.requests.get(request_id)
        if request is None:
            return []
        due = []
        for exit_ in request.outstanding:
            offset = exit_.position - 1 - first_position
            if 0 <= offset < num_scheduled:
                due.append(PendingVerdict(request_id, exit_, first_row + offset))
        return due

    def record(self, pending: list[PendingVerdict], verdict_token_ids: list[int]) -> None:
        for item, verdict in zip(pending, verdict_token_ids, strict=True):
            self.requests[item.request_id].outstanding.remove(item.exit)
            self.counts.verified += 1
            self.counts.diverged += verdict != item.exit.token_id

    def check_integrity(self) -> None:
        """Raise AssertionError unless all exits add up."""
        counts = self.counts
        open_exits = sum(len(request.outstanding) for request in self.requests.values())
        assert counts.outstanding == open_exits, f"{counts.outstanding} exits outstanding, {open_exits} on record"
        assert 0 <= counts.accepted <= counts.held, f"accepted {counts.accepted} of {counts.held} held exits"
        assert 0 <= counts.diverged <= counts.verified, f"{counts.diverged} of {counts.verified} verdicts diverged"
        assert counts.released + counts.accepted <= counts.emitted, f"more exits than tokens: {counts}"
