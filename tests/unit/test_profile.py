"""Which costs are measured, how often, and for how long: turns over sizes, on an engine whose clock the test moves."""

import json
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest

from apparate_llm.prepare import profile as profile_module
from apparate_llm.prepare import profile_stage, timings
from apparate_llm.prepare.profile import (
    BATCH_SIZES,
    FEWEST_SIZES,
    FEWEST_STEPS,
    PROMPTS,
    STEPS,
    TURNS,
    Profiler,
    profile,
)
from apparate_llm.prepare.timings import KNOWN_FRAC, Measurements
from tests.preparation import Clock, plan_for, running

ALIKE = (1.0,) * TURNS
APART = (1.2, 1.0, 1.0)  # times of one turn after the other


class Killed(BaseException):
    pass


class WithoutEngine(Profiler):
    """A size takes `size_s` of the clock; its times are those of `turns`, or of `others`, by size. `kill_at`: the size,
    counted from 1, in whose middle the process dies."""

    def __init__(self, clock, *, size_s=0.1, turns=ALIKE, others=None, kill_at=None):
        self.clock, self.size_s, self.turns, self.others, self.kill_at = clock, size_s, turns, others or {}, kill_at
        self.has_plain_pages = False
        self.measured = []  # sizes and steps
        self.depths, self.pass_ms = [0], 0.0

    def _plain(self, measured):
        return {}

    def _prompts(self, measured, turn):
        pass

    def _size(self, measured, size, steps):
        self.clock.now += self.size_s / 2
        turn = len(measured.turns.get(("verify", size), []))
        measured.add(("verify", size), [10.0 * self.others.get(size, self.turns)[turn]] * steps)
        if len(self.measured) + 1 == self.kill_at:
            raise Killed
        self.clock.now += self.size_s / 2
        measured.add(("draft_step", 0, size), [1.0] * steps)
        self.measured.append((size, steps))

    def sizes(self):
        return Counter(size for size, _ in self.measured)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timings, "time", clock)
    return clock


def test_two_turns_that_agree_are_enough(clock):
    profiler = WithoutEngine(clock)
    profiler.run(Measurements(1e9))
    assert profiler.sizes() == dict.fromkeys(BATCH_SIZES, 2)
    assert {steps for _, steps in profiler.measured} == {STEPS}


def test_sizes_whose_turns_differ_are_measured_again(clock):
    profiler = WithoutEngine(clock, others={4: APART, 8: (1.0, 1.0 + 0.9 * KNOWN_FRAC, 9.0)})
    measured = Measurements(1e9)
    profiler.run(measured)
    assert profiler.sizes() == dict.fromkeys(BATCH_SIZES, 2) | {4: 3}
    assert measured.result([0])["verify_ms"]["4"] == 10.0, "the quietest turn"
    profiler = WithoutEngine(clock, turns=APART)
    profiler.run(Measurements(1e9))
    assert profiler.sizes() == dict.fromkeys(BATCH_SIZES, TURNS)


@pytest.mark.parametrize("limit_s", [0.0, 3.0, 9.0, 30.0, 90.0])
@pytest.mark.parametrize("size_s", [0.05, 1.0, 20.0])
def test_it_ends_in_time_with_the_fewest_sizes_at_least(limit_s, size_s, clock):
    profiler, began_s = WithoutEngine(clock, size_s=size_s, turns=APART), clock.now
    measured = Measurements(limit_s)
    profiler.run(measured)
    assert clock.now - began_s <= max(limit_s + size_s, FEWEST_SIZES * size_s) + 1e-6
    assert [size for size, _ in profiler.measured[:FEWEST_SIZES]] == list(BATCH_SIZES[:FEWEST_SIZES])
    assert measured.result([0])["verify_ms"].keys() >= {str(size) for size in BATCH_SIZES[:FEWEST_SIZES]}
    if limit_s == 0.0:
        assert profiler.measured == [(size, FEWEST_STEPS) for size in BATCH_SIZES[:FEWEST_SIZES]]


@pytest.mark.parametrize("turns", [ALIKE, APART])
@pytest.mark.parametrize("kill_at", range(1, 2 * len(BATCH_SIZES) + 1))
def test_a_kill_costs_the_size_that_was_being_measured(kill_at, turns, clock, tmp_path):
    keep = tmp_path / "turns.json"
    first = WithoutEngine(clock, turns=turns, kill_at=kill_at)
    with pytest.raises(Killed):
        first.run(Measurements(1e9, keep=keep))
    again, undisturbed = WithoutEngine(clock, turns=turns), WithoutEngine(clock, turns=turns)
    measured, whole = Measurements(1e9, keep=keep), Measurements(1e9)
    again.run(measured)
    undisturbed.run(whole)
    assert first.measured + again.measured == undisturbed.measured
    assert measured.turns == whole.turns


def test_time_that_earlier_starts_took_counts(clock, tmp_path):
    keep = tmp_path / "turns.json"
    for number in range(3):
        with pytest.raises(Killed):
            WithoutEngine(clock, size_s=1.0, turns=APART, kill_at=2).run(Measurements(9.0, keep=keep))
        assert timings.kept_in(keep).spent_s == pytest.approx(number + 1)
        clock.now += 1000.0
    last = WithoutEngine(clock, size_s=1.0, turns=APART)
    last.run(Measurements(9.0, keep=keep))
    assert len(last.measured) == 6


