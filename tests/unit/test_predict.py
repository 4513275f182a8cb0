"""Predictions on made-up conversations, whose answers are known."""

import numpy as np
import pytest
import torch

from apparate_llm.prepare import predict as predict_module
from apparate_llm.prepare.costs import ProfiledCosts, at, curve
from apparate_llm.prepare.predict import (
    as_users_ask,
    harder,
    predict,
    predict_both,
    predicted_for,
    users_are_given,
)
from apparate_llm.prepare.recorded import Proposal, Recorded, lookups_of, recorded
from apparate_llm.prepare.simulate import Simulation

TOKENS = 101


def profiled(*, draft_step_ms=1.0, per_row=0.2, prompt_ms=0.5, error=0.0):
    """A pass takes 20 ms and a little more for each further row, a prompt so much per token."""
    sizes = (1, 4, 16)
    return {
        "verify_ms": {str(size): 20.0 + per_row * (size - 1) for size in sizes},
        "pass_ms": {str(size): {str(size * n): 20.0 + per_row * (size * n - 1) for n in (2, 4, 8)} for size in sizes},
        "prompt_ms": {"32": 20.0 + prompt_ms * 32, "512": 20.0 + prompt_ms * 512},
        "draft_step_ms": {"0": {str(size): draft_step_ms for size in sizes}},
        "error_frac": dict.fromkeys(("verify", "pass", "prompt", "draft_step"), error),
    }


def conversation(agreement, *, seed=0, kind="open", tokens=TOKENS, prompt_tokens=32, confidence=None):
    """Every draft step agrees as often, and is as confident as that."""
    rng = np.random.default_rng(seed)
    stated = confidence if confidence is not None else min(max(agreement, 0.02), 0.98)
    row = tuple(Proposal(stated, bool(agrees)) for agrees in rng.random(tokens) < agreement)
    return Recorded(kind, prompt_tokens, (row,))


def conversations(agreement, number=16, **settings):
    return [conversation(agreement, seed=i, **settings) for i in range(number)]


def only(by_clients, clients="1"):
    return by_clients[clients]["tpt_ratio"]


@pytest.fixture(autouse=True)
def simulations_are_exact(monkeypatch):
    monkeypatch.setattr(predict_module, "SIMULATION_SD", 0.0)


def test_ramps_that_are_always_right_bring_a_pass_ten_exits():
    by_clients = predict(conversations(1.0), profiled(), depth=0, num_layers=12, clients=(1,), max_tokens=TOKENS)
    # Of a step of 11 tokens: ten draft steps of 1 ms, and ten rows more. A few steps go without exits, to measure.
    assert only(by_clients) == pytest.approx((20 + 10 * 0.2 + 10) / 11 / 20, rel=0.08)


def test_ramps_that_are_never_right_change_nothing():
    by_clients = predict(conversations(0.0), profiled(), depth=0, num_layers=12, clients=(1, 4), max_tokens=TOKENS)
    assert only(by_clients) == pytest.approx(1.0, abs=0.015) and only(by_clients, "4") == pytest.approx(1.0, abs=0.015)


@pytest.mark.parametrize("costs", [{"draft_step_ms": 60.0}, {"per_row": 40.0}], ids=["draft steps", "rows"])
def test_exits_that_cost_more_than_they_bring_are_not_taken(costs):
    by_clients = predict(conversations(0.5), profiled(**costs), depth=0, num_layers=12, clients=(1,), max_tokens=TOKENS)
    assert only(by_clients) == pytest.approx(1.0, abs=0.06)


def test_without_exits_a_lone_client_gets_a_token_a_pass():
    times = Simulation(ProfiledCosts.of(profiled(), 0)).serve([[0, 1]], conversations(1.0, 2), 1, max_tokens=TOKENS)
    assert [ms for values in times.values() for ms in values] == pytest.approx([20.0, 20.0])


def test_clients_wait_for_each_others_prompts_with_exits_or_without():
    """The longer the prompts, the less of the time is there to be saved."""
    short, long = (
        predict(
            conversations(0.8, prompt_tokens=length, number=32),
            profiled(),
            depth=0,
            num_layers=12,
            clients=(4,),
            max_tokens=40,
        )["4"]
        for length in (8, 512)
    )
    assert short["tpt_ratio"] < long["tpt_ratio"] < 1.0
    assert long["plain_ms"] > short["plain_ms"] * 1.2


