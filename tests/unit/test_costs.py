import random

import pytest

from apparate_llm.controller.costs import PRIOR_PASS_MS, ROWS, CostCurve, CostModel


def test_before_anything_is_measured_it_is_the_prior():
    curve = CostCurve(PRIOR_PASS_MS)
    assert [curve(rows) for rows in ROWS] == list(PRIOR_PASS_MS)
    assert PRIOR_PASS_MS[4] < curve(7) < PRIOR_PASS_MS[5]
    assert curve(2 * ROWS[-1]) == 2 * curve(ROWS[-1])


def test_one_measurement_scales_the_prior_and_more_replace_it():
    curve = CostCurve(PRIOR_PASS_MS)
    curve.observe(1, 60.0)
    assert curve(8) == pytest.approx(2 * PRIOR_PASS_MS[ROWS.index(8)])
    for rows, ms in ((1, 20.0), (4, 21.0), (8, 24.0), (16, 32.0), (32, 53.0)):
        for _ in range(100):
            curve.observe(rows, ms)
    for rows, ms in ((1, 20.0), (4, 21.0), (8, 24.0), (12, 28.0), (16, 32.0), (32, 53.0)):
        assert curve(rows) == pytest.approx(ms, rel=0.03)
    assert curve.measured().keys() == {1, 4, 8, 16, 32}


def test_more_rows_never_cost_less_whatever_the_noise():
    rng = random.Random(1)
    curve = CostCurve(PRIOR_PASS_MS)
    for _ in range(2000):
        rows = rng.randint(1, 64)
        curve.observe(rows, (20 + rows) * rng.uniform(0.6, 1.6))
        costs = [curve(n) for n in range(1, 300)]
        assert costs == sorted(costs)
        rows = rng.randint(1, 400)
        assert curve.of_another(rows) == pytest.approx(curve(rows + 1) - curve(rows))


def test_a_disturbed_step_counts_for_little():
    curve = CostCurve(PRIOR_PASS_MS)
    for _ in range(40):
        curve.observe(2, 20.0)
    curve.observe(2, 5000.0)
    assert curve(2) < 21.0
    for _ in range(100):
        curve.observe(2, 30.0)
    assert curve(2) == pytest.approx(30.0, rel=0.05)


def test_a_point_that_was_not_seen_for_long_soon_believes_what_it_sees():
    curve = CostCurve(PRIOR_PASS_MS)
    for _ in range(100):
        curve.observe(8, 100.0)  # the machine was busy
    for _ in range(1000):
        curve.observe(1, 20.0)
    for _ in range(6):
        curve.observe(8, 24.0)
    assert curve(8) < 65.0


def test_rounds_are_guessed_from_the_depth_until_measured():
    costs = CostModel(num_layers=20)
    assert costs.round(0, 1) < costs.round(2, 1) < costs.completion(1)
    costs.observe_round(0, 1, 1.5)
    assert costs.round(0, 1) == 1.5
    assert costs.round(2, 1) == pytest.approx(0.15 * costs.completion(1))