def test_what_is_said_to_be_done_never_falls_and_sizes_that_are_cut_off_are_not_measured(clock, capsys):
    profiler = WithoutEngine(clock, size_s=5.0, turns=APART)
    profiler.run(Measurements(32.0))
    assert [size for size, _ in profiler.measured] == [1, 4, 16, 2, 2, 16, 4]
    done = [json.loads(line)["done"] for line in capsys.readouterr().out.splitlines()]
    assert len(done) == len(profiler.measured) and done[0] == 0 and done[-1] < 1
    assert all(before < after for before, after in pairwise(done))


@pytest.mark.parametrize("kill_at", range(2, 8))
def test_a_kill_after_sizes_were_cut_off_does_not_bring_them_back(kill_at, clock, tmp_path):
    keep = tmp_path / "turns.json"
    first, again = (WithoutEngine(clock, size_s=5.0, turns=APART, kill_at=number) for number in (kill_at, None))
    with pytest.raises(Killed):
        first.run(Measurements(32.0, keep=keep))
    again.run(Measurements(32.0, keep=keep))
    assert [size for size, _ in first.measured + again.measured] == [1, 4, 16, 2, 2, 16, 4]


# ---- a slow model


class SlowEngine(Profiler):
    """Its passes take `pass_s` of the clock, `screened_frac` of it with a screened head, and longer in the first
    `busy_s` seconds; a prompt's take as much for each 128 tokens, and nothing else takes any time."""

    def __init__(self, clock, pass_s, *, has_plain_pages=False, screened_frac=1.0, busy_s=0.0):
        self.clock, self.pass_s, self.depths = clock, pass_s, [0, 2]
        self.has_plain_pages, self.screened_frac, self.busy_until_s = has_plain_pages, screened_frac, clock.now + busy_s
        self.longest, self.free_tokens, self.pass_ms = 1024, 398, 0.0
        self.engine = SimpleNamespace(step=lambda: self._pass(1.0))
        self.runner = SimpleNamespace(screened_head=object(), safety=SimpleNamespace(num_failures=0), exit_drafter=None)
        self.drafter = SimpleNamespace(policy=SimpleNamespace(depth=0))
        self.begun = []  # sizes, and lengths of prompts

    def _pass(self, number):
        busy = 1.0 + max(0.0, self.busy_until_s - self.clock.now) / 10.0
        screened = self.screened_frac if self.runner.screened_head else 1.0
        self.clock.now += number * self.pass_s * busy * screened

    def _size(self, measured, size, steps):
        self.begun.append(("size", size))
        super()._size(measured, size, steps)

    def _begin(self, size):
        self._pass(1.0)
        return []

    def _end(self, names):
        pass

    def _add(self, size, tokens):
        self._pass(max(0.0, tokens / 128 - 1))
        self.begun.append(("prompt", tokens))
        return []

    def _held_ms(self, size, held, steps):
        for _ in range(2 + steps):
            self._pass(1.0)
        return [1e3 * self.pass_s] * steps, [1.0] * steps


class ClockOfAll(Clock):
    def perf_counter(self):
        return self.now


@pytest.fixture
def slow_clock(monkeypatch):
    clock = ClockOfAll()
    monkeypatch.setattr(timings, "time", clock)
    monkeypatch.setattr(profile_module, "time", clock)
    monkeypatch.setattr("apparate_llm.engine.huge_pages.use_huge_pages", lambda: None)
    return clock


@pytest.mark.parametrize("has_plain_pages", [False, True])
@pytest.mark.parametrize("limit_s", [60.0, 135.0])
@pytest.mark.parametrize("pass_s", [0.02, 0.2, 0.7, 1.0])
def test_a_slow_models_first_sizes_come_before_prompts_and_all_of_it_ends_in_time(
    pass_s, limit_s, has_plain_pages, slow_clock
):
    engine = SlowEngine(slow_clock, pass_s, has_plain_pages=has_plain_pages)
    began_s = slow_clock.now
    measured = Measurements(limit_s)
    engine.run(measured)
    first, steps = FEWEST_SIZES * (len(engine.depths) + 3 + has_plain_pages), 2 + FEWEST_STEPS
    least_s = (1 + steps + first * steps + FEWEST_SIZES) * pass_s  # plain passes, and the first sizes
    assert slow_clock.now - began_s <= max(limit_s, least_s) + 5 * steps * pass_s
    assert {("verify", size) for size in BATCH_SIZES[:FEWEST_SIZES]} <= measured.turns.keys()
    assert engine.begun[:FEWEST_SIZES] == [("size", size) for size in BATCH_SIZES[:FEWEST_SIZES]]
    if pass_s == 0.02:
        assert {("prompt", tokens) for tokens in PROMPTS} <= measured.turns.keys()
        assert {("plain", size) for size in (1, 4, 16)} <= measured.turns.keys()


