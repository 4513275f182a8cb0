"""Copying: what followed the longest recent match of the last tokens, earlier in the same text.

The idea is prompt lookup decoding's (Saxena 2023). What a short match says is one more input of the ramp, the copy
feature; after a long one the text itself is followed and no ramp asked.
"""

import numpy as np

LONGEST_MATCH = 6  # tokens; longer matches count as this long to the ramp
LONG_MATCH = 12  # tokens that a text must repeat to be followed
MOST_COUNTED = 32  # of them


def copy_of(context: np.ndarray) -> tuple[int, int]:
    """(token that followed the longest match of the last tokens, length of the match); length 0: no match.

    context [n] integers, the newest token last. Of equally long matches (up to LONGEST_MATCH) the most recent one.
    """
    if len(context) < 2:
        return 0, 0
    ends = np.flatnonzero(context[:-1] == context[-1])  # positions of earlier occurrences of the newest token
    length = 0
    while len(ends) and length < LONGEST_MATCH:
        length, best = length + 1, ends[-1]
        if length == LONGEST_MATCH or length >= len(context):
            break
        ends = ends[ends >= length]
        ends = ends[context[ends - length] == context[-1 - length]]
    return (int(context[best + 1]), length) if length else (0, 0)


def long_match(context: np.ndarray) -> tuple[int, int]:
    """(position from which the text is repeated, length of the match) if at least the last LONG_MATCH tokens occurred
    before, else (0, 0). context as for `copy_of`; the longest match, up to MOST_COUNTED, of equally long ones the
    latest."""
    length = 0
    ends = np.flatnonzero(context[:-1] == context[-1])  # positions of earlier occurrences of the newest token
    while len(ends):
        length, best = length + 1, int(ends[-1])
        if length == MOST_COUNTED:
            break
        ends = ends[ends >= length]
        ends = ends[context[ends - length] == context[-1 - length]]
    return (best + 1, length) if length >= LONG_MATCH else (0, 0)


def copied_confidence(match: int) -> float:
    """Probability that a text which repeats `match` tokens goes on to repeat them, LONG_MATCH at least: roughly what
    68,000 tokens of a model's own answers say (docs/ramps.md)."""
    return 1.0 - 1.3 / match


def copies(context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`copy_of(context[: i + 1])` for every i: tokens [n] int32 and lengths [n] int8, in one pass over the text."""
    tokens = np.zeros(len(context), dtype=np.int32)
    lengths = np.zeros(len(context), dtype=np.int8)
    ids = context.tolist()
    latest: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST_MATCH)]
    for i in range(len(ids)):
        for length in range(min(LONGEST_MATCH, i + 1), 0, -1):
            key = tuple(ids[i - length + 1 : i + 1])
            found = latest[length - 1].get(key)
            if found is not None and not lengths[i]:
                tokens[i], lengths[i] = ids[found + 1], length
            latest[length - 1][key] = i
    return tokens, lengths
