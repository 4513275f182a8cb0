import json
from pathlib import Path

import pytest

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.feedback import FeedbackLog, LoggedExit, LoggedStep, read_header, read_steps
from apparate_llm.controller.policies import make_policy
from apparate_llm.controller.state import ControllerState, resolve_path
from apparate_llm.core import Decision, Exit
from apparate_llm.machine import cache_folder
from tests.logged import logged

IDENTITY = {"model": "m", "ramps": "abc", "cpu": "c"}


def policy_with(verdicts: int = 0):
    policy = make_policy(EarlyExitConfig(), depth=0, depths=(0,), num_layers=30)
    for _ in range(verdicts):
        policy.on_verdict(Exit(0, 0, 0, 0, 0.9), False)
    return policy


def test_what_was_learned_comes_back_after_a_restart(tmp_path):
    path = tmp_path / "deep" / "state.json"
    learned, fresh = policy_with(50), policy_with()
    ControllerState(path, IDENTITY, writes=True).save(learned)
    assert ControllerState(path, IDENTITY, writes=False).restore(fresh)
    assert fresh.state() == learned.state()
    assert [item.name for item in path.parent.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"schema_version": 7}', "schema version 7, expected 1"),
        (json.dumps({"schema_version": 1, "identity": {**IDENTITY, "cpu": "other"}, "state": {}}), "'cpu': 'other'"),
        (json.dumps({"schema_version": 1, "identity": IDENTITY, "state": {"depth": 0}}), "KeyError"),
        (json.dumps({"schema_version": 1, "identity": IDENTITY, "state": {"depth": 0, "x": [float("nan")]}}), "finite"),
        (
            '{"schema_version": 1, "identity": ' + json.dumps(IDENTITY) + ', "state": {"depth": 0, "x": 1e999}}',
            "finite",
        ),
        ("[" * 100_000, "RecursionError"),
    ],
    ids=["cut off", "a list", "later version", "another machine", "incomplete", "NaN", "infinite", "nested"],
)
def test_a_damaged_or_foreign_file_is_reported_and_ignored(text, says, tmp_path):
    path = tmp_path / "state.json"
    path.write_text(text)
    policy = policy_with()
    before = policy.state()
    with logged() as messages:
        assert not ControllerState(path, IDENTITY, writes=True).restore(policy)
    assert policy.state() == before
    assert says in messages[0] and "ignored" in messages[0]


@pytest.mark.parametrize("wrong", [{"scale": 99.0}, {"offset": "1"}, {"memory_verdicts": 0.0}, {"num_verdicts": -1}])
def test_a_state_that_serving_cannot_have_led_to_is_refused_as_a_whole(wrong, tmp_path):
    path = tmp_path / "state.json"
    ControllerState(path, IDENTITY, writes=True).save(policy_with(50))
    document = json.loads(path.read_text())
    document["state"]["calibrations"][0][-1] |= wrong
    path.write_text(json.dumps(document))
    policy = policy_with()
    before = policy.state()
    with logged() as messages:
        assert not ControllerState(path, IDENTITY, writes=True).restore(policy)
    assert policy.state() == before and "ignored" in messages[0]


def test_what_is_no_number_is_neither_learned_nor_saved(tmp_path):
    path = tmp_path / "state.json"
    policy = policy_with(20)
    before = policy.state()
    exit_ = Exit(0, 0, 0, 0, float("nan"))
    policy.decide(exit_, joint_acceptance=1.0, may_release=True, num_tokens=1)
    policy.on_verdict(exit_, False)
    assert policy.state()["calibrations"] == before["calibrations"]
    policy.calibrations[0, 0, True].scale = float("nan")
    with logged() as messages:
        ControllerState(path, IDENTITY, writes=True).save(policy)
    assert "not saved" in messages[0] and not path.exists()


def test_a_device_or_a_folder_is_no_state_file(tmp_path):
    for path in (Path("/dev/full"), tmp_path):
        with logged() as messages:
            state = ControllerState(path, IDENTITY, writes=True)
            assert not state.restore(policy_with())
            state.save(policy_with(1))
        assert ["ignored" in messages[0], "not saved" in messages[1]] == [True, True]
    assert not Path("/dev/full").is_file()


def test_no_file_is_no_news_and_a_place_that_cannot_be_written_costs_nothing(tmp_path):
    state = ControllerState(tmp_path / "none.json", IDENTITY, writes=True)
    assert not state.restore(policy_with())
    (tmp_path / "file").write_text("")
    with logged() as messages:
        ControllerState(tmp_path / "file" / "state.json", IDENTITY, writes=True).save(policy_with(1))
    assert "not saved" in messages[0]
    ControllerState(tmp_path / "mine.json", IDENTITY, writes=False).save(policy_with(1))
    assert not (tmp_path / "mine.json").exists()


