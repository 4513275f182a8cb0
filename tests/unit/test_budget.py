import random
from fractions import Fraction

import pytest

from apparate_llm.controller.budget import HORIZON_TOKENS, NANO, AccuracyBudget, Bucket


def test_a_bound_of_zero_allows_nothing():
    budget, request = AccuracyBudget(0.0), Bucket.of_request(0.0)
    budget.emit(request, 10**9)
    assert not budget.may_release(request)
    assert not budget.verify_divergence(request, 0.0)


def test_unverified_exits_count_as_wrong_until_proven_right():
    budget, request = AccuracyBudget(0.1), Bucket.of_request(0.1)
    budget.emit(request, 10)
    budget.release(request)
    budget.emit(request, 1)  # the exit: 1 of 11
    assert not budget.may_release(request)
    budget.emit(request, 8)
    assert not budget.may_release(request)  # 2 of 20 would be too many
    budget.prove_right(request)
    assert budget.may_release(request)


def test_a_request_has_its_own_bound_and_a_small_allowance():
    budget, request = AccuracyBudget(0.1), Bucket.of_request(0.01)
    budget.emit(Bucket.of_request(0.1), 1000)  # the server could afford 100
    budget.release(request)  # the allowance
    assert not budget.may_release(request)
    budget.emit(request, 99)
    assert budget.may_release(request)
    assert not budget.may_release(Bucket.of_request(0.0))


def test_a_calm_server_saves_up_only_so_much():
    budget, request = AccuracyBudget(0.05), Bucket.of_request(0.05)
    budget.emit(request, 1_000_000)
    spent = 0
    while budget.verify_divergence(request, 1.0):
        budget.accept(request, 1.0)
        spent += 1
    assert spent == HORIZON_TOKENS * 0.05


def test_a_looser_request_brings_what_it_may_spend():
    budget, request = AccuracyBudget(0.0), Bucket.of_request(0.5)
    budget.emit(request, 4)
    assert budget.may_release(request)
    assert not budget.may_release(Bucket.of_request(0.0))


def test_by_regret_only_what_is_known_is_paid_for():
    budget, request = AccuracyBudget(0.01, "regret"), Bucket.of_request(0.01)
    budget.emit(request, 100)
    assert not budget.may_release(request)
    assert budget.verify_divergence(request, 0.7)
    budget.accept(request, 0.7)
    assert not budget.verify_divergence(request, 0.7)
    assert budget.verify_divergence(request, 0.2)


@pytest.mark.parametrize("regret_nats", [float("inf"), float("nan")])
def test_a_regret_that_is_no_number_cannot_be_paid(regret_nats):
    budget, request = AccuracyBudget(0.9, "regret"), Bucket.of_request(0.9)
    budget.emit(request, 10**6)
    assert budget.verify_divergence(request, 1.0)
    assert not budget.verify_divergence(request, regret_nats)


@pytest.mark.parametrize("bound", [0.01, 0.05, 0.07, 0.29, 0.5])
def test_no_course_of_events_breaks_a_bound(bound):
    """Spend whenever allowed; every verdict is as bad as chance makes it, some come late, some never."""
    rng = random.Random(1)
    budget = AccuracyBudget(bound)
    requests = [Bucket.of_request(bound) for _ in range(4)]
    emitted, at_worst, outstanding = [0] * 4, [0] * 4, [0] * 4
    for _ in range(20_000):
        i = rng.randrange(4)
        request = requests[i]
        if budget.verify_divergence(request, 0.3) and rng.random() < 0.3:
            budget.accept(request, 0.3)
            at_worst[i] += 1
        emitted[i] += 1
        budget.emit(request, 1)
        if budget.may_release(request):
            budget.release(request)
            outstanding[i] += 1
            emitted[i] += 1
            budget.emit(request, 1)
        if outstanding[i] and rng.random() < 0.7:
            outstanding[i] -= 1
            if rng.random() < 0.2:
                budget.prove_right(request)
            else:
                at_worst[i] += 1  # a divergence, or its request ended before the verdict
        exact = Fraction(str(bound))  # a bound of floats could be kept by a rounding
        assert at_worst[i] + outstanding[i] <= exact * emitted[i] + 1
        assert sum(at_worst) + sum(outstanding) <= exact * sum(emitted)
        budget.server.check_integrity()
        request.check_integrity()
    assert sum(at_worst) > 0.3 * bound * sum(emitted)


@pytest.mark.parametrize("percent", range(1, 100))
def test_just_so_many_tokens_earn_a_divergence(percent):
    """By sums of floats it would be one more or less for some bounds."""
    budget, request, emitted = AccuracyBudget(percent / 100), Bucket.of_request(percent / 100), 0
    while not budget.verify_divergence(request, 0.0):
        budget.emit(request, 1)
        emitted += 1
    assert emitted == -(-100 // percent)


def test_tokens_that_may_be_the_last_earn_for_their_own_request_only():
    budget, request, other = AccuracyBudget(0.1), Bucket.of_request(0.1), Bucket.of_request(0.1)
    budget.earn(request, 10)
    assert budget.server.balance == 0 and request.earned_by_tokens_nano == NANO
    assert not budget.may_release(request) and not budget.may_release(other)
    budget.share(request, 10)
    assert budget.may_release(other)


def test_overspending_is_seen():
    budget, request = AccuracyBudget(0.1), Bucket.of_request(0.1)
    with pytest.raises(AssertionError, match="does not allow"):
        budget.release(request)
    budget.server.pay(NANO)
    with pytest.raises(AssertionError, match="overspent"):
        budget.server.check_integrity()
