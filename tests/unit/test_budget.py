import random

import pytest

from apparate_llm.controller.budget import AccuracyBudget
from apparate_llm.core import ExitCounts


def test_a_bound_of_zero_allows_no_release():
    assert not AccuracyBudget(0.0).allows_release(ExitCounts(emitted=10**9), num_pending=0)


def test_unverified_exits_count_as_wrong_until_proven_right():
    budget = AccuracyBudget(0.1)
    counts = ExitCounts(emitted=29, released=2)
    assert budget.allows_release(counts, num_pending=0)  # 3 of 30
    assert not budget.allows_release(counts, num_pending=1)  # 4 of 31
    counts.verified = 2
    assert budget.allows_release(counts, num_pending=1)
    counts.diverged = 2
    assert not budget.allows_release(counts, num_pending=1)


def test_exits_that_never_got_their_verdict_stay_counted():
    counts = ExitCounts(emitted=29, released=3, unverified=3)
    assert not AccuracyBudget(0.1).allows_release(counts, num_pending=0)


@pytest.mark.parametrize("bound", [0.01, 0.05, 0.5])
def test_no_course_of_events_breaks_the_bound(bound):
    """Release whenever allowed; every verdict is as bad as chance makes it, some come late, some never."""
    rng = random.Random(1)
    budget, counts = AccuracyBudget(bound), ExitCounts()
    for _ in range(20_000):
        counts.emitted += 1
        if budget.allows_release(counts, num_pending=0):
            counts.released += 1
            counts.emitted += 1
        if counts.outstanding and rng.random() < 0.7:
            if rng.random() < 0.05:
                counts.unverified += 1
            else:
                counts.verified += 1
                counts.diverged += rng.random() < 0.8
        assert counts.diverged <= bound * counts.emitted
        budget.check_integrity(counts)
    assert counts.diverged > 0


def test_overspending_is_seen():
    with pytest.raises(AssertionError, match="overspent"):
        AccuracyBudget(0.1).check_integrity(ExitCounts(emitted=10, released=2, verified=2, diverged=2))
