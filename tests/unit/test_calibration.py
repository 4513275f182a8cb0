import random

import pytest

from apparate_llm.controller.calibration import OnlineCalibration, logit, sigmoid


def feed(calibration: OnlineCalibration, rng: random.Random, count: int, truth) -> list[float]:
    """Verdicts on random confidences, of which truth(confidence) agree; the errors of the predictions before each."""
    errors = []
    for _ in range(count):
        confidence = rng.uniform(0.02, 0.98)
        errors.append(abs(calibration.probability(confidence) - truth(confidence)))
        calibration.observe(confidence, rng.random() < truth(confidence))
    return errors


def test_without_verdicts_the_ramp_is_trusted():
    for confidence in (0.01, 0.5, 0.97):
        assert OnlineCalibration().probability(confidence) == pytest.approx(confidence)
    assert sigmoid(logit(0.0)) < 0.01 and sigmoid(logit(1.0)) > 0.99


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1.0, -1.5), (0.6, 0.8), (1.5, -0.5)])
def test_it_learns_another_calibration_and_keeps_to_it(scale, offset):
    errors = feed(OnlineCalibration(), random.Random(2), 3000, lambda c: sigmoid(scale * logit(c) + offset))
    assert sum(errors[-1500:]) / 1500 < 0.05


def test_a_ramp_that_turns_wrong_while_confident_is_noticed_within_256_verdicts():
    calibration, rng = OnlineCalibration(), random.Random(3)
    for _ in range(5000):
        calibration.observe(0.99, rng.random() < 0.99)
    assert calibration.probability(0.99) > 0.97
    for _ in range(256):
        calibration.observe(0.99, rng.random() < 0.3)
    assert calibration.probability(0.99) == pytest.approx(0.3, abs=0.15)


def test_a_prior_of_another_model_gives_way_sooner_and_is_as_calm_in_the_end():
    def learned(num_verdicts, **given):
        calibration, rng = OnlineCalibration(**given), random.Random(5)
        for _ in range(num_verdicts):
            calibration.observe(0.95, rng.random() < 0.5)
        return calibration

    own, sibling = learned(20), learned(20, prior_verdicts=20.0)
    assert own.probability(0.95) > 0.85 > 0.75 > sibling.probability(0.95) > 0.3
    for calibration in (learned(2000), learned(2000, prior_verdicts=20.0)):
        before = calibration.offset
        calibration.observe(0.5, True)
        assert 0 < calibration.offset - before < 5.0 / 100


def test_it_is_deterministic_and_stays_finite():
    one, two = OnlineCalibration(), OnlineCalibration()
    for calibration in (one, two):
        rng = random.Random(4)
        for _ in range(20_000):
            calibration.observe(rng.choice([0.0, 1e-9, 0.3, 1.0]), rng.random() < 0.5)
    assert one == two
    assert abs(one.scale) < 10 and abs(one.offset) < 10


def test_a_confidence_that_is_no_number_is_not_sure_and_teaches_nothing():
    calibration = OnlineCalibration()
    calibration.observe(float("nan"), True)
    assert calibration == OnlineCalibration()
    assert calibration.probability(float("nan")) == calibration.probability(0.0)
