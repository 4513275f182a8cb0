"""The lookup feature and long matches against their definitions."""

import numpy as np
import pytest

from apparate_llm.ramps.lookup import LONG_MATCH, LONGEST_MATCH, MOST_COUNTED, copies, look_up, looked_up


def by_definition(context):
    """Longest suffix that occurs earlier; of equally long ones the last."""
    for length in range(min(LONGEST_MATCH, len(context) - 1), 0, -1):
        for end in range(len(context) - 2, length - 2, -1):
            if list(context[end - length + 1 : end + 1]) == list(context[-length:]):
                return int(context[end + 1]), length
    return 0, 0


@pytest.mark.parametrize("vocab", [1, 2, 3, 10, 1000])
def test_copies_are_what_followed_the_longest_recent_match(vocab):
    rng = np.random.default_rng(vocab)
    for _ in range(20):
        text = rng.integers(0, vocab, size=rng.integers(1, 60)).astype(np.int32)
        tokens, lengths = copies(text)
        for i in range(len(text)):
            expected = by_definition(text[: i + 1])
            assert looked_up(text[: i + 1]) == expected
            assert (int(tokens[i]), int(lengths[i])) == expected


def test_the_more_recent_of_two_matches_wins_and_a_longer_one_beats_it():
    assert looked_up(np.array([5, 1, 5, 2, 5])) == (2, 1)
    assert looked_up(np.array([9, 5, 1, 7, 5, 2, 9, 5])) == (1, 2)


def test_nothing_is_copied_out_of_nothing():
    assert looked_up(np.array([], dtype=np.int32)) == (0, 0)
    assert looked_up(np.array([4])) == (0, 0)
    assert looked_up(np.array([1, 2, 3])) == (0, 0)


@pytest.mark.parametrize("vocab", [1, 2, 1000])
def test_a_long_match_is_the_longest_and_of_equally_long_ones_the_latest(vocab):
    rng = np.random.default_rng(vocab)
    lengths = set()
    for _ in range(200):
        text = rng.integers(0, vocab, size=rng.integers(1, 60))
        first = rng.integers(0, len(text))
        text = np.append(text, text[first : first + rng.integers(1, 2 * LONG_MATCH)])
        place, length = look_up(text)[2:]
        lengths.add(length)
        matches = [(same_tokens(text, end), end + 1) for end in range(len(text) - 1)]
        longest, start = max(matches, default=(0, 0))
        assert (length, place) == ((longest, start) if longest >= LONG_MATCH else (0, 0))
    assert 0 in lengths and max(lengths) > LONG_MATCH


def same_tokens(text, end):
    """How many tokens up to `end` are those up to the last, MOST_COUNTED at most."""
    same = 0
    while same < min(MOST_COUNTED, end + 1) and text[end - same] == text[-1 - same]:
        same += 1
    return same
