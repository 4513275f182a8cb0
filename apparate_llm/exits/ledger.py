"""Who owes a verdict, and what the verdicts said. A server has one; another where a failure left it beyond repair."""

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from apparate_llm.config import RequestOptions
from apparate_llm.controller.budget import NANO, AccuracyBudget, Bucket
from apparate_llm.core import Exit, ExitCounts, Outcome
from apparate_llm.exits.histograms import Distributions, Histogram
from apparate_llm.exits.safety import Asides
from apparate_llm.exits.tenants import TenantShare
from apparate_llm.exits.token_origins import Reports, TokenReport, Trace

logger = logging.getLogger("vllm.apparate")
LEAST_TOKENS = 16  # a request must have for its time per token to count
TARGET_TOLERANCE = 1.05
SETTLED_TOKENS = 500  # below so many, a single divergence is a large share


class PendingVerdict(NamedTuple):
    request_id: str
    exit: Exit
    row: int  # row of the verification pass whose logits give the verdict


class Verdict(NamedTuple):
    request_id: str
    exit: Exit
    released: bool
    agrees: bool
    regret_nats: float | None = None  # None where it was not computed
    follows_text: bool = True  # False after a rejected exit: a verdict on a text that was never emitted


@dataclass(slots=True)
class RequestExits:
    """What the engine remembers of one live request."""

    releasable: bool  # False where the request's contract needs the full model's scores
    bucket: Bucket
    greedy: bool = True
    may_exit: bool = True  # False where even held exits would change the answer
    max_tokens: int = sys.maxsize  # of the answer
    stop_token_ids: frozenset[int] = frozenset()
    options: RequestOptions = RequestOptions.model_validate({})  # noqa: RUF009 - frozen
    tpt_target_ms: float | None = None
    outstanding: list[Exit] = field(default_factory=list)  # released, no verdict yet
    held: list[Exit] = field(default_factory=list)  # of the last draft steps, in order
    not_taken: Exit | None = None  # what the ramp proposed next and the policy did not take
    num_emitted: int = 0
    num_unshared: int = 0  # tokens that have earned for this request only: those of its last step
    num_since_pass: int = 0  # emitted after the last verification pass: released exits
    num_divergences: int = 0
    first_token_s: float | None = None  # on the monotonic clock, of the step that emitted it
    last_token_s: float = 0.0
    share: TenantShare | None = None  # of its tenant
    trace: Trace | None = None  # where its tokens came from, if it wants to know

    def may_diverge(self, now_s: float) -> bool:
        """With a target, only while the request is slower than it."""
        if self.tpt_target_ms is None:
            return True
        if self.first_token_s is None or self.num_emitted < 2:
            return False
        return (now_s - self.first_token_s) * 1e3 > self.tpt_target_ms * (self.num_emitted - 1)

    @property
    def takes_exits(self) -> bool:
        return self.may_exit and bool(self.options.early_exit)

    @property
    def tpt_ms(self) -> float | None:
        """Time per output token; None for a single token."""
        if self.first_token_s is None or self.num_emitted < 2:
            return None
        return (self.last_token_s - self.first_token_s) * 1e3 / (self.num_emitted - 1)


@dataclass(slots=True)
class Audit:
    """How near the accuracy bound the divergences at worst were: exits that ended without a verdict are among them."""

    largest_divergence_frac: float = 0.0  # of the server, over all prefixes of its output beyond SETTLED_TOKENS
    largest_request_excess: float = 0.0  # divergences of a request less its bound x tokens, over all prefixes of all

    def of_request(self, bucket: Bucket, num_divergences: int, num_uncounted: int) -> None:
        """num_uncounted: tokens that its bucket has not heard of yet."""
        earned_nano = bucket.earned_by_tokens_nano + bucket.per_token_nano * num_uncounted
        excess = (num_divergences * NANO - earned_nano) / NANO
        self.largest_request_excess = max(self.largest_request_excess, excess)

    def of_server(self, counts: ExitCounts, num_uncounted: int) -> None:
        """num_uncounted: tokens that are not in the counts yet."""
        if counts.emitted > SETTLED_TOKENS:
            share = counts.divergences_at_worst / (counts.emitted + num_uncounted)
            self.largest_divergence_frac = max(self.largest_divergence_frac, share)


class KnownRequest(Protocol):
    """What is read of vLLM's CachedRequestState."""

    @property
    def num_computed_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


