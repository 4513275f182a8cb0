"""Values of an evaluation's flags, from their texts; what is wrong with one is said in a line."""

import argparse
from pathlib import Path

from apparate_llm.config import EarlyExitConfig
from apparate_llm.flags import positive

LEAST, MOST = 1e-9, 1e12  # seconds, rates and factors that can be reckoned with
OBJECTIVES = ("ttft", "tpt", "e2e")


def positive_list(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    if not LEAST <= number <= MOST:
        raise argparse.ArgumentTypeError(f"must be a number from {LEAST:g} to {MOST:g}, got {text!r}")
    return number


def temperature(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2, got {text!r}")
    return number


def rates(text: str) -> list[float]:
    return [above_zero(part) for part in text.split(",")]


def shares(text: str) -> list[float]:
    bound = EarlyExitConfig.model_fields["accuracy_bound"]
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = [-1.0]
    if not all(0 <= share < 1 for share in fractions):
        raise argparse.ArgumentTypeError(f"each must be in [0, 1) ({bound.description}), got {text!r}")
    return fractions


def paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(",")]


def objectives(text: str) -> dict[str, float]:
    limits = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in OBJECTIVES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(OBJECTIVES)} (e.g. ttft=200,tpt=20)")
        limits[name] = above_zero(value)
    return limits
