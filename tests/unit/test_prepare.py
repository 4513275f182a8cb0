"""A preparation's flags, records and errors, and how confidence is calibrated."""

import math

import pytest
import torch
from rich.console import Console

from apparate_llm.prepare.calibrate import calibrate_positions, coverage_curve, fit
from apparate_llm.prepare.capture import top_tokens
from apparate_llm.prepare.command import duration, parse_depths
from apparate_llm.prepare.evaluate import calibration_error
from apparate_llm.prepare.pipeline import disk_errors, running
from apparate_llm.prepare.plan import Plan, automatic_aux_layers, automatic_depths
from apparate_llm.prepare.rows import TOP
from apparate_llm.prepare.schedule import WorkClock
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.ramps.load import calibrated, calibrated_all


def test_platt_scaling_recovers_a_known_distortion():
    torch.manual_seed(0)
    confidence = torch.rand(20_000).clamp(0.01, 0.99)
    true = torch.sigmoid(0.5 * torch.logit(confidence) - 0.7)
    scale, offset = fit(confidence, torch.rand(20_000) < true)
    assert scale == pytest.approx(0.5, abs=0.05) and offset == pytest.approx(-0.7, abs=0.05)
    assert fit(torch.empty(0), torch.empty(0, dtype=torch.bool)) == (0.0, 0.0)
    assert fit(confidence, true) == pytest.approx((scale, offset), abs=0.1)


@pytest.mark.parametrize(("low", "agreement"), [(4e-4, 0.34), (5e-4, 0.97), (0.98, 0.02), (1e-9, 0.999)])
def test_platt_scaling_takes_confidence_that_is_far_from_agreement(low, agreement):
    """As of a ramp that was hardly trained."""
    torch.manual_seed(0)
    confidence = low + 0.008 * torch.rand(5000)
    agrees = torch.rand(5000) < agreement
    scale, offset = fit(confidence, agrees)
    probability = calibrated_all(confidence, scale, offset)
    assert float(probability.mean()) == pytest.approx(float(agrees.float().mean()), abs=1e-3)
    assert calibration_error(probability, agrees) < 0.02
    assert calibrated(math.log(0.004), scale, offset) == pytest.approx(
        float(calibrated_all(torch.tensor([0.004]), scale, offset)[0])
    )


def test_a_calibration_of_any_size_gives_a_probability():
    for scale, offset in ((2.4e7, -3.3e6), (-2.4e7, 3.3e6)):
        for value in (-60.0, -7.0, -1e-9, 0.0):
            assert 0.0 <= calibrated(value, scale, offset) <= 1.0


def test_the_calibration_error_is_the_weighted_gap_of_the_bins():
    confidence = torch.tensor([0.05] * 10 + [0.95] * 30)
    agrees = torch.tensor([True] * 5 + [False] * 5 + [True] * 30)
    assert calibration_error(confidence, agrees) == pytest.approx((10 * 0.45 + 30 * 0.05) / 40, abs=1e-6)
    assert calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)) == 0.0


def test_calibration_is_reported_from_conversations_it_was_not_fitted_on():
    """Confidence that means the opposite in the two sets: only the honest error is large."""
    torch.manual_seed(0)
    confidence = torch.where(torch.rand(2000) < 0.5, 0.2, 0.8)
    sure = confidence > 0.5

    def tensors(agrees):
        kind = torch.zeros(2000, dtype=torch.int8)
        return {"0.confidence": confidence, "0.agrees": agrees, "0.conversation": torch.arange(2000), "0.kind": kind}

    assert calibrate_positions(tensors(sure), tensors(sure))["calibration_error"] < 0.05
    result = calibrate_positions(tensors(sure), tensors(~sure))
    assert result["calibration_error"] > 0.7
    assert result["acceptance_rates"] == [pytest.approx(float((~sure).float().mean()))]
    assert result["by_kind"] == {"open": result["acceptance_rates"][0]} and result["rows"] == [2000]


