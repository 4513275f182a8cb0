"""The accuracy bound as token buckets: what may diverge is paid for before it is emitted.

Every emitted token earns its request's bound. A released exit costs 1 until its verdict proves it right; the 1 of a
divergence, and of an exit whose request ended before its verdict, never comes back. A held exit that differs from its
verdict may be emitted all the same, at the same cost. A divergence is paid from each of these buckets, and is emitted
only if all of them can:

    the request's own    filled by its tokens, beside an allowance of REQUEST_ALLOWANCE at its start
    its group's          filled by tokens of requests of the same tenant with the same bound
    its tenant's         filled by tokens of the tenant, whatever their bounds; where there are tenants
    the server's         filled by tokens of all groups; what it saves up is capped

So at every moment, even should all exits without a verdict turn out to be divergences,

    divergences of a request  <=  its bound x its emitted tokens + REQUEST_ALLOWANCE
    divergences of a group    <=  its bound x the group's emitted tokens
    divergences of a tenant   <=  sum of bound x emitted tokens over its groups
    divergences of the server <=  sum of bound x emitted tokens over all groups

The group is what holds a caller of many short requests: each of them may differ once before it has earned that, all of
them together not. Callers of one tenant with one bound are one to the budget; tenants tell them apart.

None spends what others earned for a stricter or a looser bound:
- A token earns no bucket more than the bucket's own bound. A request looser than the server, where that is allowed,
  neither fills nor empties the server's bucket, and likewise the bucket of a tenant that it is looser than: its own and
  its group's hold it.
- A request that can have no divergence (it takes no exits, or only checked ones) earns for nobody else.
- A token earns for others once its answer went on after it, or ended there by itself. Those of the last step before a
  client leaves never do: nobody may have read them.

With the kind `regret` the cost is not 1 but the exit's regret in nats; what is not known yet cannot be paid for, so
exits are held, not released.

All sums are of whole numbers, billionths of a divergence (or nat): sums of floats would be off by a rounding, and a
bound that is kept by a rounding is not kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from apparate_llm.config import BoundKind

REQUEST_ALLOWANCE = 1.0  # divergences (or nats) a request may have before it has earned them; 0 where its bound is 0
HORIZON_TOKENS = 2000  # what the server saves up is capped at what this many tokens earn: no burst after a long calm
LEAST_CAPACITY = 4.0
MOST_GROUPS = 64  # of a tenant that are remembered while none of their requests runs
NANO = 10**9
MOST_NATS = 1e9  # that a divergence is charged at


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
    of_tenant: "Bucket | None" = None  # of a request: its tenant's
    of_group: "Bucket | None" = None  # of a request: that of its tenant and bound
    # Of a request: those beside its own that it fills and pays from. Settled at its first token, and kept: what an exit
    # was paid from is where it comes back.
    shared: "tuple[Bucket, ...] | None" = None

    @classmethod
    def of_server(cls, bound: float) -> "Bucket":
        return cls(nano_of(bound), 0, server_capacity_nano(bound), 0)

    @classmethod
    def of_request(cls, bound: float) -> "Bucket":
        allowance = int(REQUEST_ALLOWANCE * NANO) if bound > 0 else 0
        return cls(nano_of(bound), allowance, None, earned_nano=allowance, allowance_nano=allowance)

    @classmethod
    def for_tenant(cls, bound: float, num_tenants: int) -> "Bucket":
        """What all tenants save up is no more than the server does."""
        capacity = max(int(LEAST_CAPACITY / 2 * NANO), server_capacity_nano(bound) // num_tenants)
        return cls(nano_of(bound), 0, capacity, 0)

    @classmethod
    def of_group_with(cls, bound: float) -> "Bucket":
        return cls(nano_of(bound), 0, server_capacity_nano(bound), 0)

    @property
    def balance(self) -> float:
        return self.balance_nano / NANO

    @property
    def earned_by_tokens_nano(self) -> int:
        return self.earned_nano - self.allowance_nano

    def change_bound(self, bound: float) -> None:
        """From now on tokens earn `bound`."""
        self.per_token_nano = nano_of(bound)

    def follow(self, bound: float) -> None:
        """As `change_bound`, and no more is kept than the new bound allows."""
        self.change_bound(bound)
        self.limit(server_capacity_nano(bound))

    def stay_alone(self) -> None:
        """Of a request that can have no divergence: it earns for no other."""
        self.shared = ()

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


class Groups:
    """The bucket of each tenant and bound. A caller may name as many bounds as it likes: of a tenant, the ones that
    were not asked for longest are forgotten, with what they had saved up."""

    def __init__(self) -> None:
        self._of_tenant: dict[str, dict[float | None, Bucket]] = {}  # asked bound -> bucket; the last asked for is last

    def of(self, tenant_name: str, asked: float | None, bound: float) -> Bucket:
        """asked: the bound as it was asked for, None for the server's; bound: what that comes to now."""
        buckets = self._of_tenant.setdefault(tenant_name, {})
        bucket = buckets.pop(asked, None) or Bucket.of_group_with(bound)
        buckets[asked] = bucket
        if len(buckets) > MOST_GROUPS:
            del buckets[next(key for key in buckets if key is not None)]
        return bucket

    def items(self) -> Iterator[tuple[tuple[str, float | None], Bucket]]:
        for tenant_name, buckets in self._of_tenant.items():
            for asked, bucket in buckets.items():
                yield (tenant_name, asked), bucket


