"""When exits come back after a failure."""

from apparate_llm.exits.safety import FIRST_PAUSE_S, HOUR_S, MOST_RETURNS, Asides, Safety
from tests.logged import logged


def fail(safety: Safety, now_s: float) -> float:
    """Seconds until exits come back."""
    safety.failed("drafting", RuntimeError("x"), now_s)
    assert safety.is_off and safety.returns_s is not None
    return safety.returns_s - now_s


def test_the_pause_doubles_with_each_failure_and_begins_anew_after_an_hour_without():
    safety, now_s = Safety(), 0.0
    for number in range(4):
        pause_s = fail(safety, now_s)
        assert pause_s == FIRST_PAUSE_S * 2**number
        assert not safety.is_due(now_s + pause_s - 0.1) and safety.is_due(now_s + pause_s)
        now_s += pause_s
        safety.returned(now_s, by_hand=False)
        assert not safety.is_off and not safety.is_due(now_s + HOUR_S) and safety.status(now_s) is None
    assert fail(safety, now_s + HOUR_S) == FIRST_PAUSE_S
    assert safety.num_failures == 5 and safety.num_returns == 4


def test_exits_come_back_so_often_an_hour_and_by_hand_at_any_time():
    safety = Safety()
    returned_s = []
    now_s = 0.0
    for _ in range(40):
        now_s += fail(safety, now_s)
        returned_s.append(now_s)
        safety.returned(now_s, by_hand=False)
    for at in returned_s:
        assert sum(at <= other < at + HOUR_S for other in returned_s) <= MOST_RETURNS
    fail(safety, now_s)
    safety.returned(now_s, by_hand=True)
    assert not safety.is_off


def test_what_fails_in_every_step_is_not_logged_in_every_step():
    safety = Safety()
    with logged() as messages:
        for step in range(1000):
            safety.failed("drafting", RuntimeError("x"), step * 0.02)
    assert len(messages) == 10 and safety.num_failures == 1000
    assert messages[0].startswith("Early exits failed (drafting) and are off for 30 s, or until they are configured")
    assert safety.status(20.0) == {"part": "drafting", "error": "RuntimeError", "returns_in_s": HOUR_S - 0.0}


def test_asides_fail_without_a_word_to_exits():
    asides = Asides()
    with logged() as messages:
        for _ in range(5):
            asides.run("The log", lambda: 1 / 0)
    assert asides.num_failures == 5 and len(messages) == 3 and "ZeroDivisionError" in messages[0]
