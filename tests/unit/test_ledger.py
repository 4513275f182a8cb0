import pytest

from apparate_llm.controller.budget import NANO, AccuracyBudget, Bucket
from apparate_llm.core import Exit, Outcome
from apparate_llm.exits.ledger import SETTLED_TOKENS, RequestExits, VerdictLedger
from apparate_llm.exits.tenants import TenantShare
from tests.logged import logged


def exit_at(position: int, token_id: int) -> Exit:
    return Exit(position, token_id, depth=0, draft_step=0, confidence=0.9)


def empty_ledger(*, releasable: bool = True) -> VerdictLedger:
    ledger = VerdictLedger(AccuracyBudget(0.5))
    ledger.add_request("a", RequestExits(releasable=releasable, bucket=Bucket.of_request(0.5)))
    return ledger


def ledger_with(*exits: Exit) -> VerdictLedger:
    ledger = empty_ledger()
    ledger.emit("a", 10, now_s=0.0)
    ledger.ended("a")  # so that they may be spent
    for _ in exits:
        ledger.budget.release(ledger.requests["a"].bucket)
    ledger.release("a", list(exits))
    ledger.check_integrity()
    return ledger


def test_a_verdict_is_due_where_the_position_before_it_is_computed():
    ledger = ledger_with(exit_at(10, 5), exit_at(11, 6))
    due = ledger.due("a", first_position=9, num_scheduled=3, first_row=20)
    assert [(item.exit.position, item.row) for item in due] == [(10, 20), (11, 21)]
    assert ledger.due("a", first_position=0, num_scheduled=9, first_row=0) == []
    late = ledger.due("a", first_position=8, num_scheduled=2, first_row=0)
    assert [(item.exit.position, item.row) for item in late] == [(10, 1)]


def test_verdicts_settle_exits():
    ledger = ledger_with(exit_at(10, 5), exit_at(11, 6))
    ledger.verify_released(ledger.due("a", first_position=9, num_scheduled=3, first_row=0), [5, 7], [0.0, 0.4])
    assert (ledger.counts.verified, ledger.counts.divergences, ledger.counts.outstanding) == (2, 1, 0)
    assert ledger.counts.regret_nats == 0.4
    assert ledger.budget.server.spent_nano == NANO
    ledger.check_integrity()


def test_an_ended_request_leaves_its_open_exits_unverified():
    ledger = ledger_with(exit_at(10, 5), exit_at(11, 6))
    ledger.verify_released(ledger.due("a", first_position=9, num_scheduled=1, first_row=0), [5], [0.0])
    ledger.end_request("a")
    ledger.end_request("a")  # told twice, counted once
    assert (ledger.counts.verified, ledger.counts.unverified, ledger.counts.outstanding) == (1, 1, 0)
    ledger.check_integrity()


def test_exits_that_end_without_a_verdict_count_against_the_bound():
    share = TenantShare(Bucket.for_tenant(0.5, 1))
    ledger = ledger_with(exit_at(10, 5), exit_at(11, 6), exit_at(12, 7))
    ledger.requests["a"].share = share
    ledger.verify_released(ledger.due("a", first_position=9, num_scheduled=1, first_row=0), [6], [0.3])
    ledger.counts.emitted = SETTLED_TOKENS + 1
    ledger.end_request("a")
    counts = ledger.counts.as_dict()
    assert (counts["divergences"], counts["unverified"], counts["divergences_at_worst"]) == (1, 2, 3)
    assert counts["divergences_at_worst_frac"] == ledger.audit.largest_divergence_frac == 3 / counts["emitted"]
    figures = share.as_dict()
    assert (figures["divergences"], figures["unverified"], figures["divergences_at_worst"]) == (1, 2, 3)


def test_tokens_earn_for_others_once_the_answer_went_on_after_them_or_ended_by_itself():
    ledger, earned = empty_ledger(), []
    for num_tokens in (3, 2):
        ledger.emit("a", num_tokens, now_s=0.0)
        earned.append(ledger.budget.server.earned_nano)
    assert earned == [0, 3 * NANO // 2]
    ledger.end_request("a")  # its client left
    assert ledger.budget.server.earned_nano == 3 * NANO // 2
    ledger = empty_ledger()
    ledger.emit("a", 3, now_s=0.0)
    ledger.ended("a")
    ledger.end_request("a")
    assert ledger.budget.server.earned_nano == 3 * NANO // 2


def test_requests_that_take_no_release_get_none():
    ledger = empty_ledger(releasable=False)
    with pytest.raises(AssertionError, match="takes none"):
        ledger.release("a", [exit_at(3, 1)])


def test_the_integrity_check_sees_exits_that_do_not_add_up():
    ledger = ledger_with(exit_at(10, 5))
    ledger.counts.released += 1
    with pytest.raises(AssertionError, match="2 exits outstanding, 1 on record"):
        ledger.check_integrity()


def test_an_accepted_divergence_is_paid_for_and_counted_with_its_regret():
    ledger = ledger_with()
    request, exit_ = ledger.requests["a"], exit_at(10, 5)
    request.held = [exit_]
    ledger.accept_divergence("a", exit_, 0.25)
    ledger.count_held(request, num_held=1, num_accepted=1)
    assert ledger.counts.outcomes[Outcome.HELD_ACCEPTED_DIVERGENCE] == {0: 1}
    assert (ledger.counts.divergences, ledger.counts.regret_nats) == (1, 0.25)
    assert ledger.audit.largest_request_excess == 0.0  # well within its bound
    assert ledger.audit.largest_divergence_frac == 0.0  # too few tokens to speak of a share
    ledger.check_integrity()
    ledger.counts.accepted_divergences = 2
    with pytest.raises(AssertionError, match="more divergences than exits"):
        ledger.check_integrity()


def test_a_target_lets_a_request_diverge_only_while_it_is_slower():
    ledger = empty_ledger()
    request = ledger.requests["a"]
    assert request.may_diverge(0.0)
    request.tpt_target_ms = 20.0
    assert not request.may_diverge(5.0)  # nothing emitted yet
    ledger.emit("a", 1, now_s=10.0)
    ledger.emit("a", 10, now_s=10.19)
    assert not request.may_diverge(10.199)
    assert request.may_diverge(10.201)  # 10 tokens after the first in 201 ms


def test_targets_met_and_missed_are_counted_and_a_miss_is_reported():
    ledger = empty_ledger()
    with logged() as reports:
        for number, (took_s, target_ms) in enumerate(
            [(0.19, 10.0), (0.21, 10.0), (0.19, None), (0.9, 10.0), (0.9, 10.0)]
        ):
            name = str(number)
            ledger.add_request(
                name, RequestExits(releasable=True, bucket=Bucket.of_request(0.5), tpt_target_ms=target_ms)
            )
            ledger.emit(name, 1, now_s=1.0)
            ledger.emit(name, 19, now_s=1.0 + took_s)
            ledger.end_request(name)
    assert (ledger.counts.targets_met, ledger.counts.targets_missed) == (1, 3)
    assert len(reports) == 2 and "10.0 ms not met: a request took 11.1 ms per token" in reports[0]
