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
"""

from dataclasses import dataclass
from typing import Literal

REQUEST_ALLOWANCE = 1.0  # divergences (or nats) a request may have before it has earned them; 0 where its bound is 0
HORIZON_TOKENS = 2000  # what the server saves up is capped at what this many tokens earn: no burst after a long calm
LEAST_CAPACITY = 4.0
ROUNDING = 1e-6  # of many sums of floats


@dataclass(slots=True)
class Bucket:
    bound: float  # earned per emitted token
    balance: float
    capacity: float
    earned: float  # in all, whatever the capacity cut off, the initial balance included
    spent: float = 0.0  # in all, less what came back
    allowance: float = 0.0  # of `earned`, what was there at the start
    of_class: "Bucket | None" = None  # of a request: its class's

    @classmethod
    def of_server(cls, bound: float) -> "Bucket":
        return cls(bound, 0.0, server_capacity(bound), 0.0)

    @classmethod
    def of_request(cls, bound: float) -> "Bucket":
        allowance = REQUEST_ALLOWANCE if bound > 0 else 0.0
        return cls(bound, allowance, float("inf"), earned=allowance, allowance=allowance)

    @classmethod
    def for_class(cls, bound: float, num_classes: int) -> "Bucket":
        """What all classes save up is no more than the server does."""
        return cls(bound, 0.0, max(LEAST_CAPACITY / 2, server_capacity(bound) / num_classes), 0.0)

    @property
    def earned_by_tokens(self) -> float:
        return self.earned - self.allowance

    def change_bound(self, bound: float) -> None:
        """Of the server: from now on tokens earn `bound`; no more than its capacity is kept of what was saved up."""
        self.bound, self.capacity = bound, server_capacity(bound)
        self.balance = min(self.balance, self.capacity)

    def earn(self, amount: float) -> None:
        self.earned += amount
        self.balance = min(self.balance + amount, self.capacity)

    def affords(self, cost: float) -> bool:
        """The token paid for earns its own share first."""
        return self.balance + self.bound >= cost - ROUNDING

    def pay(self, cost: float) -> None:
        self.spent += cost
        self.balance -= cost

    def take_back(self, cost: float) -> None:
        self.spent -= cost
        self.balance = min(self.balance + cost, self.capacity)

    def check_integrity(self) -> None:
        assert self.spent <= self.earned + ROUNDING * (1 + self.earned), f"budget overspent: {self}"


def server_capacity(bound: float) -> float:
    return max(LEAST_CAPACITY, HORIZON_TOKENS * bound)


class AccuracyBudget:
    """The server's bucket, and what is paid from it and from a request's own."""

    def __init__(self, accuracy_bound: float, kind: Literal["agreement", "regret"] = "agreement") -> None:
        self.server = Bucket.of_server(accuracy_bound)
        self.kind = kind

    @property
    def fill_frac(self) -> float:
        """Share of the server's capacity that is there to be spent, in [0, 1]."""
        return max(0.0, self.server.balance) / self.server.capacity

    def change_bound(self, bound: float) -> None:
        self.server.change_bound(bound)

    def emit(self, request: Bucket, num_tokens: int) -> None:
        request.earn(request.bound * num_tokens)
        if request.of_class is not None:
            request.of_class.earn(request.bound * num_tokens)
        self.server.earn(max(self.server.bound, request.bound) * num_tokens)  # a request may be allowed to be looser

    def may_release(self, request: Bucket) -> bool:
        return self.kind == "agreement" and self._both_afford(request, 1.0)

    def release(self, request: Bucket) -> None:
        assert self.may_release(request), "released an exit that the budget does not allow"
        self._pay(request, 1.0)

    def prove_right(self, request: Bucket) -> None:
        """A released exit's verdict agrees with it."""
        for bucket in self._paying(request):
            bucket.take_back(1.0)

    def may_accept(self, request: Bucket, regret_nats: float) -> bool:
        """Whether a held exit that its verdict differs from may be emitted."""
        return self._both_afford(request, self._price(regret_nats))

    def accept(self, request: Bucket, regret_nats: float) -> None:
        assert self.may_accept(request, regret_nats), "accepted a divergence that the budget does not allow"
        self._pay(request, self._price(regret_nats))

    def _price(self, regret_nats: float) -> float:
        return 1.0 if self.kind == "agreement" else regret_nats

    def _both_afford(self, request: Bucket, cost: float) -> bool:
        shared = request.of_class
        return (
            request.bound > 0
            and request.affords(cost)
            and self.server.affords(cost)
            and (shared is None or shared.balance + request.bound >= cost - ROUNDING)
        )

    def _paying(self, request: Bucket) -> tuple[Bucket, ...]:
        return (self.server, request) if request.of_class is None else (self.server, request, request.of_class)

    def _pay(self, request: Bucket, cost: float) -> None:
        for bucket in self._paying(request):
            bucket.pay(cost)
