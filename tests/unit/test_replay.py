"""Policies on made-up feedback: the bound holds whatever happens, and the adaptive policy is worth its name."""

import gzip
import json
import random
import time

import pytest

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.feedback import LoggedExit, LoggedStep
from apparate_llm.controller.policies import make_policy
from apparate_llm.controller.replay import LogCosts, Replayed, oracle, replay
from scripts.check_bound import check_bound
from tests import logs


def run(steps: list[LoggedStep], name: str, *, costs: LogCosts | None = None, **options) -> Replayed:
    config = EarlyExitConfig(policy=name, **{"accuracy_bound": 0.05, "max_exits": 3, "max_batch_tokens": 64, **options})
    policy = make_policy(config, depth=0, depths=(0,), num_layers=30)
    costs = costs or LogCosts(steps)
    return replay(steps, costs, policy, accuracy_bound=config.accuracy_bound, kind=config.bound_kind)


def test_a_replay_by_hand():
    def exit_(number: int, confidence: float, agrees: bool) -> LoggedExit:
        return LoggedExit(1, 0, number, confidence, 1, agrees, 0.0 if agrees else 0.5)

    steps = [
        LoggedStep(1, 3, 24.0, [(1, 1.0)] * 2, [exit_(0, 0.8, True), exit_(1, 0.7, True)]),  # both held and accepted
        LoggedStep(1, 3, 24.0, [(1, 1.0)] * 2, [exit_(0, 0.6, False), exit_(1, 0.9, True)]),  # rejected at the first
        LoggedStep(1, 2, 22.0, [(1, 1.0)], [exit_(0, 0.2, True)]),  # not taken
        LoggedStep(1, 1, 20.0, [], []),
    ]
    result = run(steps, "static", hold_threshold=0.5, accuracy_bound=0.0)
    assert (result.emitted, result.held, result.accepted, result.draft_steps) == (3 + 1 + 1 + 1, 3, 2, 5)
    assert result.request_ms == pytest.approx((24 + 2) + (24 + 2) + (20 + 1) + 20)
    assert result.tpt_ratio == pytest.approx((93 / 6) / 20)
    assert oracle(steps, LogCosts(steps), depth=0).emitted == 3 + 1 + 2 + 1


