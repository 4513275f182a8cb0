from types import SimpleNamespace

import pytest

from apparate_llm.engine.parallel import Peers
from apparate_llm.exits import step_clock as module
from apparate_llm.exits.step_clock import StepClock, Took


@pytest.fixture
def step(monkeypatch):
    """A step of so many seconds, in which the process had a CPU for so many."""
    now = {"monotonic": 100.0, "process_time": 7.0}
    for name in now:
        monkeypatch.setattr(module, name, lambda name=name: now[name])
    clock = StepClock(Peers(SimpleNamespace(world_size=1)))

    def run(seconds: float, cpu_s: float) -> StepClock:
        clock.start()
        clock.scheduled(num_requests=4, num_tokens=6, num_decode_tokens=6)
        now["monotonic"] += seconds
        now["process_time"] += cpu_s
        clock.completed()
        return clock

    return run


def test_a_long_step_counts_as_long_as_it_computes(step):
    assert step(2.0, 1.9).last == Took(4, 6, 2000.0) and step(2.0, 0.9).pass_ms == 2000.0


def test_a_step_in_which_the_process_was_frozen_does_not_count(step):
    clock = step(16.0, 0.02)
    assert clock.last is None and clock.pass_ms is None
    assert step(0.02, 0.018).pass_ms == pytest.approx(20.0), "the next one does"


def test_a_short_step_counts_whatever_the_clocks_of_the_cpu_say(step):
    assert step(0.02, 0.0).last == Took(4, 6, pytest.approx(20.0))
