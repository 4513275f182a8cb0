"""Copying: what followed the longest recent match of the last tokens, earlier in the same text.

The idea is prompt lookup decoding's (Saxena 2023). What a short match says is one more input of the ramp, the copy
feature; after a long one the text itself is followed and no ramp asked.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST_MATCH = 6  # tokens; longer matches count as this long to the ramp
LONG_MATCH = 12  # tokens that a text must repeat to be followed
MOST_COUNTED = 32  # of them
TokenIds = NDArray[np.integer]


class Lookup(NamedTuple):
    """What a text has repeated of itself, by its last tokens."""

    token: int  # that followed the longest match, up to LONGEST_MATCH tokens
    length: int  # of that match; 0: none
    start: int  # where the text goes on after the longest match of LONG_MATCH tokens or more
    match: int  # length of that one, up to MOST_COUNTED; 0: none


NO_LOOKUP = Lookup(0, 0, 0, 0)


def look_up(context: TokenIds, most: int = MOST_COUNTED) -> Lookup:
    """Matches of up to `most` of the last tokens with earlier ones, of equally long ones the latest.

    context [n] integers, the newest token last.
    """
    if len(context) < 2:
        return NO_LOOKUP
    token = length = start = match = 0
    ends = np.flatnonzero(context[:-1] == context[-1])  # positions of earlier occurrences of the newest token
    same = 0
    while len(ends) and same < most:
        same, best = same + 1, int(ends[-1])
        if same <= LONGEST_MATCH:
            token, length = int(context[best + 1]), same
        elif same >= LONG_MATCH:
            start, match = best + 1, same
        ends = ends[ends >= same]
        ends = ends[context[ends - same] == context[-1 - same]]
    return Lookup(token, length, start, match)


def looked_up(context: TokenIds) -> tuple[int, int]:
    """(token that followed the longest match of the last tokens, length of the match); length 0: no match."""
    lookup = look_up(context, LONGEST_MATCH)
    return lookup.token, lookup.length


def lookup_confidence(match: int) -> float:
    """Probability that a text which repeats `match` tokens goes on to repeat them, LONG_MATCH at least: roughly what
    68,000 tokens of a model's own answers say."""
    return 1.0 - 1.3 / match


def copies(context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`looked_up(context[: i + 1])` for every i: tokens [n] int32 and lengths [n] int8, in one pass over the text."""
    tokens = np.zeros(len(context), dtype=np.int32)
    lengths = np.zeros(len(context), dtype=np.int8)
    ids = context.tolist()
    latest: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST_MATCH)]
    for i in range(len(ids)):
        for length in range(min(LONGEST_MATCH, i + 1), 0, -1):
            key = tuple(ids[i - length + 1 : i + 1])
            index = latest[length - 1].get(key)
            if index is not None and not lengths[i]:
                tokens[i], lengths[i] = ids[index + 1], length
            latest[length - 1][key] = i
    return tokens, lengths