@pytest.mark.parametrize("name", ["adaptive", "apparate", "static"])
@pytest.mark.parametrize("bound", [0.01, 0.05])
def test_a_ramp_that_turns_wrong_while_sure_never_breaks_the_bound(name, bound):
    def agrees(confidence: float, step: int, rng: random.Random) -> bool:
        return rng.random() < (confidence if step // 700 % 2 == 0 else 1.0 - confidence)

    result = run(list(logs.steps(6000, agrees=agrees)), name, accuracy_bound=bound)
    assert result.worst_share <= bound
    assert result.divergences > 0


@pytest.mark.parametrize("name", ["adaptive", "apparate", "static"])
def test_the_bound_holds_against_a_ramp_that_turns_wrong_once_it_is_trusted(name):
    """50,000 verdicts here; `python -m scripts.check_bound` makes a million."""
    checked = check_bound(name, num_verdicts=50_000, accuracy_bound=0.05)
    assert checked.num_verdicts >= 50_000
    assert checked.worst_share <= 0.05
    assert checked.divergence_frac > 0.01, "the bound was never put to the test"


def test_a_request_keeps_to_its_own_bound_and_allowance():
    result = run(list(logs.steps(3000)), "adaptive", accuracy_bound=0.02)
    assert len(result.buckets) == 50
    for bucket in result.buckets.values():
        bucket.check_integrity()
        assert bucket.spent_nano <= bucket.earned_nano


def test_the_regret_bound_holds_in_nats_per_token():
    result = run(list(logs.steps(4000)), "adaptive", accuracy_bound=0.02, bound_kind="regret")
    assert 0.01 < result.regret_per_token <= 0.02
    assert result.released == 0


def test_lossless_is_lossless_and_a_larger_bound_is_faster():
    steps = list(logs.steps(4000))
    lossless, loose = (run(steps, "adaptive", accuracy_bound=bound) for bound in (0.0, 0.1))
    assert lossless.divergences == 0 and lossless.tpt_ratio < 0.75
    assert loose.tpt_ratio < 0.95 * lossless.tpt_ratio
    assert oracle(steps, LogCosts(steps), depth=0).tpt_ratio < lossless.tpt_ratio


def test_adaptive_is_faster_than_any_static_threshold_and_the_papers_policy_at_no_more_divergences():
    steps = list(logs.steps(5000))
    adaptive = run(steps, "adaptive")
    others = [run(steps, "static", threshold=value) for value in (0.8, 0.9, 0.95, 0.98, 0.99)]
    others.append(run(steps, "apparate"))
    for other in others:
        assert adaptive.tpt_ratio < other.tpt_ratio
    assert adaptive.divergence_frac <= 0.05


def test_exits_stop_where_rows_are_dear_and_come_back():
    expensive = list(logs.steps(800, requests=8, row_ms=6.0))
    cheap = list(logs.steps(800, requests=1, row_ms=0.1))
    config = EarlyExitConfig(accuracy_bound=0.0, max_exits=3)
    policy = make_policy(config, depth=0, depths=(0,), num_layers=30)

    def part(steps):
        return replay(steps, LogCosts(steps), policy, accuracy_bound=0.0, kind="agreement")

    assert part(cheap).tpt_ratio < 0.7
    part(expensive[:100])  # settles
    settled = part(expensive[100:])
    assert settled.tpt_ratio < 1.03
    assert part(cheap[100:]).tpt_ratio < 0.7


def test_decisions_take_little_time():
    for requests, limit_ms in ((1, 0.2), (16, 0.5)):
        steps = list(logs.steps(600, requests=requests, row_ms=0.02))
        costs = LogCosts(steps)
        began = time.process_time()
        result = run(steps, "adaptive", costs=costs)
        per_step_ms = (time.process_time() - began) / len(steps) * 1e3
        assert result.draft_steps > 600, "nothing was decided"
        assert per_step_ms < 10 * limit_ms, per_step_ms  # with the replay's own work, and on a busy machine


def test_the_same_feedback_gives_the_same_decisions():
    one, two = (run(list(logs.steps(1500)), "adaptive") for _ in range(2))
    assert (one.emitted, one.request_ms, one.divergences) == (two.emitted, two.request_ms, two.divergences)


STEPS = (  # that no engine has written
    "{", "3", "[]", "[1, 2, 3.0, []]", '["1", 2, 3.0, [], []]', "[0, 2, 3.0, [], []]", "[1, 2.5, 3.0, [], []]",
    "[1, 2, 0, [], []]", "[1, 2, -3.0, [], []]", '[1, 2, "x", [], []]', "[1, 2, NaN, [], []]", "[1, 2, 3.0, 4, []]",
    "[1, 2, 3.0, [[1]], []]", "[1, 2, 3.0, [[0, 1.0]], []]", "[1, 2, 3.0, [[1, -1.0]], []]", "[1, 2, 3.0, [], [1]]",
    '[1, 2, 3.0, [[1, 1.0]], [[7, "0", 0, 0.5, 1, 1, null]]]', "[1, 2, 3.0, [[1, 1.0]], [[7, -1, 0, 0.5, 1, 1, null]]]",
    "[1, 2, 3.0, [[1, 1.0]], [[7, 0, 0, 1.5, 1, 1, null]]]", "[1, 2, 3.0, [[1, 1.0]], [[7, 0, 0, 0.5, 3, 1, null]]]",
    "[1, 2, 3.0, [[1, 1.0]], [[7, 0, 0, 0.5, 1, 1, NaN]]]", "[1, 2, 3.0, [[1, 1.0]], [[7, 0, 0, 0.5, 1, 1, []]]]",
)  # fmt: skip


def log_file(path, count: int = 400):
    from apparate_llm.controller.feedback import SCHEMA_VERSION

    lines = [json.dumps({"schema_version": SCHEMA_VERSION, "num_layers": 30, "model": "made up"})]
    for step in logs.steps(count):
        lines.append(json.dumps([*step[:4], [[*exit_[:5], int(exit_.agrees), exit_[6]] for exit_ in step.exits]]))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_tries_all_parameters_and_draws_them(tmp_path, capsys):
    from apparate_llm.cli import main

    log = log_file(tmp_path / "log.jsonl")
    figure, out = tmp_path / "figure.png", tmp_path / "rows.json"
    command = ["replay", str(log), "--policy", "static", "--accuracy-bound", "0.05", "--param", "threshold=0.8,0.9"]
    assert main([*command, "--param", "max_exits=1,3", "--figure", str(figure), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["parameters"] for row in rows] == [
        "threshold=0.8, max_exits=1",
        "threshold=0.8, max_exits=3",
        "threshold=0.9, max_exits=1",
        "threshold=0.9, max_exits=3",
        "",
    ]
    assert rows[-1]["policy"] == "oracle" and rows[-1]["tpt_ratio"] < min(row["tpt_ratio"] for row in rows[:-1])
    assert rows[1]["tpt_ratio"] < rows[0]["tpt_ratio"]
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert "static" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--param", "window"], "--param must be NAME=V1,V2,..., got 'window'"),
        (["--param", "threshold=high"], "--param threshold: values must be numbers"),
        (["--param", "patience=3"], "policy adaptive has no parameter 'patience'"),
        (["--param", "max_exits=99"], "max_exits: .*less than or equal to 16, got 99"),
        (["--depth", "7"], "--depth: the log holds exits of depth 0, got 7"),
        (["--figure", "nowhere/x.png"], "folder not found: nowhere"),
        (["--param", "depth=7"], "--param depth: the log holds exits of depth 0, got 7"),
        (["--param", "calibrations=3"], "policy adaptive has no parameter 'calibrations'"),
        (["--param", "depths=3"], "policy adaptive has no parameter 'depths'"),
        (["--param", "num_layers=3"], "policy adaptive has no parameter 'num_layers'"),
        (["--param", "sibling=true"], "policy adaptive has no parameter 'sibling'"),
        (["--param", "config=3"], "policy adaptive has no parameter 'config'"),
        (["--param", "parameters=3"], "policy adaptive has no parameter 'parameters'"),
        (["--param", "_passes=3"], "policy adaptive has no parameter '_passes'"),
        (["--param", "release_confidence=-1"], "release_confidence must be a number of at least 0, got -1"),
        (["--param", "release_confidence=NaN"], "release_confidence must be a number of at least 0, got nan"),
        (["--param", "release_confidence=true"], "release_confidence must be a number of at least 0, got True"),
        (["--param", "max_regret_nats=Infinity"], "max_regret_nats must be a number of at least 0, got inf"),
        (["--param", "memory_verdicts=0"], "memory_verdicts must be in"),
        (["--param", "looks_up=1"], "looks_up must be true or false, got 1"),
        (["--policy", "apparate", "--param", "window=0"], "window must be a whole number from 1 to .*, got 0"),
        (["--policy", "apparate", "--param", "window=1.5"], "window must be a whole number from 1 to .*, got 1.5"),
        (["--policy", "apparate", "--param", "adjust_every=null"], "adjust_every must be a whole .*, got None"),
        (["--policy", "apparate", "--param", 'window="a"'], "window must be a whole number from 1 to .*, got 'a'"),
        (["--param", "threshold=" + "1" * 5000], "--param threshold: values must be numbers"),
    ],
)
def test_bad_input_is_one_line(change, says, tmp_path, capsys):
    from apparate_llm.cli import main

    assert main(["replay", str(log_file(tmp_path / "log.jsonl", 8)), *change]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    import re

    assert re.search(says, message), message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hello\n", "is not a feedback log"),
        ("[1]\n", "is not a feedback log"),
        ('{"schema_version": 9}\n', "schema version 9"),
        ('{"schema_version": 1}\n', "num_layers in its header must be a whole number of at least 1, got None"),
        ('{"schema_version": 1, "num_layers": "x"}\n', "num_layers in its header must be a whole number"),
        ('{"schema_version": 1, "num_layers": 3}\n', "the log holds no times"),
        *((f'{{"schema_version": 1, "num_layers": 3}}\n{step}\n', "log.jsonl:2: not an engine step") for step in STEPS),
    ],
)
def test_what_is_no_log_is_one_line(text, says, tmp_path, capsys):
    from apparate_llm.cli import main

    (tmp_path / "log.jsonl").write_text(text)
    assert main(["replay", str(tmp_path / "log.jsonl")]) == 2
    assert says in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "missing.jsonl")]) == 2


def test_a_damaged_archive_is_one_line(tmp_path, capsys):
    from apparate_llm.cli import main

    whole = gzip.compress(log_file(tmp_path / "log.jsonl", 2000).read_bytes())
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path = tmp_path / "log.jsonl.gz"
    for content, says in ((whole[: len(whole) // 2], "damaged "), (flipped, ""), (b"x" * 99, "cannot read ")):
        path.write_bytes(content)
        assert main(["replay", str(path)]) == 2
        error = capsys.readouterr().err
        assert f"{says}{path}" in error and error.count("\n") == 1
    (tmp_path / "log.jsonl").write_bytes(b'{"schema_version": 1, "num_layers": 3}\n\xff\xfe\n' * 9999)
    assert main(["replay", str(tmp_path / "log.jsonl")]) == 2
    assert "log.jsonl" in capsys.readouterr().err
