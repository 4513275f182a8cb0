"""Loads that need no further repeat, where an evaluation that measures them so often is started again."""

import pytest
from rich.console import Console

from apparate_llm.eval import evaluate as module
from apparate_llm.eval.evaluate import evaluate
from apparate_llm.eval.systems import System
from apparate_llm.progress import Progress
from tests.evaluations import evaluation_of, prompts
from tests.fake_server import fake_server

ENOUGH = 2  # repeats


@pytest.fixture
def evaluation(tmp_path):
    """Of two systems under two loads, as each start makes it: as many blocks of a load as two repeats have are
    enough."""
    with fake_server() as url:

        def start():
            systems = [System("vllm", base_url=url), System("same", base_url=url)]
            made = evaluation_of(tmp_path / "out", systems, prompts("single", "single"), repeat=5)
            made.enough = lambda load: sum(block.key.load == load for block in made.store.blocks()) >= 2 * ENOUGH - 1
            return made

        yield start


def quiet():
    return Progress(Console(quiet=True))


def no_server(*args, **settings):
    raise AssertionError("a server was started")


def test_what_is_measured_often_enough_starts_no_server(evaluation, monkeypatch):
    first = evaluation()
    evaluate(first, quiet())
    assert first.repeats == {0: ENOUGH, 1: ENOUGH}
    monkeypatch.setattr(module, "Server", no_server)
    again = evaluation()
    evaluate(again, quiet())
    assert again.repeats == first.repeats and not again.dead
    assert all(again.is_done(system) for system in again.systems)


def test_a_repeat_that_was_begun_is_finished_and_no_other_is_measured(evaluation, monkeypatch):
    """Though the blocks that are there would be enough."""
    first = evaluation()
    evaluate(first, quiet())
    last = max(block.key for block in first.store.blocks())
    first.store._path(last).unlink()
    measured, stages, plain = [], [], module._measure_block

    def measure_block(server, asked, key, load, asks, stage):
        measured.append(key)
        stages.append(stage)
        return plain(server, asked, key, load, asks, stage)

    monkeypatch.setattr(module, "_measure_block", measure_block)
    again = evaluation()
    evaluate(again, quiet())
    assert measured == [last] and again.repeats == {0: ENOUGH, 1: ENOUGH}
    requests = 2 * 2 * ENOUGH * 2  # systems, loads, repeats, prompts
    assert (stages[0].done, stages[0].total) == (requests, requests)
