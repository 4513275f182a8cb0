"""Mixes of callers on one server: none has more divergences than its own tokens earned, whatever the others send."""

import random
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from vllm.sampling_params import SamplingParams

from apparate_llm.config import EarlyExitConfig, parse_config
from apparate_llm.controller.budget import REQUEST_ALLOWANCE, AccuracyBudget
from apparate_llm.engine.runtime_config import admit_request, apply_to_requests
from apparate_llm.exits.ledger import RequestExits, VerdictLedger
from apparate_llm.exits.tenants import shares_of

NUM_STEPS = 6000
SHORT, LONG = 10, 400


@dataclass
class Caller:
    """Sends one request after the other."""

    bound: float  # what it is held to
    num_tokens: int  # of each request
    diverges: bool = True  # whenever it may
    options: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=lambda: {"temperature": 0.0})
    request: RequestExits | None = None
    left: int = 0  # tokens of the request
    outstanding: int = 0
    emitted: int = 0
    at_worst: int = 0  # divergences, and exits without a verdict
    at_worst_in_request: int = 0

    def step(self, config: EarlyExitConfig, ledger: VerdictLedger, rng: random.Random) -> None:
        """Emits one token, or one and an exit."""
        budget = ledger.budget
        if self.left <= 0:
            params = SamplingParams(extra_args=self.options, **self.sampling)
            self.request, self.left = admit_request(params, config, ledger), self.num_tokens
            ledger.requests[str(id(self))] = self.request
            self.outstanding = self.at_worst_in_request = 0  # what had no verdict stays paid
        bucket = self.request.bucket
        budget.emit(bucket, 1)
        self.emitted, self.left = self.emitted + 1, self.left - 1
        may = self.diverges and self.request.releasable and self.request.takes_exits and self.left > 0
        if may and rng.random() < 0.5 and budget.verify_divergence(bucket, 1.0):
            budget.accept(bucket, 1.0)
            budget.emit(bucket, 1)
            self.count(1)
        elif may and budget.may_release(bucket):
            budget.release(bucket)
            budget.emit(bucket, 1)
            self.count(1)
            self.outstanding += 1
        if self.outstanding and rng.random() < 0.5:
            self.outstanding -= 1
            if rng.random() < 0.5:
                budget.prove_right(bucket)
                self.at_worst, self.at_worst_in_request = self.at_worst - 1, self.at_worst_in_request - 1

    def count(self, at_worst: int) -> None:
        self.emitted, self.left = self.emitted + 1, self.left - 1
        self.at_worst, self.at_worst_in_request = self.at_worst + at_worst, self.at_worst_in_request + at_worst

    def check(self) -> None:
        bound, in_request = Fraction(str(self.bound)), self.num_tokens - self.left
        assert self.at_worst <= bound * self.emitted, f"{self.at_worst} of {self.emitted} with bound {self.bound}"
        assert self.at_worst_in_request <= bound * in_request + Fraction(REQUEST_ALLOWANCE)


def strict(**options):
    return Caller(0.01, SHORT, options=options)


