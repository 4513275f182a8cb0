"""The best token by int8 scores and a few exact ones is that of the whole head, or there is no answer."""

from statistics import median

import pytest
import torch

from apparate_llm.argmax import best_tokens
from apparate_llm.models import screened_head
from apparate_llm.models.quantised_heads import has_fast_int8
from apparate_llm.models.screened_head import ScreenedHead

pytestmark = pytest.mark.skipif(not has_fast_int8(), reason="this CPU has no instructions for int8 (AVX-512 VNNI)")
VOCAB, SIZE = 3000, 96


def made(weight: torch.Tensor, **wrong: float) -> tuple[ScreenedHead, list[int]]:
    """A head, and the numbers of rows that the whole one was asked for; wrong: what is the matter with its scores."""
    asked = []

    def whole(hidden: torch.Tensor) -> torch.Tensor:
        asked.append(len(hidden))
        return hidden @ weight.T * wrong.get("scale", 1.0)

    return ScreenedHead(weight, whole), asked


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, SIZE) * torch.rand(VOCAB, 1)
    weight[7] *= 30  # an outlier among rows, and one among columns
    weight[:, 3] *= 20
    weight[100:110] = 0
    return weight.bfloat16()


def sure(weight: torch.Tensor, num_tokens: int, noise: float) -> torch.Tensor:
    """Rows that mean some token more or less."""
    tokens = torch.randint(len(weight), (num_tokens,))
    return (weight[tokens].float() + noise * torch.randn(num_tokens, weight.shape[1])).bfloat16()


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16])
def test_the_best_token_is_that_of_the_whole_head(weight, noise, num_tokens, monkeypatch):
    monkeypatch.setattr(screened_head, "LEAST_ANSWERED", 0.0)
    head, _ = made(weight)
    left = []
    for _ in range(60):
        hidden = sure(weight, num_tokens, noise)
        scores, whole = head.scores(hidden), hidden @ weight.T
        if scores is None:
            continue
        assert torch.equal(best_tokens(scores), best_tokens(whole))
        left.append(float(torch.isfinite(scores).float().mean()))
    assert len(left) > (30 if noise < 3 else 5)
    assert median(left) < 0.1, "tokens, as a share"


def test_of_equals_the_first_is_best_as_it_is_without(weight):
    hidden = sure(weight, 1, 0.3)
    best = best_tokens(hidden @ weight.T)
    for copy in (2, 2900):
        weight[copy] = weight[best]
    head, _ = made(weight)
    scores = head.scores(hidden)
    assert scores is not None and best_tokens(scores).tolist() == best_tokens(hidden @ weight.T).tolist() == [2]


def test_scores_of_the_tokens_that_are_asked_for_are_there(weight):
    head, _ = made(weight)
    hidden = sure(weight, 4, 0.3)
    asked = [(0, 5), (2, 7), (2, 2999), (3, 0)]
    scores, whole = head.scores(hidden, asked), (hidden.double() @ weight.double().T).bfloat16()
    assert scores is not None
    for row, token in asked:
        assert scores[row, token] == whole[row, token]
    best = best_tokens(scores)
    assert torch.equal(scores.gather(1, best[:, None]), whole.gather(1, best[:, None]))


def test_a_token_asked_for_that_is_the_best_one_is_no_rival_of_itself(weight):
    head, _ = made(weight)
    for _ in range(40):
        hidden = sure(weight, 8, 0.1)
        alone = head.scores(hidden)
        best = best_tokens(hidden @ weight.T).tolist()
        both = head.scores(hidden, list(enumerate(best)))
        assert (alone is None) == (both is None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_left_to_the_whole_head(weight, value):
    head, _ = made(weight)
    hidden = sure(weight, 3, 0.3)
    hidden[1, 4] = value
    assert head.scores(hidden) is None


def test_too_many_rows_or_candidates_are_left_to_the_whole_head(weight, monkeypatch):
    head, _ = made(weight)
    assert head.scores(sure(weight, 17, 0.0)) is None
    monkeypatch.setattr(screened_head, "MOST_CANDIDATES", 40)
    assert head.scores(torch.zeros(1, SIZE).bfloat16()) is None, "all are equally good"


def test_where_few_passes_are_answered_it_rests(weight, monkeypatch):
    head, _ = made(weight)
    screened = []
    original = head.coarse
    monkeypatch.setattr(head, "coarse", lambda hidden: screened.append(1) or original(hidden))
    monkeypatch.setattr(screened_head, "MOST_CANDIDATES", 0)
    clear, unclear = sure(weight, 1, 0.0), torch.zeros(1, SIZE).bfloat16()
    for _ in range(40):
        head.scores(unclear)
    rested_after = len(screened)
    assert 5 < rested_after < 20
    monkeypatch.setattr(screened_head, "MOST_CANDIDATES", 2048)
    assert all(head.scores(clear) is None for _ in range(screened_head.PASSES_OFF - (40 - rested_after)))
    assert len(screened) == rested_after
    assert head.scores(clear) is not None, "and is tried again"


def test_where_the_rounding_decides_it_is_left_to_the_whole_head():
    """Two tokens whose scores lie so near a boundary of bfloat16 that the order of a sum may tell them apart."""
    weight = torch.zeros(64, SIZE).bfloat16()
    boundary = 1 + 2.0**-8  # between two of bfloat16's numbers
    weight[3, 0], weight[3, 1] = 1.0, 2.0**-8
    weight[9, 0], weight[9, 2] = 1.0, 2.0**-8
    head, _ = made(weight)
    hidden = torch.zeros(1, SIZE).bfloat16()
    hidden[0, :3] = 1.0
    assert float(hidden.double() @ weight[3].double()) == boundary
    assert head.scores(hidden) is None


# ---- whether it may be used


def test_it_is_used_for_as_many_rows_as_it_is_faster_with(weight, monkeypatch):
    head, asked = made(weight)
    times = {1: (1.0, 2.0), 2: (1.0, 2.0), 4: (1.0, 2.0), 8: (2.0, 2.0), 16: (1.0, 2.0)}
    monkeypatch.setattr(screened_head, "_ms", lambda scores, rows: times[len(rows)][scores == head.whole])
    assert head.try_here() == head.most_rows == 4 and asked == [16]
    assert head.scores(sure(weight, 5, 0.0)) is None


@pytest.mark.parametrize("scale", [1.01, 0.99, -1.0])
def test_it_is_not_used_with_a_whole_head_that_is_something_else(weight, scale):
    assert made(weight, scale=scale)[0].try_here() == 0


def test_it_is_not_used_with_int8_scores_farther_off_than_they_may_be(weight, monkeypatch):
    head, _ = made(weight)
    right = head.coarse
    monkeypatch.setattr(head, "coarse", lambda hidden: right(hidden) * 0.9)
    monkeypatch.setattr(screened_head, "_ms", lambda scores, rows: 1.0 + (scores == head.whole))
    assert head.try_here() == 0
    monkeypatch.setattr(head, "coarse", right)
    assert head.try_here() == 16
