"""Where tokens came from, in the engine's ledger."""

import pytest

from apparate_llm.controller.budget import AccuracyBudget, Bucket
from apparate_llm.core import Exit
from apparate_llm.exits.ledger import RequestExits, VerdictLedger
from apparate_llm.exits.token_origins import MAX_UNCLAIMED, REPORT_KEY, Reports, Trace, trace_of


def exit_at(position: int, token_id: int = 5, depth: int = 2) -> Exit:
    return Exit(position, token_id, depth, draft_step=0, confidence=0.9)


def test_every_emitted_token_has_its_origin_and_verdicts_come_late():
    ledger = VerdictLedger(AccuracyBudget(0.9))
    request = RequestExits(releasable=True, bucket=Bucket.of_request(0.9), trace=Trace("key"))
    ledger.add_request("a", request)
    ledger.emit("a", 1, now_s=0.0)
    released = [exit_at(11, 5), exit_at(12, 6, depth=0)]
    ledger.release("a", released)
    ledger.verify_released(
        ledger.due("a", first_position=10, num_scheduled=1, first_row=0), [5], [0.0]
    )  # the second comes later
    ledger.emit("a", 1, now_s=0.1)
    request.held = [exit_at(14), exit_at(15), exit_at(16)]
    request.held[1].is_divergence = True
    ledger.count_held(request, num_held=3, num_accepted=2)
    ledger.emit("a", 3, now_s=0.2)
    ledger.verify_released(ledger.due("a", first_position=11, num_scheduled=1, first_row=0), [9], [0.3])
    ledger.release("a", [exit_at(18)])
    ledger.end_request("a")
    report = ledger.report("key")["a"]
    assert report["origins"] == [
        "checked",
        "released",
        "released_divergence",
        "checked",
        "held",
        "held_divergence",
        "checked",
        "unverified",
    ]
    assert len(report["origins"]) == ledger.counts.emitted == 8
    assert report["depths"] == [None, 2, 0, None, 2, 2, None, 2] and report["tpt_ms"] == pytest.approx(200 / 7)
    assert ledger.counts.decode_tokens == 7 and ledger.counts.decode_s == pytest.approx(0.2)
    assert ledger.report("key") == {}


def test_a_stop_token_among_accepted_exits_ends_the_trace_there():
    trace = Trace("key")
    trace.accepted([exit_at(3), exit_at(4)])
    trace.emitted(1)
    assert trace.origins == ["held"]


def test_a_request_that_has_not_been_ended_yet_reports_and_once_only():
    ledger = VerdictLedger(AccuracyBudget(0.0))
    ledger.add_request("a", RequestExits(releasable=True, bucket=Bucket.of_request(0.0), trace=Trace("key")))
    ledger.emit("a", 1, now_s=0.0)
    assert ledger.report("key")["a"]["origins"] == ["checked"]
    ledger.end_request("a")
    assert ledger.report("key") == {}


def test_reports_nobody_asks_for_are_forgotten():
    reports = Reports()
    for number in range(MAX_UNCLAIMED + 1):
        reports.keep("a", Trace(f"key {number}"), None)
    assert reports.take("key 0") == {} and reports.take("key 1") != {}


def test_reports_under_one_key_are_forgotten_as_well():
    reports = Reports()
    for number in range(MAX_UNCLAIMED + 1):
        reports.keep(str(number), Trace("key"), None)
    reports.keep("a", Trace("other"), None)
    assert reports.take("key") == {} and reports.take("other") != {}


def test_a_key_that_is_none_costs_nothing():
    """Without our API nobody puts a key there but the client."""
    for key in ([1], {"a": 1}, 7, "", None):
        assert trace_of({REPORT_KEY: key}) is None
    assert trace_of(None) is None and trace_of({REPORT_KEY: "a"}) == Trace("a")
