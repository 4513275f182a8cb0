"""What ramps will bring: time per output token (TPT) with exits / without, simulated, with its interval.

Lossless exits, the policy `adaptive`, answers of at most `MAX_TOKENS`, closed loops as `eval` runs them. The interval
(95 %) holds three things: a bootstrap over conversations, how far measured costs may be off, and how far simulations
were.

Prompts that a model writes for itself are easier than users'. So there are two figures: on prompts like its own, and
expected on users' prompts. The second is of the conversations with the user's prompts, where there are enough. Else it
is of the model's conversations, the harder ones drawn more often, until they agree `USERS_FRAC` as often.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apparate_llm.config import parse_config
from apparate_llm.controller.adaptive import AdaptivePolicy
from apparate_llm.eval.workloads import block_size
from apparate_llm.prepare.costs import ProfiledCosts
from apparate_llm.prepare.recorded import Recorded
from apparate_llm.prepare.records import Predicted, Profiled, TptRatio
from apparate_llm.prepare.simulate import Simulation

CLIENTS = (1, 4, 16)
MAX_TOKENS = 128  # of an answer, as in `eval`
MOST_CONVERSATIONS = 96
REQUESTS_OF_CLIENT = 4  # requests of each client at least
DRAWS = 4  # simulations at costs that may as well be
RESAMPLES = 2000
SETTLING = 2  # requests before those that count, at least
# Acceptance rate at position 0 on users' prompts / on the model's own, of ramps trained on the latter only
# (docs/prepare.md).
USERS_FRAC = 0.85
ENOUGH_USERS = 16  # conversations with the user's prompts
STEEPEST = 60.0  # e to this is how much more often the hardest conversation may be drawn than one that always agrees
SIMULATION_SD = 0.05  # standard deviation of measured / predicted ratio
USERS_KIND = "user"


@dataclass(frozen=True, slots=True)
class Asked:
    """Times per output token by conversation, each its mean, from one simulation."""

    indices: np.ndarray  # [n] of the conversation
    plain_ms: np.ndarray  # [n]
    ours_ms: np.ndarray  # [n]


def predict(
    conversations: Sequence[Recorded],
    profiled: Profiled,
    *,
    depth: int,
    num_layers: int,
    clients: Sequence[int] | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> dict[str, Predicted]:
    """By number of clients: `tpt_ratio`, its interval `ci95`, the ms of both and `by_kind` of prompt. Number of clients
    that were not profiled are predicted between those that were."""
    if clients is None:
        clients = sorted({*CLIENTS, *map(int, profiled["verify_ms"])})
    rng = np.random.default_rng(seed)
    # The first are the costs as measured.
    costs = [ProfiledCosts.of(profiled, depth, None if draw == 0 else rng) for draw in range(1 + DRAWS)]
    served = [_serve(conversations, cost, depth, num_layers, clients, max_tokens) for cost in costs]
    results: dict[str, Predicted] = {}
    for number in clients:
        asked = [by_clients[number] for by_clients in served]
        kinds = np.array([conversations[index].kind for index in asked[0].indices])
        ratio = _with_interval(asked, np.ones(len(kinds), dtype=bool), rng)
        results[str(number)] = {
            "tpt_ratio": ratio["tpt_ratio"],
            "ci95": ratio["ci95"],
            "plain_ms": _mean_ms(asked[0].plain_ms),
            "ours_ms": _mean_ms(asked[0].ours_ms),
            "by_kind": {kind: _with_interval(asked, kinds == kind, rng) for kind in dict.fromkeys(kinds.tolist())},
        }
    return results


def _mean_ms(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 3) if values.size else None


def predict_both(
    conversations: Sequence[Recorded], profiled: Profiled, *, depth: int, num_layers: int, seed: int = 0
) -> dict[str, Predicted]:
    """`predict` on prompts like the model's own, each with `users`: what is expected on users' prompts."""
    few = some_of(conversations, MOST_CONVERSATIONS, seed=seed)
    by_clients = predict(few, profiled, depth=depth, num_layers=num_layers, seed=seed)
    known = some_of(_of_users(conversations), MOST_CONVERSATIONS, seed=seed) if users_are_given(conversations) else few
    users = predict(as_users_ask(known, seed=seed), profiled, depth=depth, num_layers=num_layers, seed=seed)
    for number, item in by_clients.items():
        item["users"] = {"tpt_ratio": users[number]["tpt_ratio"], "ci95": users[number]["ci95"]}
    return by_clients


def some_of(conversations: Sequence[Recorded], most: int, *, seed: int = 0) -> list[Recorded]:
    """At most so many of them, in a random order, so that clients ask prompts of different kinds at once."""
    order = np.random.default_rng(seed).permutation(len(conversations))
    return [conversations[index] for index in order[:most]]


def _serve(
    conversations: Sequence[Recorded],
    costs: ProfiledCosts,
    depth: int,
    num_layers: int,
    clients: Sequence[int],
    max_tokens: int,
) -> dict[int, Asked]:
    """One server after the other, each under all loads in turn."""
    config = parse_config({})
    policy = AdaptivePolicy(
        depth=depth,
        depths=(depth,),
        num_layers=num_layers,
        max_exits=config.max_exits,
        ttft_weight=config.ttft_weight,
    )
    plain, ours = Simulation(costs.plain()), Simulation(costs, policy)
    served = {}
    for number in clients:
        blocks = _blocks(len(conversations), number)
        ours.serve([blocks[0][: max(SETTLING, number)]], conversations, number, max_tokens=max_tokens)
        without, with_exits = (
            server.serve(blocks, conversations, number, max_tokens=max_tokens) for server in (plain, ours)
        )
        indices = sorted(without.keys() & with_exits.keys())
        served[number] = Asked(
            np.array(indices, dtype=int),
            np.array([np.mean(without[index]) for index in indices]),
            np.array([np.mean(with_exits[index]) for index in indices]),
        )
    return served


def _blocks(num_conversations: int, clients: int) -> list[list[int]]:
    """Numbers of conversations as `eval` asks for prompts; each of them, and again if clients would have too few."""
    times = max(1, math.ceil(REQUESTS_OF_CLIENT * clients / num_conversations))
    order = list(range(num_conversations)) * times
    size = block_size(clients)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _with_interval(asked: Sequence[Asked], chosen: np.ndarray, rng: np.random.Generator) -> TptRatio:
    plain, ours = (np.array([getattr(part, name)[chosen] for part in asked]) for name in ("plain_ms", "ours_ms"))
    if not plain.size:
        return {"tpt_ratio": None, "ci95": None}
    num = plain.shape[1]
    drawn = rng.integers(0, num, (RESAMPLES, num))
    draw = rng.integers(0, len(asked), (RESAMPLES, 1))
    ratios = ours[draw, drawn].mean(-1) / plain[draw, drawn].mean(-1)
    ratios *= np.exp(SIMULATION_SD * rng.standard_normal(RESAMPLES))
    low, high = np.percentile(ratios, [2.5, 97.5])
    ratio = float(ours[0].mean() / plain[0].mean())
    return {"tpt_ratio": round(ratio, 4), "ci95": [round(float(low), 4), round(float(high), 4)]}


def users_are_given(conversations: Sequence[Recorded]) -> bool:
    """Whether there are enough conversations with the user's prompts to speak for them."""
    return len(_of_users(conversations)) >= ENOUGH_USERS