LOOSER = {"allow_looser_requests": True}
TWO_TENANTS = {"accuracy_bound": 0.05, "tenants": {"tight": {"accuracy_bound": 0.01}, "wide": {"accuracy_bound": 0.05}}}
MIXES = {
    "a looser one that has no use for it": (
        LOOSER,
        [strict(), Caller(0.5, LONG, diverges=False, options={"accuracy_bound": 0.5})],
    ),
    "a looser one that spends": (LOOSER, [strict(), Caller(0.3, LONG, options={"accuracy_bound": 0.3})]),
    "several looser ones": (
        LOOSER,
        [strict(), *(Caller(bound, SHORT, options={"accuracy_bound": bound}) for bound in (0.02, 0.1, 0.4))],
    ),
    "one without exits": ({}, [strict(), Caller(0.0, LONG, options={"early_exit": 0})]),
    "a lossless one": ({}, [strict(), Caller(0.0, LONG, options={"accuracy_bound": 0.0})]),
    "one that samples": ({}, [strict(), Caller(0.0, LONG, sampling={"temperature": 1.0})]),
    "one that wants scores": ({}, [strict(), Caller(0.0, LONG, sampling={"temperature": 0.0, "logprobs": 1})]),
    "a stricter one beside the server's bound": (
        {"accuracy_bound": 0.1},
        [strict(accuracy_bound=0.01), Caller(0.1, LONG, diverges=False)],
    ),
    "a stricter one in a tenant": (
        TWO_TENANTS,
        [
            strict(early_exit_tenant="wide", accuracy_bound=0.01),
            Caller(0.05, LONG, diverges=False, options={"early_exit_tenant": "wide"}),
            Caller(0.01, LONG, diverges=False, options={"early_exit_tenant": "tight"}),
        ],
    ),
    "one that is looser than its tenant": (
        {**TWO_TENANTS, **LOOSER},
        [
            strict(early_exit_tenant="tight"),
            Caller(0.5, LONG, diverges=False, options={"early_exit_tenant": "tight", "accuracy_bound": 0.5}),
        ],
    ),
    "a tenant without exits": (
        {"accuracy_bound": 0.01, "tenants": {"batch": {"early_exit": 0}}},
        [strict(), Caller(0.0, LONG, options={"early_exit_tenant": "batch"})],
    ),
}


@pytest.mark.parametrize("mix", MIXES)
def test_each_caller_is_held_to_its_own_bound(mix):
    options, callers = MIXES[mix]
    config = parse_config({"accuracy_bound": 0.01, **options})
    ledger = VerdictLedger(AccuracyBudget(config.accuracy_bound), shares_of(config))
    rng = random.Random(1)
    for _ in range(NUM_STEPS):
        for caller in rng.sample(callers, len(callers)):
            caller.step(config, ledger, rng)
            caller.check()
    for bucket in [ledger.budget.server, *(caller.request.bucket for caller in callers)]:
        bucket.check_integrity()
    for caller in callers:
        if caller.diverges and caller.bound > 0:  # and what it has earned it may spend
            assert caller.at_worst >= 0.9 * caller.bound * caller.emitted - 1


def test_a_bound_changed_while_serving_holds_for_each_caller_from_then_on():
    config = parse_config({"accuracy_bound": 0.1, "allow_looser_requests": True})
    ledger = VerdictLedger(AccuracyBudget(config.accuracy_bound), shares_of(config))
    rng = random.Random(2)
    callers = [Caller(0.1, LONG), Caller(0.3, LONG, options={"accuracy_bound": 0.3}), Caller(0.1, SHORT)]

    def run(config):
        before = [(caller.emitted, caller.at_worst) for caller in callers]
        for _ in range(NUM_STEPS):
            for caller in callers:
                caller.step(config, ledger, rng)
        return [
            (caller.at_worst - at_worst) / (caller.emitted - emitted)
            for caller, (emitted, at_worst) in zip(callers, before, strict=True)
        ]

    at_first = run(config)
    assert at_first[0] + at_first[2] <= 0.2 and 0.25 < at_first[1] <= 0.3
    for changes, bounds in (({"accuracy_bound": 0.01}, (0.01, 0.3)), ({"allow_looser_requests": False}, (0.01, 0.01))):
        config = config.model_copy(update=changes)
        apply_to_requests(ledger, config)
        shares = run(config)
        saved_up = 40 / NUM_STEPS  # at most, of before
        assert (shares[0] + shares[2]) / 2 <= bounds[0] + saved_up and shares[1] <= bounds[1] + saved_up


def test_bounds_that_nobody_asks_for_any_more_are_forgotten():
    """A caller may name as many as it likes."""
    config = parse_config({"accuracy_bound": 0.5})
    ledger = VerdictLedger(AccuracyBudget(0.5))
    own = admit_request(SamplingParams(temperature=0.0), config, ledger).bucket
    ledger.budget.emit(own, 100)
    for number in range(1000):
        params = SamplingParams(temperature=0.0, extra_args={"accuracy_bound": 0.1 + number / 1e5})
        ledger.budget.emit(admit_request(params, config, ledger).bucket, 1)
    assert len(ledger.budget.shared()) < 100
    assert admit_request(SamplingParams(temperature=0.0), config, ledger).bucket.of_group is own.of_group
