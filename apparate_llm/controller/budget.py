"""The accuracy bound as token buckets: what may go wrong is paid for before it is emitted.

Every emitted token earns `bound`. A released exit costs 1 until its verdict proves it right; the 1 of a divergence,
and of an exit whose request ended before its verdict, never comes back. A held exit that differs from its verdict may
be emitted all the same, at the same price. So at every moment, even should all exits without a verdict turn out
wrong,

    divergences of the server    <=  sum of bound x emitted tokens
    divergences of one request   <=  its bound x its emitted tokens + REQUEST_ALLOWANCE

Where requests are of classes, each class has a bucket of its own beside the server's, filled by its own tokens: none
can spend what another has earned.

With the kind `regret` the price is not 1 but the exit's regret in nats; what is not known yet cannot be paid for, so
exits are held, not released.

All sums are of whole numbers, billionths of a divergence (or nat): sums of floats would be off by a rounding, and a
bound that is kept by a rounding is not kept.
"""

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

REQUEST_ALLOWANCE = 1.0  # divergences (or nats) a request may have before it has earned them; 0 where its bound is 0
HORIZON_TOKENS = 2000  # what the server saves up is capped at what this many tokens earn: no burst after a long calm
LEAST_CAPACITY = 4.0
NANO = 10**9
MOST_NATS = 1e9  # that a divergence is priced at


def nano_of(bound: float) -> int:
    """A bound as it is written, in billionths, rounded down."""
    return int(Decimal(repr(bound)) * NANO)


@dataclass(slots=True)
class Bucket:
    per_token_nano: int  # what an emitted token earns
    balance_nano: int
    capacity_nano: int | None  # None: all that is earned is kept
    earned_nano: int  # in all, whatever the capacity cut off, the allowance included
    spent_nano: int = 0  # in all, less what came back
    allowance_nano: int = 0  # of what was earned, what was there at the start
    of_class: "Bucket | None" = None  # of a request: its class's

    @classmethod
    def of_server(cls, bound: float) -> "Bucket":
        return cls(nano_of(bound), 0, server_capacity_nano(bound), 0)

    @classmethod
    def of_request(cls, bound: float) -> "Bucket":
        allowance = int(REQUEST_ALLOWANCE * NANO) if bound > 0 else 0
        return cls(nano_of(bound), allowance, None, earned_nano=allowance, allowance_nano=allowance)

    @classmethod
    def for_class(cls, bound: float, num_classes: int) -> "Bucket":
        """What all classes save up is no more than the server does."""
        capacity = max(int(LEAST_CAPACITY / 2 * NANO), server_capacity_nano(bound) // num_classes)
        return cls(nano_of(bound), 0, capacity, 0)

    @property
    def balance(self) -> float:
        return self.balance_nano / NANO

    @property
    def earned_by_tokens_nano(self) -> int:
        return self.earned_nano - self.allowance_nano

    def change_bound(self, bound: float) -> None:
        """From now on tokens earn `bound`."""
        self.per_token_nano = nano_of(bound)

    def limit(self, capacity_nano: int) -> None:
        """No more is kept of what was saved up."""
        self.capacity_nano = capacity_nano
        self.balance_nano = min(self.balance_nano, capacity_nano)

    def earn(self, amount_nano: int) -> None:
        self.earned_nano += amount_nano
        self._add(amount_nano)

    def affords(self, cost_nano: int, earning_nano: int) -> bool:
        """The token paid for earns its share, `earning_nano`, first."""
        return self.balance_nano + earning_nano >= cost_nano

    def pay(self, cost_nano: int) -> None:
        self.spent_nano += cost_nano
        self.balance_nano -= cost_nano

    def take_back(self, cost_nano: int) -> None:
        self.spent_nano -= cost_nano
        self._add(cost_nano)

    def check_integrity(self) -> None:
        assert self.spent_nano <= self.earned_nano, f"budget overspent: {self}"

    def _add(self, amount_nano: int) -> None:
        self.balance_nano += amount_nano
        if self.capacity_nano is not None and self.balance_nano > self.capacity_nano:
            self.balance_nano = self.capacity_nano


def server_capacity_nano(bound: float) -> int:
    return max(int(LEAST_CAPACITY * NANO), HORIZON_TOKENS * nano_of(bound))


class AccuracyBudget:
    """The server's bucket, and what is paid from it and from a request's own."""

    def __init__(self, accuracy_bound: float, kind: Literal["agreement", "regret"] = "agreement") -> None:
        self.server = Bucket.of_server(accuracy_bound)
        self.kind = kind

    @property
    def fill_frac(self) -> float:
        """Share of the server's capacity that is there to be spent, in [0, 1]."""
        assert self.server.capacity_nano is not None, "the server's bucket has no capacity"
        return max(0, self.server.balance_nano) / self.server.capacity_nano

    def change_bound(self, bound: float) -> None:
        self.server.change_bound(bound)
        self.server.limit(server_capacity_nano(bound))

    def emit(self, request: Bucket, num_tokens: int) -> None:
        earned_nano = request.per_token_nano * num_tokens
        request.earn(earned_nano)
        if request.of_class is not None:
            request.of_class.earn(earned_nano)
        # A request may be allowed to be looser.
        self.server.earn(max(self.server.per_token_nano * num_tokens, earned_nano))

    def may_release(self, request: Bucket) -> bool:
        return self.kind == "agreement" and self._all_afford(request, NANO)

    def release(self, request: Bucket) -> None:
        assert self.may_release(request), "released an exit that the budget does not allow"
        self._pay(request, NANO)

    def prove_right(self, request: Bucket) -> None:
        """A released exit's verdict agrees with it."""
        for bucket in self._paying(request):
            bucket.take_back(NANO)

    def may_accept(self, request: Bucket, regret_nats: float) -> bool:
        """Whether a held exit that its verdict differs from may be emitted."""
        return self._all_afford(request, self._price_nano(regret_nats))

    def accept(self, request: Bucket, regret_nats: float) -> None:
        assert self.may_accept(request, regret_nats), "accepted a divergence that the budget does not allow"
        self._pay(request, self._price_nano(regret_nats))

    def _price_nano(self, regret_nats: float) -> int:
        # What is no number costs the most, too.
        return NANO if self.kind == "agreement" else math.ceil(min(MOST_NATS, regret_nats) * NANO)

    def _all_afford(self, request: Bucket, cost_nano: int) -> bool:
        earning_nano, shared = request.per_token_nano, request.of_class
        return (
            earning_nano > 0
            and request.affords(cost_nano, earning_nano)
            and self.server.affords(cost_nano, self.server.per_token_nano)
            and (shared is None or shared.affords(cost_nano, earning_nano))
        )

    def _paying(self, request: Bucket) -> tuple[Bucket, ...]:
        return (self.server, request) if request.of_class is None else (self.server, request, request.of_class)

    def _pay(self, request: Bucket, cost_nano: int) -> None:
        for bucket in self._paying(request):
            bucket.pay(cost_nano)
