"""What is asked, by whom and when, and what does not count: over fake servers."""

from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

from apparate_llm.cli import build_parser
from apparate_llm.config import parse_config
from apparate_llm.controller.policies import make_policy
from apparate_llm.eval import plan as plans
from apparate_llm.eval.client import NOTHING_ELSE, Sampling
from apparate_llm.eval.evaluate import evaluate
from apparate_llm.eval.notes import notes_of, sampling_notes
from apparate_llm.eval.store import Store
from apparate_llm.eval.systems import ModelChoice, System, spelt_out, systems_of
from apparate_llm.eval.tables import tables
from apparate_llm.eval.workloads import LEAD_IN_S, closed, poisson
from apparate_llm.host.limits import cpu_limits
from apparate_llm.progress import Progress
from tests.eval_results import a_result, text_of
from tests.evaluations import evaluation_of, prompts, results_of
from tests.fake_server import bodies, fake_server


@pytest.fixture(scope="module")
def base_url():
    with fake_server() as url:
        yield url


def test_no_prompt_is_asked_before_it_is_measured(base_url, tmp_path, monkeypatch):
    """But for those held out: neither to warm up and to settle, nor beside others."""
    from apparate_llm.eval import evaluate as module

    asked: list[int] = []  # numbers of prompts, in order
    counted: set[int] = set()
    run_block = module.run_block

    def watched(base_url, model, messages, asks, *, uncounted=NOTHING_ELSE, **rest):
        early = {ask.prompt_index for ask in uncounted.lead_in} - counted
        counts = {ask.prompt_index for ask in asks if len(messages) > 1 and ask.prompt_index < 4}
        assert all(index >= 4 for index in early), "led in by a prompt that is still to be measured"
        counted.update(counts)
        assert all(index in counted for index in {ask.prompt_index for ask in uncounted.run_out})
        asked.extend(ask.prompt_index for ask in asks if len(messages) > 1)
        return run_block(base_url, model, messages, asks, uncounted=uncounted, **rest)

    monkeypatch.setattr(module, "run_block", watched)
    four = prompts("single 1", "single 2", "single 3", "single 4")
    evaluation = evaluation_of(tmp_path / "out", [System("vllm", base_url=base_url)], four)
    evaluate(replace(evaluation, loads=evaluation.loads[1:], repeat=1), Progress(Console(quiet=True)))
    assert asked == [4, 5, 4, 5, 0, 1, 2, 3]  # warmed up, settled, measured


def test_prefix_caches_are_kept_cold_by_a_salt_for_each_request_or_said_to_be_warm(base_url, tmp_path):
    def asked(url: str) -> tuple[list[str | None], list[str]]:
        """Salts of all requests, and the notes."""
        (system,) = systems_of([], [f"vllm={url}"], ModelChoice(tmp_path))
        evaluation = evaluation_of(tmp_path / system.prefix_cache, [system], prompts("single", "single"))
        bodies.clear()
        evaluate(evaluation, Progress(Console(quiet=True)))
        assert len(bodies) >= 2 + 4 + 8  # warming, settling, measured
        notes = notes_of(list(evaluation.store.blocks()), [system], evaluation.loads)
        return [body.get("cache_salt") for body in bodies], [note for note in notes if "cache" in note]

    salts, (note,) = asked(base_url)
    assert set(salts) == {None} and note.startswith("Prefix caches of vllm may be warm: ")
    with fake_server(version="0.32.0") as url:
        salts, notes = asked(url)
    assert len(set(salts)) == len(salts) and notes == []
    assert all(salt and len(salt) <= 128 and salt.isalnum() for salt in salts)  # as vLLM takes them


def test_servers_that_are_started_here_have_cold_caches(tiny_llama):
    systems = systems_of(["vllm", "lossless", "off", "ngram", "hf"], [], ModelChoice(tiny_llama))
    assert [system.prefix_cache for system in systems] == ["salted"] * 4 + ["none"]


def test_texts_that_are_drawn_at_random_are_not_held_against_each_other(base_url, tmp_path):
    systems = [System(name, base_url=base_url) for name in ("vllm", "off", "lossless")]
    asked = [prompt._replace(reference="abbbb") for prompt in prompts("steady 1", "steady 2")]
    evaluation = evaluation_of(tmp_path / "out", systems, asked, sampling=Sampling(0.7, 40))
    bodies.clear()
    evaluate(evaluation, Progress(Console(quiet=True)))
    assert {body["temperature"] for body in bodies} == {0.7}
    seeds = {body["messages"][0]["content"]: body["seed"] for body in bodies}
    assert (seeds["steady 1"], seeds["steady 2"]) == (40, 41)
    runs, ratios, _ = results_of(evaluation)
    for run in runs:
        compared = (run.identical_frac, run.same_as_off_frac, run.same_as_first_load_frac, run.quality.rouge_l_baseline)
        assert compared == (None,) * 4 and run.quality.rouge_l_reference == 1.0
    assert all(ratio.tpt_mean is not None for ratio in ratios)
    assert "same" not in text_of(tables(a_result(runs, ratios)))
    assert [note.partition(":")[0] for note in sampling_notes(Sampling(0.7, 40))] == [
        "Answers were drawn at temperature 0.7",
        "Requests had a seed, with which no exits are taken",
    ]
    assert sampling_notes(Sampling()) == []