class VerdictLedger:
    """Exits between release and verdict, and the running totals.

    The verdict on a token at position i comes from the full model's logits at position i - 1, so it is due in
    whichever pass computes that position: the next step normally, a later one after a preemption or a short chunk.
    """

    def __init__(self, budget: AccuracyBudget, tenants: dict[str, TenantShare] | None = None) -> None:
        self.budget = budget
        self.tenants = tenants or {}  # by name; empty where the server has none
        self.counts = ExitCounts()
        self.audit = Audit()
        self.distributions = Distributions()
        self.requests: dict[str, RequestExits] = {}
        self.reports = Reports()
        self.asides = Asides()  # reports and histograms: no exit depends on them

    def add_request(self, request_id: str, request: RequestExits) -> None:
        self.requests[request_id] = request

    def end_request(self, request_id: str) -> None:
        """The request finished or was aborted: what is still outstanding stays unverified."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        self.leave_unverified(request, request.outstanding)
        if request.trace is not None:
            self.asides.run("A report", partial(self.reports.keep, request_id, request.trace, request.tpt_ms))
        if request.tpt_ms is not None:
            self._observe(self.distributions.tpt_ms, request.tpt_ms)
        if request.tpt_target_ms is not None and request.num_emitted >= LEAST_TOKENS:
            assert request.tpt_ms is not None
            is_met = request.tpt_ms <= request.tpt_target_ms * TARGET_TOLERANCE
            for totals in self._totals_of(request):
                totals.targets_met += is_met
                totals.targets_missed += not is_met
            if not is_met:
                self.report_missed(request.tpt_ms, request.tpt_target_ms)

    def leave_unverified(self, request: RequestExits, exits: Sequence[Exit]) -> None:
        for totals in self._totals_of(request):
            totals.unverified += len(exits)
        for exit_ in exits:
            self.counts.settle(Outcome.RELEASED_UNVERIFIED, exit_.depth)
        if exits:
            self._audit(request, request.num_divergences + len(exits))

    def report_missed(self, tpt_ms: float, target_ms: float) -> None:
        """At the first request that misses its target, the second, the fourth, ..."""
        missed = self.counts.targets_missed
        if missed & (missed - 1) == 0:
            logger.warning(
                "TPT target of %.1f ms not met: a request took %.1f ms per token, all exits its bound allows included "
                "(%d requests missed their target so far, %d met it)",
                target_ms,
                tpt_ms,
                missed,
                self.counts.targets_met,
            )

    def report(self, key: str) -> dict[str, TokenReport]:
        """Request id -> where the tokens of the answer came from; once for each."""
        for request_id, request in self.requests.items():  # its last token is out, the scheduler has not said so yet
            if request.trace is not None and request.trace.key == key:
                self.reports.keep(request_id, request.trace, request.tpt_ms)
                request.trace = None
        return self.reports.take(key)

    def emit(self, request_id: str, num_tokens: int, now_s: float) -> None:
        """Checked tokens, accepted exits among them, go out."""
        request = self.requests[request_id]
        self._share(request)  # the answer went on after what came before
        is_first = request.first_token_s is None
        if is_first:
            request.first_token_s = request.last_token_s = now_s
        self.count_emitted(request, num_tokens, num_tokens - is_first, now_s - request.last_token_s)
        request.last_token_s = now_s
        self._trace(request, Trace.emitted, num_tokens)
        self._observe(self.distributions.tokens_per_pass, num_tokens + request.num_since_pass)
        request.num_since_pass = 0

    def _trace(self, request: RequestExits, tell: Callable[..., None], *what: object) -> None:
        if request.trace is not None:
            self.asides.run("A report", partial(tell, request.trace, *what))

    def _observe(self, histogram: Histogram, value: float) -> None:
        self.asides.run("A histogram", partial(histogram.observe, value))

    def _totals_of(self, request: RequestExits) -> tuple[ExitCounts | TenantShare, ...]:
        return (self.counts,) if request.share is None else (self.counts, request.share)

    def count_emitted(self, request: RequestExits, num_tokens: int, num_decoded: int, took_s: float) -> None:
        request.num_emitted += num_tokens
        for totals in self._totals_of(request):
            totals.emitted += num_tokens
            totals.decode_tokens += num_decoded
            totals.decode_s += took_s
        self.budget.earn(request.bucket, num_tokens)
        request.num_unshared += num_tokens

    def ended(self, request_id: str) -> None:
        """The answer ended by itself: by length or a stop token, not because its client left."""
        self._share(self.requests[request_id])

    def _share(self, request: RequestExits) -> None:
        self.budget.share(request.bucket, request.num_unshared)
        request.num_unshared = 0

    def drop_held(self) -> None:
        """The full model has looked at no held exit, nor will it."""
        for request in self.requests.values():
            request.held, request.not_taken = [], None

    def count_held(self, request: RequestExits, num_held: int, num_accepted: int) -> None:
        """The full model has looked at the first `num_held` held exits and emits `num_accepted` of them; divergences
        let through are counted already."""
        held = request.held[:num_held]  # none of them after a failure: then they were drafts like any others
        num_accepted = min(num_accepted, len(held))
        self.counts.held += len(held)
        self.counts.accepted += num_accepted
        self._trace(request, Trace.accepted, held[:num_accepted])
        for i, exit_ in enumerate(held):
            if i >= num_accepted:
                self.counts.settle(Outcome.HELD_REJECTED, exit_.depth)
                continue
            self.counts.emit_exit(exit_)
            if not exit_.is_divergence:
                self.counts.settle(Outcome.HELD_ACCEPTED, exit_.depth)

    def release(self, request_id: str, exits: list[Exit]) -> None:
        """They go out, too; the budget was paid when the policy said so."""
        request = self.requests[request_id]
        assert request.releasable, f"released an exit of request {request_id}, which takes none"
        request.outstanding.extend(exits)
        request.num_since_pass += len(exits)
        self.counts.released += len(exits)
        self._trace(request, Trace.released, exits)
        for exit_ in exits:
            self.counts.emit_exit(exit_)
        self.count_emitted(request, len(exits), len(exits), 0.0)

    def check_arrived(self, request_id: str, *, num_tokens: int) -> None:
        """Raise AssertionError if released exits are not among the tokens that the scheduler has of the request."""
        request = self.requests.get(request_id)
        if request is not None and request.outstanding:
            last = request.outstanding[-1].position
            assert last < num_tokens, f"released token {last} of {request_id}, which has {num_tokens}"

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

    def verify_released(
        self, pending: list[PendingVerdict], best: list[int], regrets_nats: list[float]
    ) -> list[Verdict]:
        """Verdicts on released exits: the full model's best token for each, and how much better it is."""
        verdicts = []
        for item, token_id, regret in zip(pending, best, regrets_nats, strict=True):
            request = self.requests[item.request_id]
            agrees = token_id == item.exit.token_id
            self._trace(request, Trace.verified, item.exit, agrees)
            self.counts.verified += 1
            self.counts.settle(Outcome.RELEASED_RIGHT if agrees else Outcome.RELEASED_DIVERGENCE, item.exit.depth)
            if agrees:
                self.budget.prove_right(request.bucket)
            else:
                self.counts.released_divergences += 1
                self._count_divergence(request, regret)
            request.outstanding.remove(item.exit)
            verdicts.append(Verdict(item.request_id, item.exit, True, agrees, regret))
        return verdicts

    def accept_divergence(self, request_id: str, exit_: Exit, regret_nats: float) -> None:
        """A held exit is emitted although its verdict differs; `emit` counts it with the checked tokens."""
        request = self.requests[request_id]
        exit_.is_divergence = True
        self.counts.settle(Outcome.HELD_ACCEPTED_DIVERGENCE, exit_.depth)
        self.budget.accept(request.bucket, regret_nats)
        self.counts.accepted_divergences += 1
        self._count_divergence(request, regret_nats, num_uncounted=1)

    def _count_divergence(self, request: RequestExits, regret_nats: float, num_uncounted: int = 0) -> None:
        """An emitted token is known to differ. num_uncounted: of them not in the counts yet."""
        if math.isfinite(regret_nats):
            self.counts.regret_nats += regret_nats
        self._observe(self.distributions.regret_nats, regret_nats)
        request.num_divergences += 1
        if request.share is not None:
            request.share.divergences += 1
        self._audit(request, request.num_divergences, num_uncounted)

    def _audit(self, request: RequestExits, num_divergences: int, num_uncounted: int = 0) -> None:
        """A divergence, or exits that end without a verdict: nothing else can raise a share, all else is tokens
        emitted."""
        self.audit.of_request(request.bucket, num_divergences, num_uncounted)
        self.audit.of_server(self.counts, num_uncounted)

    def check_integrity(self) -> None:
        """Raise AssertionError unless all exits add up."""
        counts = self.counts
        open_exits = sum(len(request.outstanding) for request in self.requests.values())
        assert counts.outstanding == open_exits, f"{counts.outstanding} exits outstanding, {open_exits} on record"
        counts.check_integrity()
        shared = [*self.budget.shared(), *(share.bucket for share in self.tenants.values())]
        for bucket in (*shared, *(request.bucket for request in self.requests.values())):
            bucket.check_integrity()
        if self.budget.kind == "agreement":
            at_worst = counts.divergences + counts.unverified + counts.outstanding
            spent_nano = self.budget.spent_nano
            assert spent_nano == at_worst * NANO, f"paid {spent_nano} billionths for {at_worst} tokens"

    def check_requests(self, states: Mapping[str, KnownRequest]) -> None:
        """Raise AssertionError unless the exits of each request fit what vLLM knows of it."""
        for request_id, exits in self.requests.items():
            state = states[request_id]
            first = state.num_tokens - len(exits.outstanding)
            assert [exit_.position for exit_ in exits.outstanding] == list(range(first, state.num_tokens)), (
                f"outstanding exits of {request_id} are not its last tokens: {exits.outstanding} of {state.num_tokens}"
            )
            assert not exits.outstanding or state.num_computed_tokens <= first, (
                f"{request_id}: {state.num_computed_tokens} tokens counted as computed, exits from {first} are not"
            )
