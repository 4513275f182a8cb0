"""Memory and disk: said in advance, refused in one line, and less is worked with."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest

from apparate_llm import machine
from apparate_llm.prepare import needs
from apparate_llm.prepare.needs import (
    FEWEST_SLOTS,
    MOST_SLOTS,
    PROCESS_BYTES,
    SPARE_DISK_BYTES,
    Sizes,
    disk_bytes,
    profile_bytes,
    say_needs,
    synthesis_bytes,
    synthesis_limits,
    training_bytes,
)
from apparate_llm.prepare.train import BATCH_ROWS
from apparate_llm.ramps.checkpoint import BaseModelInfo
from scripts.check_prepare import STATED
from tests.preparation import conversations, lines, plan_for, running

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """free(memory, disk) in bytes."""

    def set_free(memory=64 * GIB, disk=64 * GIB):
        monkeypatch.setattr(needs, "available_memory_bytes", lambda: memory)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(disk, 0, disk))

    set_free()
    return set_free


def lines_of(plan):
    with running(plan) as (run, log):
        say_needs(run)
    return lines(log)


def test_the_peak_is_said_before_anything_begins_and_is_the_largest_stages(free, tiny_llama, tmp_path):
    plan = plan_for(tiny_llama, tmp_path)
    sizes = Sizes.of(tiny_llama, BaseModelInfo.of(tiny_llama))
    stages = [synthesis_bytes(plan, sizes, MOST_SLOTS), training_bytes(plan, sizes), profile_bytes(sizes)]
    first, second = lines_of(plan)
    assert first == f"peak memory about {needs.gib(max(stages))}; 64.0 GiB are free"
    assert STATED.search(first), "the check by hand reads it"
    assert second.startswith("3,000 answer tokens need ") and str(tmp_path / "work") in second


def test_what_is_free_is_what_the_control_group_leaves(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_group_limits", lambda root: [(GIB, 7 * GIB // 8)])
    with pytest.raises(ValueError, match=r"^not enough memory: about .* needed, 128 MiB free$"):
        lines_of(plan_for(tiny_llama, tmp_path))


def test_a_peak_that_cannot_fit_is_refused_in_one_line(free, tiny_llama, tmp_path):
    for memory in (GIB // 4, PROCESS_BYTES):
        free(memory=memory)
        with pytest.raises(ValueError, match=r"^not enough memory: about .* needed, .* free$") as error:
            lines_of(plan_for(tiny_llama, tmp_path))
        assert "\n" not in str(error.value)
    free(memory=needs.PROCESS_BYTES * 2)  # enough to write with a few conversations, not for two processes
    with pytest.raises(ValueError, match="not enough memory"):
        lines_of(plan_for(tiny_llama, tmp_path))


def test_with_less_memory_fewer_conversations_run_at_once(free, tiny_llama, tmp_path):
    """The rows of what is under way are what can be less."""
    plan = plan_for(tiny_llama, tmp_path)
    sizes = Sizes.of(tiny_llama, BaseModelInfo.of(tiny_llama))
    slots = []
    with running(plan) as (run, _):
        for wanted in (MOST_SLOTS, 32, FEWEST_SLOTS):
            free(memory=int(synthesis_bytes(plan, sizes, wanted) / 0.9) + 1)
            slots.append(synthesis_limits(run).slots)
    assert slots == [MOST_SLOTS, 32, FEWEST_SLOTS]
    few, many = (synthesis_bytes(plan, sizes, number) for number in (FEWEST_SLOTS, MOST_SLOTS))
    assert few < many


def test_memory_of_a_training_does_not_grow_with_the_tokens(free, tiny_llama, tmp_path):
    """Rows stay on disk; a batch of them is in memory, and the optimizer's state."""
    sizes = Sizes.of(tiny_llama, BaseModelInfo.of(tiny_llama))
    few, many = (plan_for(tiny_llama, tmp_path, tokens=tokens) for tokens in (1000, 100_000_000))
    assert training_bytes(few, sizes) == training_bytes(many, sizes)
    assert training_bytes(few, sizes) > PROCESS_BYTES + BATCH_ROWS * few.ramp_vocab


@pytest.mark.parametrize("untied", [False, True])
def test_a_model_of_one_and_a_half_billion_parameters_needs_what_it_weighs_twice(untied, tmp_path):
    """On a CPU vLLM keeps what it multiplies with as loaded and packed; embedding and head are one table or two."""
    layers, table = 2_620 << 20, 445 << 20
    sizes = Sizes(layers, table, 2 if untied else 1, 28 << 10, 151_936, 1536, 8960, value=2, twice=layers)
    plan = plan_for(tmp_path, tmp_path / "out", aux_layers=(14, 21), ramp_vocab=8192, intermediate_size=4096)
    (tmp_path / "config.json").write_text("{}")
    whole = synthesis_bytes(plan, sizes, MOST_SLOTS)
    assert 2 * layers + (3 if untied else 2) * table < whole < 2 * layers + 3 * table + 5 * GIB