def predicted_for(conversations: Sequence[Recorded]) -> dict[str, str]:
    """For whose prompts the figures of `predict_both` are, in words."""
    assumed = f"users' prompts, on which ramps are expected to agree {USERS_FRAC} times as often as on the model's own"
    return {
        "own": "prompts like those that the ramps were trained on, most of them the model's own",
        "users": "the prompts that were given" if users_are_given(conversations) else assumed,
    }


def _of_users(conversations: Sequence[Recorded]) -> list[Recorded]:
    return [one for one in conversations if one.kind == USERS_KIND]


def as_users_ask(conversations: Sequence[Recorded], *, seed: int = 0) -> list[Recorded]:
    """Conversations that stand for those with users' prompts."""
    users = _of_users(conversations)
    if len(users) >= ENOUGH_USERS:
        return users
    return harder([one for one in conversations if one.kind != USERS_KIND] or users, USERS_FRAC, seed=seed)


def harder(conversations: Sequence[Recorded], frac: float, *, seed: int = 0) -> list[Recorded]:
    """As many, drawn so that their tokens agree `frac` as often: with a weight that falls exponentially with a
    conversation's acceptance rate, the least change of the sample that does it (exponential tilting)."""
    rates = np.array([one.acceptance_rate for one in conversations])
    tokens = np.array([one.num_tokens for one in conversations], dtype=float)
    target = frac * float(np.average(rates, weights=tokens))
    low, high = 0.0, STEEPEST
    for _ in range(50):
        middle = (low + high) / 2
        mean = np.average(rates, weights=tokens * np.exp(-middle * rates))
        low, high = (middle, high) if mean > target else (low, middle)
    weights = np.exp(-low * rates)
    chosen = np.random.default_rng(seed).choice(len(rates), len(rates), p=weights / weights.sum())
    return [conversations[index] for index in chosen]
