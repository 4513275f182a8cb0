"""Prompt lookup: what followed the last tokens where they occurred before in the same text.

The idea is prompt lookup decoding's (Saxena 2023). What followed a short n-gram is one more input of the ramp, the
lookup feature; what followed a long one is taken as it is, and no ramp asked.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_FEATURE_LENGTH = 6  # tokens of an n-gram; longer ones count as this long to the ramp
MIN_LOOKUP_LENGTH = 12  # tokens that a text must repeat for what followed them to be taken
MAX_LOOKUP_LENGTH = 32  # of them that are counted
TokenIds = NDArray[np.integer]


class Lookup(NamedTuple):
    """What a text has repeated of itself, by its last tokens."""

    feature_token: int  # that followed the longest n-gram, up to MAX_FEATURE_LENGTH tokens
    feature_length: int  # of that n-gram; 0: none
    start: int  # where the text goes on after the longest n-gram of MIN_LOOKUP_LENGTH tokens or more
    length: int  # of that one, up to MAX_LOOKUP_LENGTH; 0: none


NO_LOOKUP = Lookup(0, 0, 0, 0)


def look_up(context: TokenIds, most: int = MAX_LOOKUP_LENGTH) -> Lookup:
    """Where up to `most` of the last tokens occurred before, of equally long n-grams the latest.

    context [n] integers, the newest token last.
    """
    if len(context) < 2:
        return NO_LOOKUP
    feature_token = feature_length = start = length = 0
    ends = np.flatnonzero(context[:-1] == context[-1])  # positions of earlier occurrences of the newest token
    same = 0
    while len(ends) and same < most:
        same, best = same + 1, int(ends[-1])
        if same <= MAX_FEATURE_LENGTH:
            feature_token, feature_length = int(context[best + 1]), same
        elif same >= MIN_LOOKUP_LENGTH:
            start, length = best + 1, same
        ends = ends[ends >= same]
        ends = ends[context[ends - same] == context[-1 - same]]
    return Lookup(feature_token, feature_length, start, length)


def lookup_feature(context: TokenIds) -> tuple[int, int]:
    """(token that followed the longest n-gram of the last tokens, its length); length 0: it did not occur before."""
    lookup = look_up(context, MAX_FEATURE_LENGTH)
    return lookup.feature_token, lookup.feature_length


def lookup_confidence(length: int) -> float:
    """Probability that a text which repeats `length` tokens goes on to repeat them, MIN_LOOKUP_LENGTH at least: roughly
    what 68,000 tokens of a model's own answers say."""
    return 1.0 - 1.3 / length


def lookup_features(context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`lookup_feature(context[: i + 1])` for every i: tokens [n] int32, lengths [n] int8, in one pass over the text."""
    tokens = np.zeros(len(context), dtype=np.int32)
    lengths = np.zeros(len(context), dtype=np.int8)
    ids = context.tolist()
    latest: list[dict[tuple[int, ...], int]] = [{} for _ in range(MAX_FEATURE_LENGTH)]
    for i in range(len(ids)):
        for length in range(min(MAX_FEATURE_LENGTH, i + 1), 0, -1):
            key = tuple(ids[i - length + 1 : i + 1])
            index = latest[length - 1].get(key)
            if index is not None and not lengths[i]:
                tokens[i], lengths[i] = ids[index + 1], length
            latest[length - 1][key] = i
    return tokens, lengths
