"""Which costs are measured, how often, and for how long: turns over sizes, on an engine whose clock the test moves."""

from collections import Counter

import pytest

from apparate_llm.prepare import timings
from apparate_llm.prepare.profile import BATCH_SIZES, FEWEST_SIZES, FEWEST_STEPS, STEPS, TURNS, Profiler
from apparate_llm.prepare.timings import KNOWN_FRAC, Measurements
from tests.preparation import Clock

ALIKE = (1.0,) * TURNS
APART = (1.2, 1.0, 1.0)  # times of one turn after the other


class Killed(BaseException):
    pass


class WithoutEngine(Profiler):
    """A size takes `size_s` of the clock; its times are those of `turns`, or of `others`, by size. `kill_at`: the size,
    counted from 1, in whose middle the process dies."""

    def __init__(self, clock, *, size_s=0.1, turns=ALIKE, others=None, kill_at=None):
        self.clock, self.size_s, self.turns, self.others, self.kill_at = clock, size_s, turns, others or {}, kill_at
        self.measured = []  # sizes and steps

    def _plain(self, measured):
        pass

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