def test_what_decodes_greedily_is_left_out_where_answers_are_drawn(tiny_llama, tmp_path):
    def plan_of(*more: str):
        argv = ["eval", "tpt", str(tiny_llama), "--out", str(tmp_path), "--systems", "vllm,hf", "--prompts", "quick"]
        return plans.tpt_plan(build_parser().parse_args([*argv, *more]))

    sampled = plan_of("--temperature", "0.7", "--sampling-seed", "3")
    assert sampled.sampling == Sampling(0.7, 3) and sampled.settings["temperature"] == 0.7
    assert [system.problem for system in sampled.systems] == [None, "it decodes greedily, so not at --temperature 0.7"]
    greedy = plan_of()
    assert greedy.sampling == Sampling() and [system.problem for system in greedy.systems] == [None, None]
    with pytest.raises(ValueError, match="--sampling-seed is about a --temperature above 0"):
        plan_of("--sampling-seed", "3")


@pytest.mark.parametrize("given", ["-1", "2.5", "warm", "nan"])
def test_a_temperature_that_is_none_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["eval", "tpt", "--out", "x", f"--temperature={given}"])
    assert f"must be from 0 to 2, got '{given}'" in capsys.readouterr().err


def test_clients_begin_out_of_step_with_what_was_asked_before():
    load = closed(6, 4, max_tokens=40, length="free")
    assert [len(block) for block in load.blocks] == [4, 2]
    first, second = load.uncounted
    assert [(ask.prompt_index, ask.max_tokens) for ask in first.lead_in] == [(7, 10), (8, 20), (9, 30)]  # held out
    assert [(ask.prompt_index, ask.max_tokens) for ask in second.lead_in] == [(1, 10), (2, 20), (3, 30)]
    assert [around.run_out for around in load.uncounted] == list(load.blocks)
    alone = closed(6, 1, max_tokens=40, length="free")
    assert all(around.lead_in == () for around in alone.uncounted)


def test_each_slice_of_arrivals_begins_with_those_before_it_and_goes_on_as_it_was():
    load = poisson(60, 1.0, max_tokens=9, length="free", seed=0, slice_s=15.0)
    lead_ins = 0
    for block, around, before in zip(load.blocks, load.uncounted, (None, *load.blocks), strict=False):
        assert all(0.0 <= ask.at_s < LEAD_IN_S for ask in around.lead_in)
        assert around.run_out == block and around.period_s == 15.0
        lead_ins += len(around.lead_in)
        if before is None:  # held out, as the first seconds of what is measured
            early = [ask for ask in block if ask.at_s < 2 * LEAD_IN_S]
            assert [ask.at_s for ask in around.lead_in] == pytest.approx([ask.at_s - LEAD_IN_S for ask in early])
            assert [ask.prompt_index for ask in around.lead_in] == [60 + number for number in range(len(early))]
        else:
            late = [ask for ask in before if ask.at_s >= 15.0]
            assert [(ask.prompt_index, ask.max_tokens) for ask in around.lead_in] == [ask[:2] for ask in late]
            assert [ask.at_s for ask in around.lead_in] == pytest.approx([ask.at_s - 15.0 for ask in late])
    assert lead_ins > 25


def test_arrivals_are_measured_slice_by_slice_in_turns(base_url, tmp_path, monkeypatch):
    monkeypatch.setattr("apparate_llm.eval.workloads.LEAD_IN_S", 0.3)
    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    load = poisson(12, 10.0, max_tokens=9, length="free", seed=1, slice_s=0.4)
    assert len(load.blocks) >= 3
    evaluation = evaluation_of(tmp_path / "out", systems, prompts(*["single"] * 12))
    order = []
    add = Store.add
    monkeypatch.setattr(Store, "add", lambda store, block: order.append(block.key) or add(store, block))
    evaluate(replace(evaluation, loads=[load], repeat=1), Progress(Console(quiet=True)))
    names = [key.system for key in order]
    assert names[:6] == ["vllm", "same", "same", "vllm", "vllm", "same"]
    blocks = list(evaluation.store.blocks())
    for name in ("vllm", "same"):
        counted = [done for block in blocks if block.key.system == name for done in block.completions]
        assert sorted(done.prompt_index for done in counted) == list(range(12))
    assert any(block.uncounted for block in blocks) and all(block.wall_s < 1.0 for block in blocks)


def test_the_parts_of_a_gain_are_switched_on_one_by_one(tiny_llama, lens_ramps, monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    choice = ModelChoice(tiny_llama, options=("--ramps", str(lens_ramps(depth=3)), "--huge-pages", "false"))
    names = ["vllm", "+threads", "+worker", "+pages", "+head", "+exits"]
    assert spelt_out(["hf", "shares"]) == ["hf", *names]
    systems = systems_of(["shares", "vllm"], [], choice)
    assert [system.name for system in systems] == names and not any(system.problem for system in systems)
    plain, threads, worker, *ours = systems
    assert plain.variables == {} and plain.command == threads.command == worker.command
    cores = ",".join(map(str, cpu_limits().cores))
    assert threads.variables == {"VLLM_CPU_OMP_THREADS_BIND": cores}
    in_engine = {"APPARATE_WORKER": "engine", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    assert all(system.variables == threads.variables | in_engine for system in (worker, *ours))
    assert threads.started_by.startswith(f"VLLM_CPU_OMP_THREADS_BIND={cores} python -m vllm")
    assert all(dict(pairwise(system.command))["--tuning"] == "off" for system in ours)
    options = [dict(pairwise(system.command)) for system in ours]
    assert [(given["--huge-pages"], given["--accuracy-bound"]) for given in options] == [("true", "0")] * 3
    assert [given.get("--screened-head") for given in options] == ["false", None, None]
    for given in options[:2]:
        config = parse_config({"policy": given["--policy"], "max_batch_tokens": given["--max-batch-tokens"]})
        policy = make_policy(config, depth=3, depths=(3,), num_layers=6)
        assert [policy.start(requests) for requests in (1, 2, 16)] == [0, 0, 0]  # no draft step is ever tried
    assert "--policy" not in options[2]