def test_the_coverage_curve_counts_from_the_most_confident_row_on():
    probability = torch.tensor([0.9, 0.1, 0.8, 0.7])
    agrees = torch.tensor([True, False, False, True])
    assert coverage_curve(probability, agrees) == [(0.25, 0.0), (0.5, 0.25), (0.75, 0.25), (1.0, 0.5)]


@pytest.mark.parametrize("vocab", [20, 500, 1024, 5000])
def test_top_tokens_are_those_of_a_sort(vocab):
    torch.manual_seed(vocab)
    logits = torch.randn(7, vocab)
    values, ids = top_tokens(logits, TOP)
    expected = logits.log_softmax(-1).topk(TOP)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(ids, expected.indices)


def test_a_stages_result_counts_only_for_what_it_was_made_from(tmp_path):
    workspace = Workspace(tmp_path / "out")
    assert workspace.read("train", {"groups": 1}) is None
    workspace.write("train", {"groups": 1}, {"loss": 2})
    assert workspace.read("train", {"groups": 1}) == {"loss": 2}
    assert workspace.read("train", {"groups": 2}) is None


def test_two_preparations_cannot_share_a_folder(tmp_path):
    with (
        Workspace(tmp_path).locked(),
        pytest.raises(RuntimeError, match="another preparation"),
        Workspace(tmp_path).locked(),
    ):
        pass


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("1.5h", 5400)])
def test_durations(text, seconds):
    assert duration(text) == seconds


def test_bad_depths_and_durations_say_what_is_allowed():
    import argparse

    for text in ("45", "0m", "m", "-1h", "1d"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"90s, 45m or 1\.5h"):
            duration(text)
    assert parse_depths("4,0", 24) == (0, 4) and parse_depths("auto", 24) == (0, 2)
    for text in ("24", "0,0", "a", "", "-1"):
        with pytest.raises(ValueError, match="numbers from 0 to 23"):
            parse_depths(text, 24)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 28, 80])
def test_depths_chosen_for_a_model_are_different_blocks_of_it(num_layers):
    depths, aux_layers = automatic_depths(num_layers), automatic_aux_layers(num_layers)
    assert list(depths) == sorted({depth for depth in depths if 0 <= depth < num_layers}) and depths[0] == 0
    assert list(aux_layers) == sorted({depth for depth in aux_layers if 0 < depth < num_layers})


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_line_that_says_how_to_go_on(error, tmp_path):
    with pytest.raises(RuntimeError, match="make room and give the same command again"), disk_errors(tmp_path):
        raise error


@pytest.mark.parametrize("name", ["head.safetensors", "train.pt", "empty.pt"])
def test_a_damaged_file_of_a_preparation_is_one_line_that_says_how_to_go_on(name, tmp_path):
    from safetensors.torch import load_file

    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.pt" else b"damaged" * 9)
    with (
        pytest.raises(ValueError, match=r"^a damaged file in .*/work \(.*\): delete that folder") as error,
        disk_errors(tmp_path),
    ):
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"inputs": 1, "result": {}}', '{"inputs": {}}', pytest.param("[" * 99_999, id="nested")]
)
def test_a_damaged_record_of_a_preparation_is_named(text, tmp_path):
    workspace = Workspace(tmp_path / "out")
    workspace.path("clock.json").write_text(text)
    with pytest.raises(ValueError, match=r"damaged .*clock\.json: "):
        WorkClock(workspace)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(ValueError, match="other"), disk_errors(tmp_path):
        raise ValueError("other")


def test_a_preparation_that_goes_on_knows_how_long_it_has_worked(tiny_llama, tmp_path):
    workspace = Workspace(tmp_path / "out")
    workspace.write("clock", {}, {"seconds": 1000.0})
    plan = Plan(tiny_llama, tmp_path / "out", (0,), (1,), None, 2700.0, 0, 8192, 64)
    with running(plan, workspace, Console(quiet=True)) as run:
        assert run.progress.before_s == 1000.0 <= run.clock.spent_s < 1100.0
        assert 1600.0 < run.progress.left_s() <= 1700.0
