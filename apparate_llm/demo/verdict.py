"""What the demo's answers say, in one line that is no more exact than they are."""

from collections.abc import Sequence
from statistics import median

from apparate_llm.chat import Answer

WORTH = 1.05  # a ratio below it is not told as a gain


def verdict(off: Sequence[Answer], on: Sequence[Answer]) -> str:
    """`TPT 21.0 ms without exits, 12.1 ms with: 1.7x as fast; texts identical`. Answers of the same number on both
    sides, asked in turns; each has a time per token."""
    slow, fast = times(off), times(on)
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    times_text = f"TPT {figure(slow, 1)} ms without exits, {figure(fast, 1)} ms with"
    return f"{times_text}: {gain(ratios)}; {sameness(off, on)}"


def times(answers: Sequence[Answer]) -> list[float]:
    measured = [answer.tpt_ms for answer in answers]
    assert None not in measured, "an answer without a time"
    return [time for time in measured if time is not None]


def gain(ratios: Sequence[float]) -> str:
    """Of TPT without exits over TPT with, one ratio for each turn."""
    if min(ratios) > 1 and median(ratios) >= WORTH:
        return f"{figure(ratios, 1, fewest=1)}x as fast"
    if median(ratios) < 1 / WORTH and max(ratios) < 1:
        return f"exits do not help here, they make it slower ({figure(ratios, 1, fewest=1)}x as fast)"
    return f"no clear difference, exits do not help here ({figure(ratios, 1, fewest=1)}x as fast)"


def figure(values: Sequence[float], places: int, *, fewest: int = 0) -> str:
    """The median with as many decimals as the values agree on, `places` at most; their range where they agree on fewer
    than `fewest`."""
    half = (max(values) - min(values)) / 2
    for number in range(places, fewest - 1, -1):
        if half <= 10.0**-number + 1e-9:  # of rounding
            return f"{median(values):.{number}f}"
    return f"{min(values):.{fewest}f} to {max(values):.{fewest}f}"


def sameness(off: Sequence[Answer], on: Sequence[Answer]) -> str:
    texts = {answer.text for answer in off}
    if len(texts) > 1:
        return "texts without exits differ among themselves"
    different = sum(answer.text not in texts for answer in on)
    return f"{different} of {len(on)} texts differ" if different else "texts identical"
