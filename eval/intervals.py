"""95 % intervals over what was measured together: blocks of requests, or turns, of both systems.

Requests of a block share its batches and its moment, so they are not independent. What is drawn anew is whole blocks,
the same of either system. Their figures are ratios of sums, so blocks may be of different size.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 0
FEWEST = 8  # units that an interval needs
ENOUGH = 20  # units for a bootstrap; with fewer, Student's t of a linearised ratio
FEWEST_FOR_P99 = 500  # requests of either system
# Student's t, 97.5th percentile, by degrees of freedom from 1 on.
T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930),
)

Samples = NDArray[np.float64]
Interval = tuple[float, float]
Unit = tuple[int, int]  # (repeat, block) of either system's requests
Values = Mapping[Unit, Sequence[float]]  # of the requests of each unit
Sums = Mapping[Unit, tuple[float, float]]  # of each unit: a total, and the number or time that it is over


def sums_of(values: Values) -> dict[Unit, tuple[float, float]]:
    """For the mean over all requests; a unit without any is left out."""
    return {unit: (float(sum(own)), float(len(own))) for unit, own in values.items() if own}


def mean_interval(ours: Sums) -> Interval | None:
    """Of total / number, which must be above 0; None where there are too few units."""
    return ratio_interval(ours, dict.fromkeys(ours, (1.0, 1.0)))


def mean_ratio(ours: Sums, baseline: Sums) -> float | None:
    """(total / number) / (the baseline's), over the units of both; None where it is not known."""
    units = ours.keys() & baseline.keys()
    (total, number), (base_total, base_number) = (
        [sum(side[unit][part] for unit in units) for part in (0, 1)] for side in (ours, baseline)
    )
    return total / number / (base_total / base_number) if number and base_number and base_total else None


def p99_ratio(ours: Values, baseline: Values) -> float | None:
    """Of the 99th percentiles over the requests of units of both; None where it is not known."""
    units = ours.keys() & baseline.keys()
    values, base_values = ([value for unit in units for value in side[unit]] for side in (ours, baseline))
    if not values or not base_values:
        return None
    return float(np.percentile(values, 99) / np.percentile(base_values, 99))


def ratio_interval(ours: Sums, baseline: Sums) -> Interval | None:
    """Of (total / number) / (the baseline's), over the units of both, drawn together; None where there are too few.

    With several repeats block numbers are drawn as well, each with all its repeats, as the same prompts say the same
    again; of the two intervals it is the wider.
    """
    units = sorted(ours.keys() & baseline.keys())
    table = np.array([(*ours[unit], *baseline[unit]) for unit in units]).reshape(-1, 4).T
    intervals = []
    for groups, fewest in zip(_drawings(units), (FEWEST, 2), strict=False):
        sums = np.array([np.bincount(groups, weights=row) for row in table])
        if sums.shape[1] < fewest:
            return None
        intervals.append(_resampled(sums) if sums.shape[1] >= ENOUGH else _linearised(sums))
    return _widest(intervals)


def p99_interval(ours: Values, baseline: Values) -> Interval | None:
    """Of the ratio of 99th percentiles over requests; None under 500 requests of either, or 20 units."""
    units = sorted(ours.keys() & baseline.keys())
    if min(sum(len(side[unit]) for unit in units) for side in (ours, baseline)) < FEWEST_FOR_P99:
        return None
    intervals = []
    for groups in _drawings(units):
        size = int(groups.max()) + 1
        if size < ENOUGH:
            return None
        drawn = np.random.default_rng(SEED).multinomial(size, [1 / size] * size, RESAMPLES)
        above, below = (_p99_by_draw([side[unit] for unit in units], drawn[:, groups]) for side in (ours, baseline))
        intervals.append(_middle(above / below))
    return _widest(intervals)


def log_mean_interval(logs: Samples) -> Interval | None:
    """Of exp(mean) over units [n]: a geometric mean."""
    n = len(logs)
    if n < FEWEST:
        return None
    if n < ENOUGH:
        half = T_975[n - 2] * float(logs.std(ddof=1)) / n**0.5
        return float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))
    return bootstrap(logs[None], lambda sample: np.exp(sample[0].mean(-1)))


def bootstrap(columns: Samples, statistic: Callable[[Samples], Samples]) -> Interval:
    """Percentiles over paired samples [variables, n]; statistic: of [variables, resamples, n]."""
    n = columns.shape[1]
    drawn = np.random.default_rng(SEED).integers(0, n, (RESAMPLES, n))
    return _middle(statistic(columns[:, drawn]))


def _drawings(units: list[Unit]) -> list[NDArray[np.intp]]:
    """Group of each unit, drawn as one: each unit by itself, and where there are repeats those of a block together."""
    drawings = [np.arange(len(units))]
    if len({repeat for repeat, _ in units}) > 1:
        drawings.append(np.unique([block for _, block in units], return_inverse=True)[1])
    return drawings


def _resampled(sums: Samples) -> Interval | None:
    """sums [4, n]: total and number of ours, and of the baseline."""
    n = sums.shape[1]
    drawn = np.random.default_rng(SEED).integers(0, n, (RESAMPLES, n))
    total, number, base_total, base_number = sums[:, drawn].sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (total / number) / (base_total / base_number)
    known = ratios[np.isfinite(ratios)]
    return _middle(known) if len(known) else None


def _linearised(sums: Samples) -> Interval | None:
    """Of the ratio's logarithm, by Student's t with n - 1 degrees of freedom."""
    n = sums.shape[1]
    total, number, base_total, base_number = sums
    if not (total.sum() > 0 and base_total.sum() > 0):
        return None
    mean, base_mean = total.sum() / number.sum(), base_total.sum() / base_number.sum()
    influence = (total - mean * number) / total.sum() - (base_total - base_mean * base_number) / base_total.sum()
    half = T_975[n - 2] * float(np.sqrt(n / (n - 1) * (influence**2).sum()))
    ratio = mean / base_mean
    return float(ratio * np.exp(-half)), float(ratio * np.exp(half))


def _p99_by_draw(values: list[Sequence[float]], weights: NDArray[np.int64]) -> Samples:
    """[draws] of requests that count as often as their unit was drawn: weights [draws, units]."""
    unit_of = np.repeat(np.arange(len(values)), [len(own) for own in values])
    flat = np.concatenate([np.asarray(own, dtype=float) for own in values])
    order = np.argsort(flat)
    return np.array([weighted_p99(flat[order], row[unit_of[order]]) for row in weights])


def weighted_p99(ordered: Samples, weights: NDArray[np.int64]) -> float:
    """numpy's, of values in order, each `weights` times; NaN where none is left."""
    ends = np.cumsum(weights)
    if not ends[-1]:
        return float("nan")
    at = 0.99 * (ends[-1] - 1)
    low, high = ordered[np.searchsorted(ends, [np.floor(at), np.ceil(at)], side="right")]
    return float(low + (at - np.floor(at)) * (high - low))


def _middle(values: Samples) -> Interval:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _widest(intervals: Sequence[Interval | None]) -> Interval | None:
    """None where one of them is."""
    known = [edges for edges in intervals if edges is not None]
    return max(known, key=lambda edges: edges[1] - edges[0]) if len(known) == len(intervals) else None