def test_a_prompt_that_by_the_shorter_one_would_not_end_in_time_is_not_read(slow_clock):
    engine, measured = SlowEngine(slow_clock, 1.0), Measurements(28.0)
    engine._prompts(measured, 0)
    assert [key for key in measured.turns if key[0] == "prompt"] == [("prompt", 32), ("prompt", 128)]
    assert slow_clock.now - 1000.0 <= 28.0


@pytest.mark.parametrize("pass_s", [0.2, 2.0, 3.0])
def test_a_kill_while_costs_are_measured_loses_less_than_two_minutes(pass_s, slow_clock, tmp_path):
    kept_at, longest_s = [slow_clock.now], [0.0]
    measured = Measurements(300.0, keep=tmp_path / "turns.json")
    keep = measured.keep

    def noticed():
        longest_s[0] = max(longest_s[0], slow_clock.now - kept_at[0])
        kept_at[0] = slow_clock.now
        keep()

    measured.keep = noticed
    SlowEngine(slow_clock, pass_s).run(measured)
    assert 0 < longest_s[0] < 120.0


# ---- plain vLLM's passes


class TwoStarts(WithoutEngine):
    """A start's passes take `factor` times as long as another's, plain ones 1.1 times as long as those with exits."""

    def __init__(self, clock, factor, **settings):
        super().__init__(clock, **settings)
        self.turns, self.factor = (factor,) * TURNS, factor

    def _plain(self, measured):
        return {size: [11.0 * self.factor] for size in BATCH_SIZES[:3] if self._is_due(measured, 0, size)}


@pytest.mark.parametrize("busy_s", [0.0, 5.0, 20.0])
def test_what_else_ran_at_first_does_not_make_plain_passes_longer(busy_s, slow_clock):
    engine = SlowEngine(slow_clock, 0.02, has_plain_pages=True, screened_frac=0.8, busy_s=busy_s)
    engine.run(measured := Measurements(300.0))
    assert len(measured.turns["plain", 1]) == len(measured.turns["verify", 1]) >= 2
    assert measured.plain_frac() == pytest.approx(1.25, rel=0.05)


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_plain_passes_are_compared_with_those_of_the_same_start(kill_at, clock, tmp_path):
    keep = tmp_path / "turns.json"
    with pytest.raises(Killed):
        TwoStarts(clock, 2.0, kill_at=kill_at).run(Measurements(1e9, keep=keep))
    TwoStarts(clock, 1.0).run(measured := Measurements(1e9, keep=keep))
    assert measured.plain_frac() == 1.1
    assert {len(turns) for key, turns in measured.turns.items() if key[0] == "plain"} == {1}


# ---- what is kept


@pytest.mark.parametrize(
    "key",
    [[], ["verify"], ["pass", 1], ["draft_step", 0], ["verify", 1, 2], ["verify", "1"], ["verify", 1.5], ["other", 1]],
)
def test_a_key_that_is_none_is_told_in_one_line_before_anything_starts(key, tmp_path):
    keep = tmp_path / "turns.json"
    keep.write_text(json.dumps({"turns": [[key, [[1.0]]]], "spent_s": 1.0}))
    with pytest.raises(ValueError, match=r"^damaged .*turns\.json: .*; delete it") as error:
        profile(tmp_path / "model", tmp_path / "ramps", (0,), enforce_eager=True, limit_s=1.0, keep=keep)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("turns", [[], [[]], [["1.0"]], [[0.0]], [[1e999]], [[1.0, None]]])
def test_turns_without_times_are_told_as_well(turns, tmp_path):
    keep = tmp_path / "turns.json"
    keep.write_text(json.dumps({"turns": [[["verify", 1], turns]], "spent_s": 1.0}))
    with pytest.raises(ValueError, match=r"^damaged .*turns\.json: "):
        timings.kept_in(keep)


@pytest.mark.parametrize("num_sizes", [0, -1, "2", 2.5])
def test_a_number_of_sizes_that_is_none_is_told_as_well(num_sizes, tmp_path):
    keep = tmp_path / "turns.json"
    keep.write_text(json.dumps({"turns": [], "spent_s": 1.0, "num_sizes": num_sizes}))
    with pytest.raises(ValueError, match="num_sizes must be a number of sizes"):
        timings.kept_in(keep)


@pytest.mark.parametrize("fails", [False, True])
def test_ramps_that_have_learned_nothing_are_there_for_the_costs_only(fails, tiny_llama, tmp_path, monkeypatch):
    """Somebody could serve them."""

    def measured(model, ramps, depths, **settings):
        assert (ramps / "ramps.json").is_file()
        if fails:
            raise RuntimeError("it does not run")
        return {"verify_ms": {"1": 1.0}}

    monkeypatch.setattr(profile_stage, "profile", measured)
    with running(plan_for(tiny_llama, tmp_path / "out")) as (run, _):
        for _ in range(2):
            run.workspace.path("ramps").mkdir()  # of a start that was killed
            with pytest.raises(RuntimeError, match="does not run") if fails else nullcontext():
                profile_stage.measure_costs(run)
            assert not run.workspace.path("ramps").exists()