def test_what_is_large_is_given_back_once_it_is_packed(tiny_llama, monkeypatch):
    """vLLM joins gate and up, and queries, keys and values: by what they are then."""
    config, info = json.loads((tiny_llama / "config.json").read_text()), BaseModelInfo.of(tiny_llama)
    gate_up = 2 * config["intermediate_size"] * info.hidden_size * 2
    small, all_kept = Sizes.of(tiny_llama, info), needs.loaded_bytes(Sizes.of(tiny_llama, info))
    assert small.twice == small.layers
    monkeypatch.setattr(needs, "KEPT_BYTES", gate_up)
    large = Sizes.of(tiny_llama, info)
    assert large.layers == small.layers and large.twice == small.layers - info.num_hidden_layers * gate_up
    assert needs.loaded_bytes(large) == all_kept - info.num_hidden_layers * gate_up


def test_the_int8_copy_of_the_head_counts_where_exits_are_served(free, tiny_llama, tmp_path, monkeypatch):
    """In the process that measures costs, and in one of the two servers that verify."""
    sizes = replace(Sizes.of(tiny_llama, BaseModelInfo.of(tiny_llama)), table=GIB)
    plan, peaks = plan_for(tiny_llama, tmp_path), []
    for has_copy in (True, False):
        monkeypatch.setattr(needs, "has_fast_int8", lambda has_copy=has_copy: has_copy)
        stages = (profile_bytes(sizes), needs.verification_bytes(sizes), synthesis_bytes(plan, sizes, MOST_SLOTS))
        peaks.append((*stages, training_bytes(plan, sizes)))
    more = [with_copy - without for with_copy, without in zip(*peaks, strict=True)]
    assert more == [GIB // 2, GIB // 2, 0, 0]


def test_two_servers_that_verify_count(free, tiny_llama, tmp_path):
    sizes = Sizes.of(tiny_llama, BaseModelInfo.of(tiny_llama))
    stated = lines_of(plan_for(tiny_llama, tmp_path, verify=True))[0]
    assert stated.startswith(f"peak memory about {needs.gib(needs.verification_bytes(sizes))};")
    assert (
        needs.verification_bytes(sizes) > profile_bytes(sizes) and stated != lines_of(plan_for(tiny_llama, tmp_path))[0]
    )
    free(memory=5 * PROCESS_BYTES)
    lines_of(plan_for(tiny_llama, tmp_path))
    with pytest.raises(ValueError, match="not enough memory"):
        lines_of(plan_for(tiny_llama, tmp_path, verify=True))


# ---- disk


def test_too_little_disk_for_the_tokens_is_refused_in_one_line(free, tiny_llama, tmp_path):
    need = disk_bytes(plan_for(tiny_llama, tmp_path), BaseModelInfo.of(tiny_llama), 3000)
    free(disk=need - 1)
    with pytest.raises(ValueError, match=r"^not enough disk space in .*: .* needed, .* free$"):
        lines_of(plan_for(tiny_llama, tmp_path))
    free(disk=need + 1)
    assert len(lines_of(plan_for(tiny_llama, tmp_path))) == 2


def test_rows_that_are_there_already_do_not_need_the_space_again(free, tiny_llama, tmp_path):
    plan = plan_for(tiny_llama, tmp_path, tokens=40_000)
    need = disk_bytes(plan, BaseModelInfo.of(tiny_llama), 40_000)
    with running(plan) as (run, _):
        run.store.append(conversations(400))
        there = run.store.size()
        free(disk=need - there // 2)
        say_needs(run)
        free(disk=need - there - 1)
        with pytest.raises(ValueError, match="not enough disk space"):
            say_needs(run)


def test_with_a_time_budget_the_disk_is_looked_at_as_well(free, tiny_llama, tmp_path):
    plan = plan_for(tiny_llama, tmp_path, tokens=None, time_budget_s=3600.0)
    *_, line = lines_of(plan)
    assert line.startswith("each million answer tokens needs ") and "there is room for" in line
    free(disk=SPARE_DISK_BYTES // 2)
    with pytest.raises(ValueError, match=r"^not enough disk space in .*: 128 MiB free, at least .* needed$"):
        lines_of(plan)


def test_rows_stop_where_training_could_not_be_kept_any_more(free, tiny_llama, tmp_path):
    with running(plan_for(tiny_llama, tmp_path, tokens=None, time_budget_s=3600.0)) as (run, _):
        limits = synthesis_limits(run)
        assert not limits.disk_is_full()
        free(disk=SPARE_DISK_BYTES)
        assert limits.disk_is_full()
        before = needs.disk_left(run)
        run.store.append(conversations(20))
        assert needs.disk_left(run) < before, "the order of more rows has to fit, too"


# ---- time and context


def test_a_budget_that_a_model_cannot_keep_is_said_to_be_short(free, tiny_llama, tmp_path):
    for budget_s, says in ((60.0, True), (3600.0, False)):
        texts = lines_of(plan_for(tiny_llama, tmp_path / f"{budget_s}", tokens=None, time_budget_s=budget_s))
        assert any("a time budget of 1m 00s is short for this model: about 2m" in line for line in texts) == says
    assert not any("time budget" in line for line in lines_of(plan_for(tiny_llama, tmp_path / "tokens")))


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 131072}, 2048),
        ({}, 2048),
        ({"max_position_embeddings": None}, 2048),
        ({"max_position_embeddings": 4096, "model_max_length": 1024}, 1024),
    ],
)
def test_the_context_is_the_models_where_that_is_short(config, length, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert needs.context_length(tmp_path) == length


def test_a_context_that_is_too_short_is_refused_before_anything_begins(free, tiny_llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    with pytest.raises(ValueError, match="context of 32 tokens is too short, 64 are needed"):
        lines_of(plan_for(model, tmp_path / "out"))
