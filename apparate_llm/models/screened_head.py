"""The best token of greedy rows with half of the head's bytes, and exactly.

Scores in int8 are read first. How far each may be from the exact one is known, so that few tokens can be the best; of
these the exact scores decide. An approximate matrix and an exact check of what passes it is an old way of searching for
the largest inner product; here it has to give the very token that the whole head gives, whose scores are rounded:

    exact      x . w
    coarse     c = q(x) . q(w), rounded to bfloat16
    |x . w - q(x) . q(w)| <= |x - q(x)| |w| + |q(x)| |w - q(w)|        (Cauchy-Schwarz)
    head's     x . w as its kernel sums it up in float32, in an order of its own, rounded to bfloat16:
               within size * 2^-24 * sum |x_i w_i| of the exact one before the rounding

Where the rounding of tokens that may be the best stays open, there is no answer, and the whole head is asked.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch

from apparate_llm.argmax import best_tokens
from apparate_llm.models.quantised_heads import AT_ONCE, LARGEST, Int8Linear, int8_codes

ROUNDING = 2.0**-8  # more than what rounding to bfloat16 changes, as a share of a value
FLOAT32_STEP = 2.0**-24
SLACK = 1 + 2.0**-10  # on norms, which are sums in float32 themselves
MOST_CANDIDATES = 2048
TRIED_ROWS = (1, 2, 4, 8, 16)
TIMES = 5  # each is timed
TRIED_TOKENS = 2048
TRIED_SCORE = 25.0  # of the best token in a trial: about what models give
WORTH_IT = 0.85  # of the whole head's time; with no answer both have taken theirs
LEAST_ANSWERED, PASSES_SEEN, PASSES_OFF = 0.8, 50, 1000  # passes are not screened for a while where few were answered

Scores = Callable[[torch.Tensor], torch.Tensor | None]


class ScreenedHead:
    """weight [vocab, hidden_size] bfloat16, the model's own, which stays where it is; whole: hidden states [num_tokens,
    hidden_size] -> scores [num_tokens, vocab] by the model."""

    def __init__(self, weight: torch.Tensor, whole: Scores) -> None:
        codes, scale = int8_codes(weight)
        self.norms, self.error_norms = _norms(weight, codes, scale)
        self.largest_norm = self.norms.max()
        self.coarse = Int8Linear(weight, (codes, scale))
        self.weight, self.whole = weight, whole
        self.most_rows = max(TRIED_ROWS)
        self.answered_frac, self.passes_off = 1.0, 0

    def scores(self, hidden: torch.Tensor, asked: Sequence[tuple[int, int]] = ()) -> torch.Tensor | None:
        """Scores [num_tokens, vocab] bfloat16 in which the best token of each row is that of the whole head, as are its
        score and those of `asked`, (row, token) each; of the others most are minus infinity. None: the whole head has
        to tell."""
        if len(hidden) > self.most_rows:
            return None
        if self.passes_off:
            self.passes_off -= 1
            return None
        scores = self._scores(hidden, asked)
        self.answered_frac += ((scores is not None) - self.answered_frac) / PASSES_SEEN
        if self.answered_frac < LEAST_ANSWERED:
            self.answered_frac, self.passes_off = 1.0, PASSES_OFF
        return scores

    def _scores(self, hidden: torch.Tensor, asked: Sequence[tuple[int, int]]) -> torch.Tensor | None:
        coarse = self.coarse(hidden)
        candidates = self._candidates(hidden, coarse)
        if candidates is None:
            return None
        rows, tokens = candidates
        exact, error = self._exact(hidden, rows, tokens)
        least, most = (exact - error).bfloat16(), (exact + error).bfloat16()
        surest = torch.full((len(hidden),), float("-inf"), dtype=least.dtype)
        surest.scatter_reduce_(0, rows, least, "amax")
        can_win = most >= surest[rows]
        contested = can_win & (torch.bincount(rows[can_win], minlength=len(hidden)) > 1)[rows]
        if not torch.equal(least[contested], most[contested]):
            return None
        scores = torch.full_like(coarse, float("-inf"))
        if asked:
            of, named = torch.tensor(asked).unbind(dim=1)
            scores[of, named] = self._exact(hidden, of, named)[0].bfloat16()
        scores[rows, tokens] = exact.bfloat16()
        return scores

    def _exact(
        self, hidden: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of these tokens in float64, and how far the whole head's may be from them before rounding."""
        products = hidden[rows].double() * self.weight[tokens].double()
        exact = products.sum(dim=1)
        return exact, products.abs().sum(dim=1) * (products.shape[1] * FLOAT32_STEP) + exact.abs() * FLOAT32_STEP

    def _candidates(self, hidden: torch.Tensor, coarse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rows and tokens, a pair each, among which is every token whose score may round to that of the best one."""
        if not bool(torch.isfinite(hidden).all()):
            return None
        lost, read_norm, norm = _read(hidden)
        values = coarse.float()
        best = torch.from_numpy(values.numpy().argmax(axis=1))
        value = values.gather(1, best[:, None])[:, 0]
        # read_norm * reach is how far coarse scores may be off.
        reach = self.norms * (lost / read_norm.clamp(min=1e-12)).max() + self.error_norms
        floor = value - value.abs() * ROUNDING - read_norm * reach[best]
        # What rounds to the same as the floor, or better.
        floor = floor - floor.abs() * 2 * ROUNDING - norm * self.largest_norm * hidden.shape[1] * 2 * FLOAT32_STEP
        farthest = torch.maximum(value.abs(), (floor.abs() + read_norm * reach.max()) * (1 + 2 * ROUNDING))
        highest = torch.addcmul(values, read_norm[:, None], reach)
        # numpy's search takes a tenth of torch's time.
        places = np.flatnonzero((highest >= (floor - farthest * ROUNDING)[:, None]).numpy())
        if len(places) > MOST_CANDIDATES:
            return None
        rows, tokens = np.divmod(places, values.shape[1])
        return torch.from_numpy(rows), torch.from_numpy(tokens)

    # ---- whether it may be used

    def try_here(self) -> int:
        """With how many rows at once this machine's kernels are faster so; 0: with none, or they do not keep what is
        claimed of them."""
        hidden = self._rows_to_try()
        if not self._holds(hidden):
            return 0
        faster = 0
        for number in TRIED_ROWS:
            part = hidden[:number]
            if _ms(self.scores, part) > WORTH_IT * _ms(self.whole, part):
                break
            faster = number
        self.most_rows = faster
        return faster

    def _rows_to_try(self) -> torch.Tensor:
        """Like states of a model that is rather sure of one token and thinks of another."""
        tokens = torch.linspace(0, len(self.weight) - 1, 2 * max(TRIED_ROWS)).long()
        directions = self.weight[tokens].float() * (TRIED_SCORE / self.norms[tokens].square().clamp(min=1e-12))[:, None]
        one, other = directions.chunk(2)
        return (one + other / 2).bfloat16()

    def _holds(self, hidden: torch.Tensor) -> bool:
        """Exact scores of some tokens against both kernels', and best tokens against the whole head's."""
        whole = self.whole(hidden)
        if whole is None or whole.dtype != torch.bfloat16 or whole.shape[1] != len(self.weight):
            return False
        some = torch.linspace(0, len(self.weight) - 1, TRIED_TOKENS).long()
        weights, states = self.weight[some].double(), hidden.double()
        exact = states @ weights.T
        error = states.abs() @ weights.abs().T * (states.shape[1] * FLOAT32_STEP) + exact.abs() * FLOAT32_STEP
        scores = whole[:, some]
        if not bool(((exact - error).bfloat16() <= scores).all() and (scores <= (exact + error).bfloat16()).all()):
            return False
        lost, read_norm, _ = _read(hidden)
        bound = lost[:, None] * self.norms[some] + read_norm[:, None] * self.error_norms[some]
        for number in TRIED_ROWS:
            coarse = self.coarse(hidden[:number])[:, some].double()
            if not bool(((coarse - exact[:number]).abs() <= bound[:number] + coarse.abs() * ROUNDING).all()):
                return False
            screened = self.scores(hidden[:number])
            if screened is not None and not torch.equal(best_tokens(screened), best_tokens(whole[:number])):
                return False
        return True


def _read(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norms of what int8 loses of each row, of what it keeps, and of the row: [num_tokens] each."""
    states = hidden.float()
    step = states.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    kept = (states / step).round() * step
    norm = states.norm(dim=1) * SLACK
    return (states - kept).norm(dim=1) * SLACK + norm * 2 * FLOAT32_STEP, kept.norm(dim=1) * SLACK, norm


def _norms(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of the weight, and of what int8 loses of it: [vocab] each."""
    norms, lost = (torch.empty(len(weight), dtype=torch.float32) for _ in range(2))
    for first in range(0, len(weight), AT_ONCE):
        part = slice(first, min(first + AT_ONCE, len(weight)))
        rows = weight[part].float()
        norms[part] = rows.norm(dim=1)
        lost[part] = (rows - codes[part] * scale[part]).norm(dim=1)
    return norms * SLACK, lost * SLACK + norms * 2 * FLOAT32_STEP


def _ms(scores: Scores, hidden: torch.Tensor) -> float:
    """Until the best token is known."""
    times = []
    for _ in range(TIMES):
        began_s = time.perf_counter()
        given = scores(hidden)
        if given is None:
            return float("inf")
        best_tokens(given)
        times.append((time.perf_counter() - began_s) * 1e3)
    return median(times)
