"""The lookup feature and long n-grams against their definitions."""

import numpy as np
import pytest

from apparate_llm.ramps.lookup import (
    MAX_FEATURE_LENGTH,
    MAX_LOOKUP_LENGTH,
    MIN_LOOKUP_LENGTH,
    look_up,
    lookup_feature,
    lookup_features,
)


def by_definition(context):
    """Longest suffix that occurs earlier; of equally long ones the last."""
    for length in range(min(MAX_FEATURE_LENGTH, len(context) - 1), 0, -1):
        for end in range(len(context) - 2, length - 2, -1):
            if list(context[end - length + 1 : end + 1]) == list(context[-length:]):
                return int(context[end + 1]), length
    return 0, 0


@pytest.mark.parametrize("vocab", [1, 2, 3, 10, 1000])
def test_the_feature_is_what_followed_the_longest_recent_n_gram(vocab):
    rng = np.random.default_rng(vocab)
    for _ in range(20):
        text = rng.integers(0, vocab, size=rng.integers(1, 60)).astype(np.int32)
        tokens, lengths = lookup_features(text)
        for i in range(len(text)):
            expected = by_definition(text[: i + 1])
            assert lookup_feature(text[: i + 1]) == expected
            assert (int(tokens[i]), int(lengths[i])) == expected


def test_the_more_recent_of_two_n_grams_wins_and_a_longer_one_beats_it():
    assert lookup_feature(np.array([5, 1, 5, 2, 5])) == (2, 1)
    assert lookup_feature(np.array([9, 5, 1, 7, 5, 2, 9, 5])) == (1, 2)


def test_nothing_is_looked_up_in_nothing():
    assert lookup_feature(np.array([], dtype=np.int32)) == (0, 0)
    assert lookup_feature(np.array([4])) == (0, 0)
    assert lookup_feature(np.array([1, 2, 3])) == (0, 0)


@pytest.mark.parametrize("vocab", [1, 2, 1000])
def test_a_long_n_gram_is_the_longest_and_of_equally_long_ones_the_latest(vocab):
    rng = np.random.default_rng(vocab)
    lengths = set()
    for _ in range(200):
        text = rng.integers(0, vocab, size=rng.integers(1, 60))
        first = rng.integers(0, len(text))
        text = np.append(text, text[first : first + rng.integers(1, 2 * MIN_LOOKUP_LENGTH)])
        place, length = look_up(text)[2:]
        lengths.add(length)
        ends = [(same_tokens(text, end), end + 1) for end in range(len(text) - 1)]
        longest, start = max(ends, default=(0, 0))
        assert (length, place) == ((longest, start) if longest >= MIN_LOOKUP_LENGTH else (0, 0))
    assert 0 in lengths and max(lengths) > MIN_LOOKUP_LENGTH


def same_tokens(text, end):
    """How many tokens up to `end` are those up to the last, MAX_LOOKUP_LENGTH at most."""
    same = 0
    while same < min(MAX_LOOKUP_LENGTH, end + 1) and text[end - same] == text[-1 - same]:
        same += 1
    return same