def test_a_prompt_is_read_whole_each_time_as_caches_are_cold():
    server = Simulation(ProfiledCosts.of(profiled(), 0))
    for _ in range(2):
        before = server.now_ms
        server.serve([[0]], [conversation(0.0, prompt_tokens=300, tokens=2)], 1, max_tokens=2)
        assert server.now_ms - before == pytest.approx(20 + 150 + 20)


def test_no_client_is_idle_while_a_request_that_counts_is_under_way():
    """Four clients, whose passes take longer the more of them are asking."""
    passes = []

    class Costs(ProfiledCosts):
        def pass_ms(self, requests, rows, prompt_tokens):
            passes.append((requests, bool(prompt_tokens)))
            return super().pass_ms(requests, rows, prompt_tokens)

    known = conversations(1.0, 8, tokens=80)
    times = Simulation(Costs.of(profiled(), 0)).serve([[0, 1, 2, 3], [4, 5, 6, 7]], known, 4, max_tokens=80)
    assert sorted(times) == list(range(8)) and all(len(values) == 1 for values in times.values())
    decoding = [requests for requests, reads in passes if not reads]
    assert sum(requests < 4 for requests in decoding) < 0.1 * len(decoding)  # a client turns from answer to request


def test_a_text_that_repeats_itself_is_looked_up_without_a_draft_step():
    text = [*range(20)] * 12
    lengths, numbers_right = lookups_of(text[:60], text[60:])
    assert lengths[0] >= 12 and numbers_right[0] == len(text) - 60
    rows = tuple(Proposal(0.02, False) for _ in lengths)
    ramps_know_nothing = [Recorded("open", 60, (rows,), lengths, numbers_right)] * 4
    expensive = profiled(draft_step_ms=1000.0)
    assert only(predict(ramps_know_nothing, expensive, depth=0, num_layers=12, clients=(1,), max_tokens=180)) < 0.4
    without = [Recorded("open", 60, (rows,))] * 4
    assert only(predict(without, expensive, depth=0, num_layers=12, clients=(1,), max_tokens=180)) > 0.99


def test_the_interval_covers_what_many_more_conversations_give():
    """Of conversations that differ, few say little; nineteen of twenty samples know that."""
    rng = np.random.default_rng(1)
    population = [conversation(float(rng.uniform(0.2, 1.0)), seed=i, tokens=60) for i in range(200)]
    settings = {"depth": 0, "num_layers": 12, "clients": (1,), "max_tokens": 60}
    truth = only(predict(population, profiled(), **settings))
    covered = 0
    for sample in range(20):
        few = [population[i] for i in rng.choice(len(population), 24)]
        low, high = predict(few, profiled(), **settings, seed=sample)["1"]["ci95"]
        covered += low <= truth <= high
        assert high - low < 0.3
    assert covered >= 16


def test_costs_that_may_be_off_widen_the_interval():
    sample = conversations(0.8, number=12)
    settings = {"depth": 0, "num_layers": 12, "clients": (1,), "max_tokens": TOKENS}
    widths = []
    for error in (0.0, 0.5):
        low, high = predict(sample, profiled(error=error), **settings)["1"]["ci95"]
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_each_kind_of_prompt_has_its_own_ratio():
    mixed = [
        conversation(0.9 if i % 2 else 0.3, seed=i, kind="code" if i % 2 else "open", tokens=60) for i in range(24)
    ]
    prediction = predict(mixed, profiled(), depth=0, num_layers=12, clients=(1,), max_tokens=60)["1"]
    code, talk = prediction["by_kind"]["code"], prediction["by_kind"]["open"]
    assert code["ci95"][1] < talk["ci95"][0]
    assert code["tpt_ratio"] < prediction["tpt_ratio"] < talk["tpt_ratio"]


def test_users_prompts_are_expected_to_be_harder_by_what_is_known():
    rng = np.random.default_rng(0)
    own = [conversation(float(rng.uniform(0.4, 1.0)), seed=i, tokens=60) for i in range(400)]
    mean = np.mean([one.acceptance_rate for one in own])
    drawn = harder(own, 0.85)
    assert np.mean([one.acceptance_rate for one in drawn]) == pytest.approx(0.85 * mean, rel=0.08)
    assert len(drawn) == len(own)
    prediction = predict_both(own[:40], profiled(), depth=0, num_layers=12)["1"]
    assert prediction["users"]["tpt_ratio"] > prediction["tpt_ratio"]


