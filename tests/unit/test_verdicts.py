import pytest

from apparate_llm.core import Outstanding
from apparate_llm.engine.verdicts import VerdictLedger


def ledger_with(*exits: Outstanding) -> VerdictLedger:
    ledger = VerdictLedger()
    ledger.add_request("a", releasable=True)
    ledger.release("a", list(exits))
    ledger.check_integrity()
    return ledger


def test_a_verdict_is_due_where_the_position_before_it_is_computed():
    ledger = ledger_with(Outstanding(10, 5, 0), Outstanding(11, 6, 0))
    due = ledger.due("a", first_position=9, num_scheduled=3, first_row=20)
    assert [(item.exit.position, item.row) for item in due] == [(10, 20), (11, 21)]
    assert ledger.due("a", first_position=0, num_scheduled=9, first_row=0) == []
    late = ledger.due("a", first_position=8, num_scheduled=2, first_row=0)
    assert [(item.exit.position, item.row) for item in late] == [(10, 1)]


def test_verdicts_settle_exits():
    ledger = ledger_with(Outstanding(10, 5, 0), Outstanding(11, 6, 0))
    ledger.record(ledger.due("a", first_position=9, num_scheduled=3, first_row=0), [5, 7])
    assert (ledger.counts.verified, ledger.counts.diverged, ledger.counts.outstanding) == (2, 1, 0)
    ledger.check_integrity()


def test_an_ended_request_leaves_its_open_exits_unverified():
    ledger = ledger_with(Outstanding(10, 5, 0), Outstanding(11, 6, 0))
    ledger.record(ledger.due("a", first_position=9, num_scheduled=1, first_row=0), [5])
    ledger.end_request("a")
    ledger.end_request("a")  # told twice, counted once
    assert (ledger.counts.verified, ledger.counts.unverified, ledger.counts.outstanding) == (1, 1, 0)
    ledger.check_integrity()


def test_requests_that_take_no_release_get_none():
    ledger = VerdictLedger()
    ledger.add_request("a", releasable=False)
    with pytest.raises(AssertionError, match="takes none"):
        ledger.release("a", [Outstanding(3, 1, 0)])


def test_the_integrity_check_sees_exits_that_do_not_add_up():
    ledger = ledger_with(Outstanding(10, 5, 0))
    ledger.counts.released += 1
    with pytest.raises(AssertionError, match="2 exits outstanding, 1 on record"):
        ledger.check_integrity()