def test_each_server_has_its_own_place(tmp_path):
    one, two = (resolve_path(None, {**IDENTITY, "cpu": cpu}, lambda: tmp_path) for cpu in "ab")
    assert one is not None and two is not None and one != two and one.is_relative_to(tmp_path)
    assert resolve_path("none", IDENTITY, lambda: tmp_path) is None
    assert resolve_path("x.json", IDENTITY, lambda: tmp_path).name == "x.json"


def test_without_a_home_nothing_is_kept(homeless):
    with logged() as messages:
        assert resolve_path(None, IDENTITY, cache_folder) is None
    assert "Controller state is not kept: no cache folder: this user has no home" in messages[0]
    assert resolve_path("x.json", IDENTITY, cache_folder).name == "x.json"


class Took:
    num_requests, num_tokens, verify_ms = 1, 3, 20.12345


class Verdict:
    def __init__(self, confidence: float, decision: Decision, *, greedy: bool = True) -> None:
        self.request_id, self.released, self.agrees, self.regret_nats = (
            "secret prompt",
            decision is Decision.RELEASE,
            True,
            0.0,
        )
        self.exit = Exit(5, 77, 0, 1, confidence, greedy, decision=decision)


def test_a_feedback_log_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "log.jsonl"
    log = FeedbackLog(path, {"num_layers": 30})
    log.drafted([(1, 1.5)])
    log.completed(
        Took, [Verdict(0.9, Decision.HOLD), Verdict(0.99, Decision.RELEASE), Verdict(0.5, Decision.HOLD, greedy=False)]
    )
    log.completed(None, [])
    log.completed(Took, [])
    assert read_header(path)["num_layers"] == 30
    first, second = read_steps(path)
    request = first.exits[0].request
    held, released = LoggedExit(request, 0, 1, 0.9, 1, True, 0.0), LoggedExit(request, 0, 1, 0.99, 2, True, 0.0)
    assert first == LoggedStep(1, 3, 20.123, [(1, 1.5)], [held, released])
    assert second.draft_steps == [] and second.exits == []
    assert "secret" not in path.read_text() and "77" not in path.read_text()


def test_a_feedback_log_is_bounded_and_a_cut_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    log = FeedbackLog(path, {"num_layers": 30}, max_bytes=2000)
    for _ in range(1000):
        log.completed(Took, [Verdict(0.9, Decision.HOLD)])
    assert sorted(item.name for item in tmp_path.iterdir()) == ["log.jsonl", "log.jsonl.1"]
    assert all(item.stat().st_size < 2300 for item in tmp_path.iterdir())
    complete = len(list(read_steps(path)))
    with path.open("a") as file:
        file.write("[1,3,20.1,[")
    assert len(list(read_steps(path))) == complete > 0


def test_a_feedback_log_of_an_earlier_start_is_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    for start in (1, 2):
        log = FeedbackLog(path, {"start": start})
        for _ in range(start):
            log.completed(Took, [])
    assert read_header(path)["start"] == 2 and len(list(read_steps(path))) == 2
    earlier = tmp_path / "log.jsonl.1"
    assert read_header(earlier)["start"] == 1 and len(list(read_steps(earlier))) == 1


@pytest.mark.parametrize("place", ["/dev/full", "missing/log.jsonl", "."])
def test_a_feedback_log_that_cannot_be_written_is_reported_once_in_a_while(place, tmp_path):
    log = FeedbackLog(tmp_path / place, {})
    with logged() as messages:
        for _ in range(5):
            log.completed(Took, [Verdict(0.9, Decision.HOLD)])
    assert len(messages) == 1 and "not written" in messages[0]
    assert log.num_lost == 5
    assert not Path("/dev/full").is_file()


def test_a_disk_that_was_full_for_a_while_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    log = FeedbackLog(path, {})
    log.completed(Took, [])

    class Full:
        """Takes half of what it is given, then nothing."""

        def __init__(self, file) -> None:
            self.file, self.left = file, 10

        def write(self, data) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            taken, self.left = self.left, 0
            return self.file.write(data[:taken])

        def __getattr__(self, name):
            return getattr(self.file, name)

    file, log._file = log._file, Full(log._file)
    log.completed(Took, [])
    log._file = file
    log.completed(Took, [])
    assert log.num_lost == 2, "one that was cut off, one in the pause after it"
    monkeypatch.setattr("apparate_llm.controller.feedback.PAUSE_S", 0.0)
    log._resume_s = 0.0
    log.completed(Took, [])
    assert len(list(read_steps(path))) == 2


def test_a_regret_without_end_is_logged_as_unknown(tmp_path):
    path = tmp_path / "log.jsonl"
    verdict = Verdict(0.9, Decision.HOLD)
    verdict.regret_nats = float("inf")
    FeedbackLog(path, {}).completed(Took, [verdict])
    assert next(read_steps(path)).exits[0].regret_nats is None
