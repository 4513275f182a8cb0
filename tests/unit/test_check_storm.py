from types import SimpleNamespace

import pytest

from scripts.check_storm import KINDS, difference, faults, pool_of

ANSWER = [{"text": "one two", "finish": "stop", "scores": [-0.1, -0.2]}]


def test_every_kind_of_request_is_asked_of_every_prompt():
    pool = pool_of([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]])
    assert len(pool) == 2 * len(KINDS)
    assert {request.kind for request in pool if request.body["temperature"]} == {"seed", "n", "min_p"}
    assert all("seed" in request.body for request in pool if request.body["temperature"])


@pytest.mark.parametrize(
    ("change", "broken_off", "says"),
    [
        ({}, False, None),
        ({"text": "one"}, False, "text"),
        ({"finish": "length"}, False, "finish"),
        ({"scores": [-0.1, -0.5]}, False, "log-probabilities differ"),
        ({"text": "one", "finish": None, "scores": [-0.1]}, True, None),
        ({"text": "two"}, True, "begins with 'two'"),
    ],
)
def test_an_answer_is_plain_vllms_to_the_character(change, broken_off, says):
    problem = difference([{**ANSWER[0], **change}], ANSWER, broken_off=broken_off)
    assert problem is None if says is None else says in problem


def status(**changed):
    outcomes = {
        name: {0: 0}
        for name in ("held_accepted_divergence", "released_right", "released_divergence", "released_unverified")
    }
    counts = {
        "emitted": 90, "held": 5, "accepted": 3, "released": 0, "verified": 0, "unverified": 0, "outstanding": 0,
        "divergences_at_worst": 0, "fallbacks": 0, "exits_by_depth": {0: 3},
        "outcomes": {**outcomes, "held_accepted": {0: 3}, "held_rejected": {0: 2}},
    }  # fmt: skip
    return {"running": 0, "active": True, "config": {"accuracy_bound": 0.0}, "counts": {**counts, **changed}}


@pytest.mark.parametrize(
    ("changed", "preempted", "says"),
    [
        ({}, 1, None),
        ({}, 0, "nothing was preempted"),
        ({"held": 6}, 1, "held exits do not add up"),
        ({"outstanding": 1}, 1, "exits are outstanding"),
        ({"released": 1}, 1, "released exits do not add up"),
        ({"fallbacks": 1}, 1, "the server fell back"),
        ({"divergences_at_worst": 1}, 1, "more divergences than the bound"),
    ],
)
def test_the_servers_own_figures_are_looked_at(changed, preempted, says, monkeypatch):
    monkeypatch.setattr("scripts.check_storm.httpx.get", lambda *args, **kwargs: SimpleNamespace(status_code=200))
    server = SimpleNamespace(base_url="", process=SimpleNamespace(poll=lambda: None))
    problems = faults(status(**changed), server, preempted)
    assert any(says in fault for fault in problems) if says else problems == []
