"""Intervals: what they cover, when there are none, and what they are over."""

import math

import numpy as np
import pytest
from scipy.stats import t

from apparate_llm.eval.intervals import (
    ENOUGH,
    FEWEST,
    FEWEST_FOR_P99,
    T_975,
    log_mean_interval,
    mean_interval,
    p99_interval,
    ratio_interval,
    sums_of,
    weighted_p99,
)

PER_BLOCK = 8


def measured(rng, num_blocks, *, repeats=1, ratio=0.5, of_block=0.2, of_moment=0.05):
    """TPT of two systems: requests differ, more so between prompts of other blocks, and a moment is slow for both."""
    prompts = np.exp(rng.normal(0, of_block, num_blocks))
    ours, theirs = {}, {}
    for repeat in range(repeats):
        for block in range(num_blocks):
            moment = np.exp(rng.normal(0, of_moment))
            for side, scale in ((ours, ratio * prompts[block]), (theirs, 1.0)):
                side[repeat, block] = (scale * moment * np.exp(rng.normal(0, 0.1, PER_BLOCK))).tolist()
    return ours, theirs


def coverage(interval_of, num_blocks, **settings):
    """Share of 300 evaluations whose interval holds the ratio that many more blocks have."""
    rng = np.random.default_rng(1)
    true_ratio = 0.5 * math.exp(0.2**2 / 2)
    intervals = [interval_of(*measured(rng, num_blocks, **settings)) for _ in range(300)]
    return sum(low <= true_ratio <= high for low, high in intervals) / len(intervals)


def of_blocks(ours, theirs):
    return ratio_interval(sums_of(ours), sums_of(theirs))


def of_requests(ours, theirs):
    """As if each request were a block."""
    alone = [
        {(0, i): [value] for i, value in enumerate(value for values in side.values() for value in values)}
        for side in (ours, theirs)
    ]
    return of_blocks(*alone)


@pytest.mark.parametrize("num_blocks", [FEWEST, 12, 40])
def test_an_interval_over_blocks_holds_the_ratio_as_often_as_it_says(num_blocks):
    assert 0.91 <= coverage(of_blocks, num_blocks) <= 0.985


def test_an_interval_over_requests_would_not():
    assert coverage(of_requests, 12) < 0.75


def test_repeats_of_the_same_blocks_are_no_more_blocks():
    """Each says the same again: the interval is that of their number, not of all there are."""
    assert 0.90 <= coverage(of_blocks, 10, repeats=4) <= 0.99
    one, four = (of_blocks(*measured(np.random.default_rng(3), 10, repeats=n, of_moment=0.0)) for n in (1, 4))
    assert math.log(four[1] / four[0]) > 0.8 * math.log(one[1] / one[0])


def test_blocks_are_drawn_together_so_that_a_slow_moment_is_slow_for_both():
    ours, theirs = measured(np.random.default_rng(0), 30, of_block=0.0, of_moment=1.0)
    low, high = of_blocks(ours, theirs)
    assert high / low < 1.2
    shifted = {(0, (block + 1) % 30): values for (_, block), values in theirs.items()}
    low, high = of_blocks(ours, shifted)
    assert high / low > 2.0


def test_too_few_blocks_have_no_interval():
    rng = np.random.default_rng(0)
    assert of_blocks(*measured(rng, FEWEST - 1)) is None and of_blocks(*measured(rng, FEWEST)) is not None
    ours, theirs = measured(rng, FEWEST)
    assert mean_interval(sums_of(ours)) is not None
    del theirs[0, 3]
    assert of_blocks(ours, theirs) is None  # only units of both are any
    ours[0, 4] = []
    assert mean_interval(sums_of(ours)) is None
    assert of_blocks(*measured(rng, 1, repeats=20)) is None  # one block says nothing of others
    assert of_blocks({}, {}) is None
    zeros = {(0, block): (0.0, 1.0) for block in range(FEWEST)}
    assert ratio_interval(zeros, zeros) is None


def test_a_mean_is_over_requests_however_they_are_spread_over_blocks():
    rng = np.random.default_rng(0)
    values = {(0, block): rng.normal(50, 5, 1 + block % 5).tolist() for block in range(40)}
    low, high = mean_interval(sums_of(values))
    mean = np.mean([value for own in values.values() for value in own])
    assert low < mean < high and high - low < 5


def test_few_blocks_go_by_students_t():
    assert pytest.approx([t.ppf(0.975, n) for n in range(1, ENOUGH)], abs=1e-4) == list(T_975)
    logs = np.log([0.5, 0.52, 0.47, 0.55, 0.49, 0.51, 0.53, 0.5])
    half = t.ppf(0.975, 7) * logs.std(ddof=1) / 8**0.5
    expected = np.exp([logs.mean() - half, logs.mean() + half])
    assert log_mean_interval(logs) == pytest.approx(expected, rel=1e-4)
    # Of blocks that are alike but for their ratio, the linearised one is nearly the same.
    sums = {(0, i): (float(np.exp(log)), 1.0) for i, log in enumerate(logs)}
    assert ratio_interval(sums, dict.fromkeys(sums, (1.0, 1.0))) == pytest.approx(expected, rel=5e-3)
    assert log_mean_interval(logs[:7]) is None
    low, high = log_mean_interval(np.tile(logs, 5))
    assert expected[0] < low < np.exp(logs.mean()) < high < expected[1]


def test_a_p99_needs_many_requests_and_blocks():
    rng = np.random.default_rng(0)
    assert p99_interval(*measured(rng, FEWEST_FOR_P99 // PER_BLOCK)) is None  # 496
    enough = measured(rng, FEWEST_FOR_P99 // PER_BLOCK + 1)
    low, high = p99_interval(*enough)
    p99 = [np.percentile(np.concatenate(list(side.values())), 99) for side in enough]
    assert low <= p99[0] / p99[1] <= high
    failed = {unit: values[:-1] for unit, values in enough[0].items()}
    assert p99_interval(failed, enough[1]) is None
    large = [{(0, block): rng.normal(50, 5, 100).tolist() for block in range(ENOUGH - 1)} for _ in range(2)]
    assert p99_interval(*large) is None
    assert p99_interval(*measured(rng, ENOUGH - 1, repeats=8)) is None  # 19 blocks, eight times


def test_a_p99_of_requests_that_count_several_times_is_numpys_of_as_many():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, weights = np.sort(rng.normal(50, 20, 60)), rng.integers(0, 9, 60)
        assert weighted_p99(values, weights) == pytest.approx(np.percentile(np.repeat(values, weights), 99))
    assert math.isnan(weighted_p99(values, np.zeros(60, dtype=int)))
