import json
import math
import random

import numpy as np
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
        more = [curve.of_another(rows) for rows in range(1, ROWS[-1])]
        assert more == pytest.approx(sorted(more)) and sum(more) == pytest.approx(costs[ROWS[-1] - 1] - costs[0])
    curve = CostCurve(tuple(20.0 + rows**1.5 for rows in ROWS))
    for rows in (*range(1, 60), 400):
        assert curve.of_another(rows) == pytest.approx(curve(rows + 1) - curve(rows))


def test_one_slow_pass_over_two_rows_does_not_make_every_second_row_dear():
    curve = CostCurve(PRIOR_PASS_MS)
    curve.observe(1, 100.0)
    curve.observe(2, 700.0)
    for _ in range(40):
        curve.observe(1, 100.0)
    assert curve.of_another(1) < 10.0


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


def test_draft_steps_are_guessed_from_the_depth_until_measured():
    costs = CostModel(num_layers=20)
    assert costs.draft_step_ms(0, 1) < costs.draft_step_ms(2, 1) < costs.verify_ms(1)
    costs.observe_draft_step(0, 1, 1.5)
    assert costs.draft_step_ms(0, 1) == 1.5
    assert costs.draft_step_ms(2, 1) == pytest.approx(0.15 * costs.verify_ms(1))


def test_costs_compare_rightly_on_a_machine_that_changes_its_speed():
    """Twice as slow and back every 400 passes, as a shared host may be; passes with exits fall into slow times."""
    model, rng = CostModel(30), np.random.default_rng(0)
    true_ms = {16: 40.0, 24: 46.0}
    for step in range(4000):
        slowdown = 1.5 - 0.5 * math.cos(2 * math.pi * step / 400)
        rows = 24 if slowdown > 1.5 and step % 3 else 16
        model.observe_verification(rows, true_ms[rows] * slowdown * rng.uniform(0.97, 1.03))
        model.observe_draft_step(0, 16, 2.0 * slowdown)
    assert model.verify_ms(24) / model.verify_ms(16) == pytest.approx(46 / 40, rel=0.04)
    assert model.draft_step_ms(0, 16) / model.verify_ms(16) == pytest.approx(2 / 40, rel=0.1)


def test_a_lasting_change_of_speed_is_the_paces_and_a_new_number_of_rows_its_own():
    model = CostModel(30)
    for _ in range(100):
        model.observe_verification(1, 10.0)
    for _ in range(50):
        model.observe_verification(1, 20.0)
    assert model.verify_ms(1) * model.slowdown == pytest.approx(20.0, rel=0.02)
    before = model.slowdown
    for _ in range(40):
        model.observe_verification(8, 30.0)
        model.observe_verification(1, 20.0)
    assert model.verify_ms(8) * model.slowdown == pytest.approx(30.0, rel=0.02)
    assert model.verify_ms(1) * model.slowdown == pytest.approx(20.0, rel=0.02)
    assert model.slowdown == pytest.approx(before, rel=0.03)


def test_a_single_slow_pass_does_not_make_a_new_number_of_rows_dear():
    curve = CostCurve(PRIOR_PASS_MS)
    for _ in range(40):
        curve.observe(8, 40.0)
    expected = curve(16)
    curve.observe(16, 2 * expected)
    assert curve(16) < 1.25 * expected
    for _ in range(40):
        curve.observe(16, 2 * expected)
    assert curve(16) == pytest.approx(2 * expected, rel=0.1)


def test_a_curve_survives_as_json_and_leaves_what_older_files_hold_besides():
    curve = CostCurve(PRIOR_PASS_MS)
    for ms in [20.0] * 40 + [20.3]:  # the last is too small a change to make the curve anew
        curve.observe(4, ms)
    assert curve.settled != curve.means
    state = json.loads(json.dumps(curve.state()))
    again = CostCurve.from_state({**state, "values": [1.0] * len(ROWS), "settled": [1.0] * len(ROWS)})
    assert json.loads(json.dumps(again.state())) == state
    assert again.settled == again.means == curve.means and again(4) == pytest.approx(curve(4), rel=0.01)
    curve.observe(4, 30.0)
    assert json.loads(json.dumps(again.state())) == state  # what was written is a copy
    with pytest.raises(ValueError, match="16 points"):
        CostCurve.from_state({**state, "seen": []})
