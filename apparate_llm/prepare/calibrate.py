"""A ramp's confidence -> probability of agreeing with the full model, per position, fitted by Platt scaling.

Stage calibrate fits on validation conversations and reports what it gives on test conversations.
`ramps calibrate` then moves them towards what given prompts say.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from apparate_llm.prepare.chat import Chat
from apparate_llm.prepare.evaluate import (
    answer,
    calibration_error,
    mean,
    measure,
    pooled_calibration,
    served_ramps,
    with_progress,
)
from apparate_llm.prepare.prompts import KINDS
from apparate_llm.prepare.recorded import num_positions
from apparate_llm.prepare.records import CalibrationRecord
from apparate_llm.progress import Progress
from apparate_llm.ramps.checkpoint import RampManifest
from apparate_llm.ramps.load import calibrated_all

CURVE_POINTS = 50
BINS = 15
RIDGE = 1e-3  # keeps a fit finite where agreement can be told from confidence without an error


def fit(confidence: torch.Tensor, agrees: torch.Tensor) -> tuple[float, float]:
    """Platt scaling: (scale, offset) of sigmoid(scale * logit(confidence) + offset), by Newton's method with steps that
    are halved until they help: where confidence is far from agreement, a whole one leads away for good.

    agrees: [rows] bool, or the probability of it.
    """
    with torch.inference_mode(False):
        x = torch.logit(confidence.double().clone(), eps=1e-6)
        y = agrees.double().clone()
        design = torch.stack([x, torch.ones_like(x)], dim=1)
        weights = torch.tensor([1.0, 0.0], dtype=torch.float64)

        def loss(weights: torch.Tensor) -> float:
            logits = design @ weights
            return float((torch.nn.functional.softplus(logits) - y * logits).sum() + RIDGE / 2 * weights @ weights)

        for _ in range(50):
            p = torch.sigmoid(design @ weights)
            gradient = design.T @ (p - y) + RIDGE * weights
            hessian = (design * (p * (1 - p))[:, None]).T @ design + RIDGE * torch.eye(2, dtype=torch.float64)
            step, before = torch.linalg.solve(hessian, gradient), loss(weights)
            while loss(weights - step) > before and step.abs().max() >= 1e-9:
                step = step / 2
            weights = weights - step
            if step.abs().max() < 1e-9:
                break
    return float(weights[0]), float(weights[1])


def coverage_curve(probability: torch.Tensor, agrees: torch.Tensor) -> list[tuple[float, float]]:
    """(share of rows that exit, share of all rows whose exit is a divergence), for falling thresholds."""
    if not len(probability):
        return []
    order = probability.argsort(descending=True)
    divergence_frac = (~agrees[order]).double().cumsum(0) / len(order)
    places = np.unique(np.linspace(1, len(order), CURVE_POINTS).astype(int)) - 1
    return [((place + 1) / len(order), float(divergence_frac[place])) for place in places.tolist()]


def reliability(probability: torch.Tensor, agrees: torch.Tensor) -> list[tuple[float, float, int]]:
    """(mean probability, agreement, rows) of each bin that has rows."""
    place = (probability * BINS).long().clamp(max=BINS - 1)
    points = []
    for number in range(BINS):
        inside = place == number
        if inside.any():
            points.append((float(probability[inside].mean()), float(agrees[inside].double().mean()), int(inside.sum())))
    return points


def calibrate_positions(fitted_on: dict[str, torch.Tensor], measured: dict[str, torch.Tensor]) -> CalibrationRecord:
    """Calibration fitted on validation conversations; everything else is measured on test conversations.

    Both: per position N, `N.confidence`, `N.agrees`, `N.conversation` and `N.kind`, each [rows].
    """
    calibration, rates, rows, tested = [], [], [], []
    for number in range(num_positions(measured)):
        calibration.append(fit(fitted_on[f"{number}.confidence"], fitted_on[f"{number}.agrees"]))
        confidence, agrees = measured[f"{number}.confidence"], measured[f"{number}.agrees"]
        rates.append(mean(agrees))
        rows.append(len(agrees))
        tested.append((calibrated_all(confidence, *calibration[-1]), agrees))
    probability, agrees = (torch.cat(part) for part in zip(*tested, strict=True))
    first, kinds = measured["0.agrees"], measured["0.kind"]
    return {
        "calibration": calibration,
        "acceptance_rates": rates,
        "rows": rows,
        "calibration_error": calibration_error(probability, agrees),
        "reliability": reliability(probability, agrees),
        "coverage": coverage_curve(*tested[0]),
        "by_kind": {
            kind: value for number, kind in enumerate(KINDS) if (value := mean(first[kinds == number])) is not None
        },
    }


def recalibrate(
    folder: Path,
    manifest: RampManifest,
    model: Path,
    prompts: Sequence[Chat],
    *,
    max_tokens: int,
    progress: Progress,
) -> tuple[RampManifest, dict[int, tuple[float, float]]]:
    """The manifest with its calibration moved half-way to what the model's greedy answers say, and the calibration
    error of each depth on them (before, after).

    Half-way: for every row, whether the ramp agreed counts as much as the probability it had.
    """
    answered = answer(model, manifest, prompts, max_tokens=max_tokens, progress=progress)
    calibration, errors = dict(manifest.calibration), {}
    for depth in with_progress(progress, manifest.depths):
        ramps = served_ramps(folder, manifest, answered, depth)
        measured = measure(answered, ramps)
        fitted = []
        for number, part in enumerate(measured):
            had = ramps.calibration[min(number, len(ramps.calibration) - 1)]
            expected = calibrated_all(part.confidence, *had)
            fitted.append(fit(part.confidence, (expected + part.agrees.double()) / 2) if len(part.rows) else had)
        calibration[depth] = fitted
        before = calibration_error(*pooled_calibration(measured, ramps.calibration))
        errors[depth] = (before, calibration_error(*pooled_calibration(measured, fitted)))
    on = {"prompts": len(answered.prompts), "answer_tokens": answered.answer_tokens}
    training = {**manifest.training, "recalibrated": [*manifest.training.get("recalibrated", []), on]}
    return manifest.model_copy(update={"calibration": calibration, "training": training}), errors
