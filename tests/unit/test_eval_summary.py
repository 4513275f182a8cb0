"""From blocks with known times to figures and their intervals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apparate_llm.eval.client import Chunk, Completion
from apparate_llm.eval.notes import notes_of
from apparate_llm.eval.report import sections
from apparate_llm.eval.store import Block, BlockKey, Store
from apparate_llm.eval.summary import Summary, cells_of, ratios_of, runs_of, steps_of
from apparate_llm.eval.systems import System
from apparate_llm.eval.tables import DASH, divergence_frac, share_rows, tables
from tests.eval_results import a_result, text_of
from tests.evaluations import evaluation_of, prompts, results_of


def block_of(key: BlockKey, *tpt_ms: float, ttft_ms: float = 100.0) -> Block:
    """Answers of 11 tokens."""
    first = ttft_ms / 1e3
    done = [
        Completion(i, 0.0, [Chunk(first, 1, 1), Chunk(first + ms / 100, 11, 11)], "x", 11)
        for i, ms in enumerate(tpt_ms)
    ]
    return Block(key, done, max(tpt_ms) / 100 + first, None, None, None, None, 5.0, 0.0)


def test_intervals_of_ratios_are_over_blocks_that_both_systems_have(tmp_path):
    systems = [System("vllm"), System("ours")]
    evaluation = evaluation_of(tmp_path / "out", systems, prompts("a", "b"))
    for number in range(13):
        slower = 1 + number % 4 / 10
        evaluation.store.add(block_of(BlockKey(0, 0, number, "vllm"), 50.0 * slower, 60.0 * slower))
        if number < 12:
            evaluation.store.add(block_of(BlockKey(0, 0, number, "ours"), 25.0 * slower, 30.3 * slower, ttft_ms=80.0))
    (_, ours), (ratio,), blocks = results_of(evaluation)
    assert ratio.units == 12 and ratio.tpt_mean == pytest.approx(0.5, rel=0.02)
    for low, value, high in (
        (ratio.tpt_mean_ci95[0], 55.3 / 110, ratio.tpt_mean_ci95[1]),
        (ratio.ttft_mean_ci95[0], 0.8, ratio.ttft_mean_ci95[1]),
        (ratio.throughput_ci95[0], ratio.throughput, ratio.throughput_ci95[1]),
        (ours.tpt_ms.mean_ci95[0], ours.tpt_ms.mean, ours.tpt_ms.mean_ci95[1]),
    ):
        assert low - 1e-9 <= value <= high + 1e-9 and high / low < 1.15
    assert ratio.tpt_mean_ci95[1] / ratio.tpt_mean_ci95[0] < 1.01  # a block is as slow for the one as for the other
    assert ratio.tpt_p99_ci95 is None and ratio.ttft_p99_ci95 is None
    assert not any("No interval under 1 client" in note for note in notes_of(blocks, systems, evaluation.loads[:1]))


def test_a_load_without_an_interval_is_said_with_the_blocks_it_had(tmp_path):
    systems = [System("vllm"), System("ours")]
    evaluation = evaluation_of(tmp_path / "out", systems, prompts("a", "b"))
    for repeat in range(9):
        evaluation.store.add(block_of(BlockKey(0, repeat, 0, "vllm"), 50.0))
        evaluation.store.add(block_of(BlockKey(0, repeat, 0, "ours"), 40.0))
        evaluation.store.add(block_of(BlockKey(1, 0, repeat, "vllm"), 50.0))
    evaluation.store.add(block_of(BlockKey(1, 0, 0, "ours"), 40.0))
    _, ratios, blocks = results_of(evaluation)
    assert [ratio.tpt_mean_ci95 for ratio in ratios] == [None, None]
    (note,) = [note for note in notes_of(blocks, systems, evaluation.loads) if "interval" in note]
    assert note.startswith("No interval under 1 client (one block, 9 times), 2 clients (1 block): it takes 8 blocks")


def test_blocks_on_disk_are_read_with_what_did_not_count_and_old_ones_without(tmp_path):
    store = Store(tmp_path / "out")
    store.open({}, fresh=False)
    counted = Completion(0, 1.0, [Chunk(0.5, 1, 1), Chunk(1.0, 11, 11)], "x", 11)
    other = Completion(1, 0.0, [Chunk(0.5, 1, 1), Chunk(1.5, 5, 5), Chunk(2.5, 9, 9)], "y", 9)
    block = replace(block_of(BlockKey(0, 0, 0, "vllm"), 50.0), completions=[counted], wall_s=1.0, uncounted=[other])
    store.add(block)
    assert list(store.blocks()) == [block]
    assert (block.tokens_in_time, block.served_tokens) == (11 + 4, 11 + 9)
    assert replace(block, counts={"emitted": 23}).served_tokens == 23
    (path,) = (tmp_path / "out" / "blocks").iterdir()
    record = json.loads(path.read_text())
    del record["uncounted"]
    path.write_text(json.dumps(record))
    (old,) = store.blocks()
    assert old.uncounted == [] and (old.tokens_in_time, old.served_tokens) == (11, 11)
    assert replace(old, counts={"emitted": 23}).served_tokens == 11  # of what was asked, as it has always been


def test_a_target_of_a_system_is_held_against_each_of_its_requests(tmp_path):
    systems = [System("vllm"), System("target", has_exits=True, tpt_target_ms=50.0)]
    evaluation = evaluation_of(tmp_path / "out", systems, prompts("a", "b"))
    for name in ("vllm", "target"):
        evaluation.store.add(block_of(BlockKey(0, 0, 0, name), 40.0, 49.9))
        evaluation.store.add(block_of(BlockKey(0, 0, 1, name), 50.1, 49.9))
    (plain, ours), _, blocks = results_of(evaluation)
    assert (plain.within_target_frac, ours.within_target_frac) == (None, 0.75)
    failed = [replace(block, completions=[Completion(0, 0.0, [], "", None, "refused")]) for block in blocks]
    (_, ours) = runs_of(
        cells_of(failed, systems, evaluation.loads), Summary(Path("fake"), 4, evaluation.prompts, (), {})
    )
    assert ours.within_target_frac is None


def test_figures_of_a_server_are_over_all_it_did_and_throughput_within_what_counts(tmp_path):
    ours = System("lossless", has_exits=True, bound=0.0)
    evaluation = evaluation_of(tmp_path / "out", [ours], prompts("a"))
    counted = Completion(0, 1.0, [Chunk(0.5, 1, 1), Chunk(1.0, 11, 11)], "x", 11)
    other = Completion(0, 0.0, [Chunk(0.5, 1, 1), Chunk(1.5, 5, 5), Chunk(2.5, 9, 9)], "y", 9)
    counts = dict.fromkeys(("held", "accepted", "released", "unverified", "shallow_blocks"), 4)
    counts |= {"emitted": 22, "divergences": 11, "exits_by_depth": {"0": 4}, "regret_nats": 2.2}
    evaluation.store.add(
        Block(BlockKey(0, 0, 0, ours.name), [counted], 1.0, counts, 4.4, None, 1.5, 5.0, 0.0, None, [other])
    )
    (run,), _, _ = results_of(evaluation)
    assert (run.requests, run.output_tokens, run.served_tokens, run.tokens_at_server) == (1, 11, 22, 22)
    assert run.output_tokens_per_s == 15.0 and run.cpu_s_per_token == pytest.approx(0.2)
    assert run.regret_nats_per_token == pytest.approx(0.1) and run.timeline[-1].divergence_frac == 0.5
    assert divergence_frac(run) == 0.5
    assert run.goodput_frac == 1.0 and run.goodput_per_s == pytest.approx(15 / 11)  # requests of its length


def test_each_part_of_a_gain_is_measured_against_the_system_before_it(tmp_path):
    systems = [System(name) for name in ("vllm", "+threads", "+exits")]  # one is left out
    evaluation = evaluation_of(tmp_path / "out", systems, prompts("a", "b"))
    for number in range(8):
        for system, ms in zip(systems, (60.0, 40.0, 10.0), strict=True):
            evaluation.store.add(block_of(BlockKey(0, 0, number, system.name), ms, ms * 1.2))
    cells = cells_of(list(evaluation.store.blocks()), systems, evaluation.loads)
    runs = runs_of(cells, Summary(Path("fake"), 4, evaluation.prompts, (), {}))
    steps = steps_of(cells, runs)
    assert [(step.system, step.baseline) for step in steps] == [("+threads", "vllm"), ("+exits", "+threads")]
    assert [step.tpt_mean for step in steps] == pytest.approx([2 / 3, 1 / 4])
    assert steps[0].tpt_mean_ci95 == pytest.approx((2 / 3, 2 / 3))  # each block says the same
    results = a_result(runs, ratios_of(cells, runs), steps=steps)
    rows = share_rows(results)
    assert [row[1:3] for row in rows] == [["+threads", "vllm"], ["+exits", "+threads"]]
    assert [row[-1] for row in rows] == ["22.6 %", "77.4 %"]  # log 1.5 and log 4 of log 6
    assert "What each part brings" in text_of(tables(results))
    assert {section.title for section in sections(results)} >= {"What each part brings"}
    results.steps[1].tpt_mean = 3.0  # no gain of which there were shares
    assert [row[-1] for row in share_rows(results)] == [DASH, DASH]
    assert share_rows(a_result(runs, ratios_of(cells, runs))) == []  # of old results