def test_the_users_own_prompts_speak_for_users():
    own, users = conversations(0.9, 20), conversations(0.4, 20, kind="user")
    assert as_users_ask([*own, *users]) == users
    few = as_users_ask([*own, *users[:3]])
    assert {one.kind for one in few} == {"open"}


def test_few_prompts_of_the_user_among_many_conversations_still_speak_for_users():
    """They are chosen before conversations are, which would leave out too many of them."""
    own = [conversation(0.9, seed=i, tokens=20) for i in range(600)]
    users = [conversation(0.2, seed=i, kind="user", tokens=20) for i in range(20)]
    item = predict_both([*own, *users], profiled(), depth=0, num_layers=12)["1"]
    assert item["tpt_ratio"] < 0.7 < item["users"]["tpt_ratio"]
    assert users_are_given([*own, *users]) and not users_are_given([*own, *users[:10]])
    assert predicted_for([*own, *users])["users"] == "the prompts that were given"
    assert "0.85 times as often" in predicted_for(own)["users"]


def test_conversations_come_out_of_what_was_measured():
    answer = [5, 6, 7, 8]
    tensors = {
        "0.confidence": torch.tensor([0.9, 0.8, 0.7, 0.6]),
        "0.agrees": torch.tensor([True, True, False, True]),
        "0.conversation": torch.tensor([3, 3, 3, 3]),
        "0.kind": torch.tensor([1, 1, 1, 1]),
        "0.row": torch.tensor([0, 1, 2, 3]),
        "1.confidence": torch.tensor([0.5]),
        "1.agrees": torch.tensor([False]),
        "1.conversation": torch.tensor([3]),
        "1.kind": torch.tensor([1]),
        "1.row": torch.tensor([2]),
    }
    calibration = [(1.0, 0.0), (1.0, 1.0)]
    (one,) = recorded(tensors, calibration, ("open", "code"), {3: ([1, 2, 3], answer)})
    assert (one.kind, one.prompt_tokens, one.num_tokens, one.acceptance_rate) == ("code", 3, 4, 0.75)
    assert one.proposal(1, 0) == pytest.approx((0.8, True))
    assert one.proposal(2, 1) == pytest.approx((0.731, False), abs=1e-3)
    assert one.proposal(1, 1) == one.proposal(1, 0)  # the draft step did not run there
    assert one.proposal(2, 9) == one.proposal(2, 1)
    assert one.lookup_lengths == (0, 0, 0, 0)


def test_where_only_some_rows_were_measured_the_next_one_stands_for_those_before():
    tensors = {
        "0.confidence": torch.tensor([0.9, 0.4]),
        "0.agrees": torch.tensor([True, False]),
        "0.conversation": torch.tensor([0, 0]),
        "0.kind": torch.tensor([0, 0]),
        "0.row": torch.tensor([1, 3]),
    }
    (one,) = recorded(tensors, [(1.0, 0.0)], ("open",), {0: ([1], [2, 3, 4, 5, 6])})
    assert [one.proposal(row, 0).agrees for row in range(5)] == [True, True, False, False, False]


def test_costs_between_what_was_measured_are_linear_and_never_fall():
    costs = {"1": 10.0, "2": 10.0, "4": 14.0}
    assert at(curve(costs), 3) == 12.0 and at(curve(costs), 6) == 18.0
    assert at(curve({**costs, "1": 15.0}), 1) == 10.0
    assert isinstance(at(curve({"1": 1.0, "2": 2.0}), np.float64(1.5)), float)
    served = ProfiledCosts.of(profiled(), 0)
    assert served.pass_ms(1, 1, 0) == pytest.approx(20.0) and served.pass_ms(1, 4, 0) == pytest.approx(20.6)
    assert served.pass_ms(2, 4, 0) == pytest.approx(20.6, abs=0.5)
    assert served.pass_ms(0, 0, 32) == pytest.approx(36.0)
    assert served.pass_ms(4, 4, 32) == pytest.approx(36.6)
    assert served.pass_ms(1, 20, 0) > served.pass_ms(1, 8, 0)


def test_plain_vllm_pays_for_its_small_pages():
    """What it takes more per pass is a gain of ours as well."""
    settings = {"depth": 0, "num_layers": 12, "clients": (1,), "max_tokens": TOKENS}
    same, more = (predict(conversations(0.8), profiled() | {"plain_frac": frac}, **settings) for frac in (1.0, 1.2))
    assert only(more) == pytest.approx(only(same) / 1.2, rel=0.01)