class AccuracyBudget:
    """What is shared, and what is paid from it and from a request's own."""

    def __init__(self, accuracy_bound: float, kind: BoundKind = "agreement") -> None:
        self.server = Bucket.of_server(accuracy_bound)
        self.groups = Groups()
        self.kind = kind
        self.spent_nano = 0  # by all requests, less what came back

    @property
    def fill_frac(self) -> float:
        """Share of the server's capacity that is there to be spent, in [0, 1]."""
        return _fill_frac(self.server)

    def fill_frac_of(self, request: Bucket) -> float:
        """The same of what a request may spend: of its group's capacity, where that is less."""
        shared = [bucket for bucket in self._shared(request) if bucket is not request.of_tenant]
        return min(map(_fill_frac, shared), default=0.0)

    def change_bound(self, bound: float) -> None:
        self.server.follow(bound)

    def shared(self) -> list[Bucket]:
        """The server's bucket and those of the groups."""
        return [self.server, *(bucket for _, bucket in self.groups.items())]

    def emit(self, request: Bucket, num_tokens: int) -> None:
        """Tokens of an answer that goes on."""
        self.earn(request, num_tokens)
        self.share(request, num_tokens)

    def earn(self, request: Bucket, num_tokens: int) -> None:
        """Of tokens that may be the last: they earn for their own request, which spends it on later ones only."""
        request.earn(request.per_token_nano * num_tokens)

    def share(self, request: Bucket, num_tokens: int) -> None:
        """What these tokens earned may be spent by others."""
        for bucket in self._shared(request):
            bucket.earn(min(request.per_token_nano, bucket.per_token_nano) * num_tokens)

    def may_release(self, request: Bucket) -> bool:
        return self.kind == "agreement" and self._all_afford(request, NANO)

    def release(self, request: Bucket) -> None:
        assert self.may_release(request), "released an exit that the budget does not allow"
        self._pay(request, NANO)

    def prove_right(self, request: Bucket) -> None:
        """A released exit's verdict agrees with it."""
        self.spent_nano -= NANO
        for bucket in (request, *self._shared(request)):
            bucket.take_back(NANO)

    def verify_divergence(self, request: Bucket, regret_nats: float) -> bool:
        """Whether a held exit that its verdict differs from may be emitted."""
        return self._all_afford(request, self._cost_nano(regret_nats))

    def accept(self, request: Bucket, regret_nats: float) -> None:
        assert self.verify_divergence(request, regret_nats), "accepted a divergence that the budget does not allow"
        self._pay(request, self._cost_nano(regret_nats))

    def _cost_nano(self, regret_nats: float) -> int:
        # What is no number costs the most, too.
        return NANO if self.kind == "agreement" else math.ceil(min(MOST_NATS, regret_nats) * NANO)

    def _shared(self, request: Bucket) -> tuple[Bucket, ...]:
        if request.shared is None:
            rate_nano = request.per_token_nano
            tighter = [bucket for bucket in (request.of_tenant, self.server) if bucket is not None]
            own = [request.of_group] if request.of_group is not None else []
            request.shared = (*own, *(bucket for bucket in tighter if rate_nano <= bucket.per_token_nano))
        return request.shared

    def _all_afford(self, request: Bucket, cost_nano: int) -> bool:
        """The token paid for earns its own request's share first."""
        rate_nano = request.per_token_nano
        return (
            rate_nano > 0
            and request.affords(cost_nano, rate_nano)
            and all(bucket.affords(cost_nano, 0) for bucket in self._shared(request))
        )

    def _pay(self, request: Bucket, cost_nano: int) -> None:
        self.spent_nano += cost_nano
        for bucket in (request, *self._shared(request)):
            bucket.pay(cost_nano)


def _fill_frac(bucket: Bucket) -> float:
    assert bucket.capacity_nano is not None, f"a bucket without a capacity: {bucket}"
    return max(0, bucket.balance_nano) / bucket.capacity_nano
