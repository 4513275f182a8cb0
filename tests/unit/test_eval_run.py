"""An evaluation from its plan to its results, over fake servers."""

import io
import json
import sys
import tomllib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from apparate_llm.cli import build_parser, spelt_out
from apparate_llm.eval import plan as plans
from apparate_llm.eval import systems as systems_module
from apparate_llm.eval.client import Chunk, Completion
from apparate_llm.eval.evaluate import Evaluation, difference, evaluate
from apparate_llm.eval.notes import notes_of
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.schema import Ratio, Run
from apparate_llm.eval.servers import Server, free_port
from apparate_llm.eval.store import Block, BlockKey, Store
from apparate_llm.eval.summary import Summary, cells_of, quality_of, ratios_of, runs_of
from apparate_llm.eval.systems import ModelChoice, System, baselines_of, plain_vllm, systems_of
from apparate_llm.eval.workloads import LEAD_IN_S, closed, poisson, traced
from apparate_llm.host.choice import BIND
from apparate_llm.host.limits import CpuLimits
from apparate_llm.progress import Progress
from apparate_llm.redact import redacted
from tests.fake_server import fake_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base_url():
    with fake_server() as url:
        yield url


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": text}]) for text in texts]


def evaluation_of(folder: Path, systems: list[System], asked: list[Prompt], **changes: Any) -> Evaluation:
    loads = [closed(len(asked), clients, max_tokens=9, length="free") for clients in (1, 2)]
    store = Store(folder)
    store.open({"loads": [[load.name, False] for load in loads]}, fresh=False)
    made = Evaluation(Path("fake"), systems, asked, loads, repeat=2, store=store, start_timeout_s=5.0)
    return replace(made, **changes)


def results_of(
    evaluation: Evaluation, phases: tuple[tuple[str, int], ...] = ()
) -> tuple[list[Run], list[Ratio], list[Block]]:
    blocks = list(evaluation.store.blocks())
    cells = cells_of(blocks, evaluation.systems, evaluation.loads)
    summary = Summary(Path("fake"), 4, evaluation.prompts, phases, {"tpt": 55.0}, evaluation.sampling)
    runs = runs_of(cells, summary)
    return runs, ratios_of(cells, runs), blocks


def test_two_systems_under_two_loads_give_the_known_values(base_url, tmp_path):
    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    evaluation = evaluation_of(tmp_path / "out", systems, prompts("steady", "bursts", "refused"))
    evaluate(evaluation, Progress(Console(quiet=True)))
    runs, ratios, blocks = results_of(evaluation)
    assert [(run.system, run.load) for run in runs] == [
        ("vllm", "1 client"), ("same", "1 client"), ("vllm", "2 clients"), ("same", "2 clients")
    ]  # fmt: skip
    for run in runs:
        assert (run.requests, run.failed, run.output_tokens) == (6, 2, 28)  # two repeats; 6 and 8 tokens
        assert (
            run.tpt_ms.mean > 0.9 * (50 + 250 / 7) / 2
        )  # sleeping is never shorter than asked; exact: the client's tests
        assert run.tpt_ms.mean_ci95 is None  # of four blocks
        assert run.ttft_ms.p50 > 90
        assert run.shared_chunk_frac == pytest.approx(4 / 14)
        assert run.goodput_frac is not None and run.goodput_frac <= 4 / 6
        assert run.exits is None and run.divergences is None and run.cpu_s_per_token is None
    assert runs[0].quality.identical_frac is None and runs[1].quality.identical_frac == 1.0
    assert runs[1].quality.rouge_l_baseline == 1.0 and runs[1].quality.first_difference_tokens is None
    for ratio in ratios:
        assert len(ratio.tpt_mean_by_repeat) == 2
        assert (ratio.units, ratio.tpt_mean_ci95, ratio.ttft_mean_ci95, ratio.throughput_ci95) == (4, None, None, None)
    notes = notes_of(blocks, systems, evaluation.loads)
    assert any("8 requests failed" in note for note in notes)
    assert any(
        note.startswith("No interval under 1 client (4 blocks), 2 clients (4 blocks): it takes 8") for note in notes
    )


def test_texts_are_held_against_those_of_policy_off_and_of_the_first_load(base_url, tmp_path):
    systems = [System(name, base_url=base_url) for name in ("off", "lossless")]
    evaluation = evaluation_of(tmp_path / "out", systems, prompts("steady", "bursts"))
    evaluate(evaluation, Progress(Console(quiet=True)))
    blocks = list(evaluation.store.blocks())
    last = next(b for b in blocks if evaluation.loads[b.key.load].concurrency == 2 and b.key.system == "lossless")
    last.completions[0] = replace(last.completions[0], text="another")
    cells = cells_of(blocks, evaluation.systems, evaluation.loads)
    runs = runs_of(cells, Summary(Path("fake"), 4, evaluation.prompts, (), {}))
    assert [(run.same_as_off_frac, run.same_as_first_load_frac) for run in runs] == [
        (None, None), (1.0, None), (None, 1.0), (0.75, 0.75)
    ]  # fmt: skip


def test_an_interrupted_evaluation_goes_on_where_it_was(base_url, tmp_path, monkeypatch):
    from apparate_llm.eval import evaluate as module

    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    asked = prompts("single", "single")
    measured = []

    def until_interrupted(server, evaluation, key, *rest):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(key)
        return plain(server, evaluation, key, *rest)

    plain = module._measure_block
    monkeypatch.setattr(module, "_measure_block", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluation_of(tmp_path / "out", systems, asked), Progress(Console(quiet=True)))
    kept = {path: path.read_bytes() for path in (tmp_path / "out" / "blocks").iterdir()}
    assert len(kept) == 3
    monkeypatch.setattr(module, "_measure_block", lambda *a: measured.append(a[2]) or plain(*a))
    evaluation = evaluation_of(tmp_path / "out", systems, asked)
    evaluate(evaluation, Progress(Console(quiet=True)))
    assert len(measured) == len(set(measured)) == 8  # 2 loads x 2 repeats x 2 systems, none twice
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert all(evaluation.is_done(system) for system in systems)


def test_what_a_server_answers_first_after_it_was_frozen_does_not_count(tmp_path, monkeypatch):
    from apparate_llm.eval import evaluate as module

    events: list[str] = []
    resume, run_block = Server.resume, module.run_block

    def resumed(server):
        events.append("resumed")
        resume(server)

    def asked(base_url, model, messages, asks, **rest):
        events.extend(messages[ask.prompt_index][0]["content"] for ask in asks)
        return run_block(base_url, model, messages, asks, **rest)

    monkeypatch.setattr(Server, "resume", resumed)
    monkeypatch.setattr(module, "run_block", asked)
    command = (sys.executable, "-m", "uvicorn", "tests.fake_server:app", "--log-level", "warning")
    evaluation = evaluation_of(tmp_path / "out", [System("vllm", command=command)], prompts("single", "single"))
    evaluate(replace(evaluation, start_timeout_s=60.0), Progress(Console(quiet=True)))
    turns = " ".join(events[2:]).split("resumed ")[1:]  # the first two warm the server up, once and for all
    assert [turn.split()[0] for turn in turns[:4]] == ["Hello"] * 4  # 2 loads x 2 repeats
    answers = [done for block in evaluation.store.blocks() for done in block.completions]
    assert len(answers) == 8 and all(done.text == "a" for done in answers)


def test_other_settings_are_refused_and_fresh_ones_begin_anew(tmp_path):
    store = Store(tmp_path / "out")
    assert store.open({"repeat": 1, "seed": 0}, fresh=False) == 0
    with pytest.raises(ValueError, match=r"other settings \(repeat\)"):
        store.open({"repeat": 2, "seed": 0}, fresh=False)
    assert store.open({"repeat": 2, "seed": 0}, fresh=True) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and holds no evaluation"):
        Store(tmp_path / "mine").open({}, fresh=True)


def test_a_system_that_does_not_answer_is_skipped_and_said_so(base_url, tmp_path):
    gone = System("gone", base_url=f"http://127.0.0.1:{free_port()}")
    broken = System("broken", problem="a package is missing")
    evaluation = evaluation_of(tmp_path / "out", [System("vllm", base_url=base_url), gone, broken], prompts("single"))
    evaluate(evaluation, Progress(Console(quiet=True)))
    assert "does not answer" in evaluation.dead["gone"] and evaluation.dead["broken"] == "a package is missing"
    assert {run.system for run in results_of(evaluation)[0]} == {"vllm"}
    with pytest.raises(RuntimeError, match="the baseline does not run"):
        bad = replace(gone, name="vllm")
        evaluate(evaluation_of(tmp_path / "other", [bad], prompts("single")), Progress(Console(quiet=True)))


def test_a_log_tells_what_an_evaluation_does(base_url, tmp_path, monkeypatch):
    monkeypatch.setattr("apparate_llm.progress.FIRST_EVERY_S", 0.05)
    evaluation = evaluation_of(tmp_path / "out", [System("vllm", base_url=base_url)], prompts("steady", "single"))
    file = io.StringIO()
    with Progress(Console(file=file), poll_s=0.02) as progress:
        evaluate(evaluation, progress)
    messages = [line[10:] for line in file.getvalue().splitlines()]  # behind the time of day
    assert messages[0].startswith("start vllm  log ")
    measuring = [line for line in messages if line.startswith("measure  ")]
    assert measuring[0] == "measure  0/8 requests (0 %)" and "measure  8/8 requests (100 %)" in measuring[-1]
    under_way = [line for line in measuring[1:-1] if "vllm, 2 clients, pass 1 of 2, stage left " in line]
    assert any(line.startswith("measure  5/8 requests") for line in under_way)  # within a block, too


def test_an_evaluation_that_goes_on_fills_its_log_no_faster_than_before(base_url, tmp_path, monkeypatch):
    from apparate_llm.eval import run as module

    evaluation = evaluation_of(tmp_path / "out", [System("vllm", base_url=base_url)], prompts("steady", "single"))
    evaluate(evaluation, Progress(Console(quiet=True)))
    plan = plans.EvalPlan(
        choice=ModelChoice(Path("fake")),
        systems=evaluation.systems,
        prompts=evaluation.prompts,
        loads=evaluation.loads,
        settings=evaluation.store.plan(),
        folder=tmp_path / "out",
        repeat=2,
        start_timeout_s=5.0,
        fresh=False,
        slo_ms={},
    )

    def stopped(evaluation, progress):
        raise RuntimeError(progress.before_s)

    monkeypatch.setattr(module, "evaluate", stopped)
    with pytest.raises(RuntimeError) as error:
        module._run(plan)
    (before_s,) = error.value.args
    assert before_s == sum(block.wall_s for block in evaluation.store.blocks()) > 0.1


def test_requests_of_a_system_that_stopped_answering_are_not_waited_for(base_url, tmp_path, monkeypatch):
    from apparate_llm.eval import evaluate as module

    plain = module._measure_block

    def until_it_stops(server, evaluation, key, *rest):
        if server.system.name == "same" and key.load == 1:
            raise RuntimeError("ended\nwith two lines")
        return plain(server, evaluation, key, *rest)

    monkeypatch.setattr(module, "_measure_block", until_it_stops)
    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    file = io.StringIO()
    evaluate(evaluation_of(tmp_path / "out", systems, prompts("single")), Progress(Console(file=file)))
    messages = [line[10:] for line in file.getvalue().splitlines()]
    assert "same stopped answering under 2 clients: ended" in messages
    assert messages[-1].startswith("measure  6/6 requests (100 %)")


def test_a_system_for_one_request_at_a_time_is_measured_with_one_client(base_url, tmp_path):
    serial = System("serial", base_url=base_url, max_concurrency=1)
    evaluation = evaluation_of(tmp_path / "out", [System("vllm", base_url=base_url), serial], prompts("single"))
    evaluate(evaluation, Progress(Console(quiet=True)))
    runs, _, blocks = results_of(evaluation)
    assert [run.load for run in runs if run.system == "serial"] == ["1 client"]
    assert any("serial works on one request" in n for n in notes_of(blocks, evaluation.systems, evaluation.loads))


def test_exits_are_counted_per_block_and_make_the_timeline(tmp_path):
    ours = System("early-exit-0.05", has_exits=True, bound=0.05)
    evaluation = evaluation_of(tmp_path / "out", [ours], prompts("a", "b", "c", "d", "e"))
    for number, (first, divergences) in enumerate([(0, 1), (4, 3)]):
        before = {"emitted": 5, "divergences": 1, "exits_by_depth": {"0": 2}, "divergence_frac": 0.2}
        before["divergences_at_worst_frac"] = None  # nothing emitted yet
        after = {"emitted": 25, "divergences": 1 + divergences, "divergence_frac": 0.1}
        after["exits_by_depth"] = {"0": 6, "2": 1}
        extra = dict.fromkeys(("held", "accepted", "released", "unverified", "shallow_blocks"), 4)
        after["divergences_at_worst_frac"] = 0.3
        counts = difference(before, after) | extra | {"regret_nats": 0.5}
        assert counts["emitted"] == 20 and counts["exits_by_depth"] == {"0": 4, "2": 1}
        done = Completion(first, 0.0, [Chunk(0.1, 1, 1), Chunk(0.29, 20, 20)], "x" * 20, 20)
        key = BlockKey(0, 0, number, ours.name)
        evaluation.store.add(Block(key, [done], 1.0, counts, 0.5, None, 1.5, 5.0, 0.0))
    (run,), ratios, _ = results_of(evaluation, (("x", 0), ("y", 4)))
    assert ratios == [] and run.divergences == 4 and run.exits.by_depth == {"0": 8, "2": 2}
    assert [(point.phase, point.output_tokens) for point in run.timeline] == [("x", 20), ("y", 40)]
    assert [point.divergence_frac for point in run.timeline] == [1 / 20, 4 / 40]
    assert [point.divergences_at_worst_frac for point in run.timeline] == [5 / 20, 12 / 40]
    assert run.divergences_at_worst == 12  # 8 exits ended without a verdict
    assert [point.block_divergence_frac for point in run.timeline] == [1 / 20, 3 / 20]
    assert run.regret_nats_per_token == pytest.approx(1 / 40)
    assert run.cpu_s_per_token == pytest.approx(1 / 40) and run.energy_j_per_token is None
    assert run.blocks_per_token == pytest.approx(((40 + 8 - 8) * 4 + 8) / 40) and run.peak_memory_gib == 1.5


def test_answers_are_compared_with_the_baselines_and_with_references():
    asked = [
        Prompt([], "math", reference="... #### 42"),
        Prompt([], "qa", reference="the dog sat"),
        Prompt([], "code", tests="assert f(2) == 4"),
    ]

    def answers(*texts):
        return [Completion(i, 0.0, [Chunk(0.1, 3, 3), Chunk(0.2, 9, 99)], text, 9) for i, text in enumerate(texts)]

    code = "```python\ndef f(x):\n    return x * x\n```"
    ours = answers("It is 42.", "the cat sat", code)
    quality = quality_of(ours, answers("It is 41.", "the cat sat", code), asked)
    assert quality.identical_frac == pytest.approx(2 / 3) and quality.first_difference_tokens == 3
    assert quality.same_number_frac == 0.0 and quality.right_number_frac == 1.0
    assert quality.code_passed_frac == 1.0 and quality.rouge_l_reference == pytest.approx(2 / 3)


@pytest.mark.parametrize(("count", "clients", "sizes"), [(16, 1, [2] * 8), (16, 16, [16]), (10, 4, [4, 4, 2])])
def test_blocks_cover_every_prompt_once(count, clients, sizes):
    load = closed(count, clients, max_tokens=9, length="free")
    assert [len(block) for block in load.blocks] == sizes
    assert [ask.prompt_index for block in load.blocks for ask in block] == list(range(count))


def test_varied_lengths_are_the_same_for_all_and_cover_their_range():
    loads = [
        closed(4000, 16, max_tokens=48, length="varied"),
        poisson(4000, 2.0, max_tokens=48, length="varied", seed=0),
    ]
    lengths, others = ([ask.max_tokens for block in load.blocks for ask in block] for load in loads)
    assert lengths == others
    assert set(lengths) == set(range(12, 49)) and sum(lengths) / len(lengths) == pytest.approx(30, rel=0.03)
    assert [load.name for load in loads] == ["16 clients, varied lengths", "2 requests/s, varied lengths"]
    assert not any(load.fixed_length for load in loads)
    assert {len(block) for block in loads[0].blocks} == {16}


def test_poisson_arrivals_have_the_rate_and_are_the_same_again():
    load, again = (poisson(4000, 2.0, max_tokens=9, length="fixed", seed=3) for _ in range(2))
    assert load == again
    assert [ask.prompt_index for block in load.blocks for ask in block] == list(range(4000))
    assert len(load.blocks) == pytest.approx(4000 * 0.5 / 20, rel=0.05)  # slices of 20 s
    assert load.blocks[0][0].at_s == LEAD_IN_S  # what counts begins after the lead-in
    for block in load.blocks:
        times = [ask.at_s for ask in block]
        assert times == sorted(times) and times[0] >= LEAD_IN_S - 1e-6 and times[-1] < LEAD_IN_S + 20 + 1e-6


def test_a_trace_sets_times_and_lengths_and_picks_prompts_of_about_its_size(tmp_path):
    path = tmp_path / "trace.csv"
    rows = ["2023-11-16 18:15:46.6805900,100,44", "2023-11-16 18:15:50.6805900,2,1000", "2023-11-16 18:15:51,100,3"]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    asked = prompts("x" * 9, "x" * 400, "x" * 380)
    (asks,) = traced(path, asked, scale=0.5, num_requests=10, max_tokens=64).blocks
    assert [ask.at_s - LEAD_IN_S for ask in asks] == pytest.approx([0.0, 2.0, 2.15970], abs=1e-4)
    assert [ask.max_tokens for ask in asks] == [44, 64, 3]
    assert [ask.prompt_index for ask in asks] == [1, 0, 2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "columns TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,many,2\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-17,1,2\n2023-11-16,1,2\n", ":3: arrivals"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16T00:00,1,2\n2023-11-17T00:00Z,1,2\n", ":3: a time zone"),
        pytest.param(
            f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,{'1' * 200_000},2\n", "cannot read trace", id="long"
        ),
    ],
)
def test_bad_traces_are_named(tmp_path, text, says):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        traced(path, prompts("x"), scale=1.0, num_requests=10, max_tokens=9)


def test_a_trace_may_have_prompts_and_answers_of_any_size(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,{'9' * 400},{'9' * 400}\n2023-11-17,-1,-1\n")
    load = traced(path, prompts("x", "x" * 99), scale=1.0, num_requests=10, max_tokens=9)
    assert [ask.max_tokens for block in load.blocks for ask in block] == [9, 1]


def test_systems_by_name(tiny_llama):
    choice = ModelChoice(tiny_llama, bounds=(0.01, 0.05))
    systems = systems_of(["bounded", "ngram", "vllm", "static"], ["other=http://localhost:1/v1"], choice)
    names = ["vllm", "early-exit-0.01", "early-exit-0.05", "ngram", "static 0.01", "static 0.05", "other"]
    assert [system.name for system in systems] == names
    assert systems[-1].base_url == "http://localhost:1"
    assert "no shipped ramps fit" in systems[1].problem  # a tiny random model has none
    for names, urls, says in (
        (["vlm"], [], "unknown system 'vlm'; there are vllm, lossless"),
        (["vllm"], ["x"], "NAME=http"),
        (["vllm"], ["vllm=http://x"], "two systems are called vllm"),
    ):
        with pytest.raises(ValueError, match=says):
            systems_of(names, urls, choice)


def speculation_of(system: System) -> dict:
    assert system.command[-2] == "--speculative-config"
    return json.loads(system.command[-1])


@pytest.mark.parametrize(("options", "drafts"), [((), 10), (("--depth", "2", "--max-exits", "6"), 6)])
def test_vllm_s_ngram_has_as_many_drafts_as_ours(tiny_llama, options, drafts):
    (system,) = systems_of(["ngram"], [], ModelChoice(tiny_llama, options=options))
    assert speculation_of(system) == {
        "method": "ngram",
        "num_speculative_tokens": drafts,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }


def test_suffix_decoding_needs_its_package_and_remembers_no_answers(tiny_llama, monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "arctic_inference" else find_spec(name)
    )
    (missing,) = systems_of(["suffix"], [], ModelChoice(tiny_llama))
    assert missing.problem == "the package arctic_inference is not installed: pip install 'apparate-llm[suffix]'"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [package.partition("=")[0] for package in extras["suffix"]] == ["arctic-inference"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find_spec("json"))
    (there,) = systems_of(["suffix"], [], ModelChoice(tiny_llama))
    assert there.problem is None
    assert speculation_of(there) == {"method": "suffix", "suffix_decoding_max_cached_requests": 0}


def test_plain_vllm_tuned_is_on_all_cores(tiny_llama, monkeypatch):
    for cores in ((0, 1), (0,)):
        monkeypatch.setattr(systems_module, "cpu_limits", lambda cores=cores: CpuLimits(len(cores), cores, quota=None))
        plain, tuned, ngram = systems_of(["vllm", "vllm-tuned", "ngram-tuned"], [], ModelChoice(tiny_llama))
        assert tuned.command == plain.command and plain.variables == {}
        assert tuned.variables == ngram.variables == {BIND: ",".join(map(str, cores))}
        assert tuned.started_by == f"{BIND}={tuned.variables[BIND]} {plain.started_by}"


def test_a_server_has_the_variables_of_its_system(tmp_path):
    command = (sys.executable, "-c", "import os; print(os.environ['ONE'], 'VLLM_PLUGINS' in os.environ)")
    for is_foreign in (False, True):
        log = tmp_path / f"{is_foreign}.log"
        system = System("one", command, variables={"ONE": "1"}, is_foreign=is_foreign)
        with Server(system, log=log, start_timeout_s=5.0) as server:
            server.process.wait(60)
        assert log.read_text() == f"1 {not is_foreign}\n"


def test_ratios_are_to_every_baseline_and_texts_to_the_first(base_url, tmp_path):
    systems = [System(name, base_url=base_url) for name in ("tuned", "vllm", "other")]
    evaluation = evaluation_of(tmp_path / "out", systems, prompts("steady"), baseline="tuned")
    evaluate(evaluation, Progress(Console(quiet=True)))
    blocks = list(evaluation.store.blocks())
    for block in blocks:
        if block.key.system == "vllm":
            block.completions[0] = replace(block.completions[0], text="another")
    cells = cells_of(blocks, evaluation.systems, evaluation.loads)
    runs = runs_of(cells, Summary(Path("fake"), 4, evaluation.prompts, (), {}, baseline="tuned"))
    assert [(run.system, run.identical_frac) for run in runs[:3]] == [("tuned", None), ("vllm", 0.0), ("other", 1.0)]
    ratios = ratios_of(cells, runs, ("tuned", "vllm"))
    assert [(r.system, r.baseline) for r in ratios if r.concurrency == 1] == [
        ("vllm", "tuned"), ("other", "tuned"), ("tuned", "vllm"), ("other", "vllm")
    ]  # fmt: skip
    by_pair = {(r.system, r.baseline, r.concurrency): r for r in ratios}
    assert by_pair["vllm", "tuned", 2].tpt_mean == pytest.approx(1 / by_pair["tuned", "vllm", 2].tpt_mean)


def test_a_baseline_must_be_measured_and_be_able_to_run():
    systems = [System("vllm"), System("a"), System("b", problem="a package is missing")]
    assert baselines_of([], systems, "vllm") == ("vllm",)
    assert baselines_of(["a"], systems, "vllm") == ("a", "vllm")
    assert baselines_of(["a"], systems[1:], "vllm") == ("a",)
    with pytest.raises(ValueError, match="--baseline: c is not measured; there are vllm, a, b"):
        baselines_of(["a", "c"], systems, "vllm")
    with pytest.raises(ValueError, match="the baseline b cannot run here: a package is missing"):
        baselines_of(["b"], systems, "vllm")


def test_without_plain_vllm_another_baseline_must_be_named(tiny_llama, tmp_path):
    argv = ["eval", "tpt", str(tiny_llama), "--out", str(tmp_path), "--systems", "vllm-tuned,ngram"]
    with pytest.raises(ValueError, match=r"--systems must name vllm, .*, or --baseline another"):
        plans.tpt_plan(build_parser().parse_args(argv))
    plan = plans.tpt_plan(build_parser().parse_args([*argv, "--baseline", "ngram"]))
    assert plan.baselines == ("ngram",) and [system.name for system in plan.systems] == ["ngram", "vllm-tuned"]
    again = [*argv, "--baseline", "ngram", "--system", "ngram=--policy off"]
    with pytest.raises(ValueError, match="two systems are called ngram"):
        plans.tpt_plan(build_parser().parse_args(again))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--trace t.csv --rate 1", "one of --rate and --trace"),
        ("--rate 1 --concurrency 4", "one of --concurrency and --rate"),
        ("--trace t.csv --concurrency 4", "one of --concurrency and --trace"),
        ("--trace t.csv --length fixed", "--length does not go with --trace"),
        ("--trace t.csv --prompt-tokens 9", "--prompt-tokens does not go with --trace"),
        ("--trace-scale 2", "--trace-scale is about a --trace"),
        ("--num-requests 9", "--num-requests is about a --trace"),
        ("--slice-s 9", "--slice-s is about arrivals"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(flags, says):
    from apparate_llm.cli import build_parser
    from apparate_llm.eval.asked_loads import asked_loads

    args = build_parser().parse_args(["eval", "tpt", "--out", "x", *flags.split()])
    with pytest.raises(ValueError, match=says):
        asked_loads(args, prompts("a"))


def test_a_load_that_is_asked_for_again_is_another_one():
    from apparate_llm.cli import build_parser
    from apparate_llm.eval.asked_loads import asked_loads

    args = build_parser().parse_args(["eval", "tpt", "--out", "x", "--concurrency", "1,16,1", "--length", "both"])
    free = ["1 client", "16 clients", "1 client, time 2"]
    assert [load.name for load in asked_loads(args, prompts("a"))] == free * 2


def test_a_server_that_wants_a_key_gets_it_and_one_that_wants_another_is_said_at_once(tmp_path):
    with fake_server("sk-mine") as url:
        choice = ModelChoice(tmp_path, api_key="sk-mine")
        (system,) = systems_of([], [f"vllm={url}/v1/"], choice)
        assert (system.base_url, system.api_key) == (url, "sk-mine") and "sk-mine" not in repr((system, choice))
        evaluation = evaluation_of(tmp_path / "out", [system], prompts("single"))
        evaluate(evaluation, Progress(Console(quiet=True)))
        assert all(not done.error for block in evaluation.store.blocks() for done in block.completions)
        (system,) = systems_of([], [f"vllm={url}"], ModelChoice(tmp_path, api_key="sk-other"))
        with (
            pytest.raises(RuntimeError, match="vllm wants another API key"),
            Server(system, log=tmp_path / "log", start_timeout_s=60.0) as server,
        ):
            server.wait_ready()


def test_servers_started_here_are_asked_with_the_key_they_were_given(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert plain_vllm(ModelChoice(tmp_path)).api_key is None
    assert plain_vllm(ModelChoice(tmp_path, api_key="sk-user")).api_key == "sk-user"
    monkeypatch.setenv("VLLM_API_KEY", "sk-environment")
    assert plain_vllm(ModelChoice(tmp_path, api_key="sk-user")).api_key == "sk-environment"
    system = plain_vllm(ModelChoice(tmp_path, vllm_flags=("--api_key=sk-flag", "--seed", "3"), api_key="sk-user"))
    assert system.api_key == "sk-flag"
    assert (
        system.started_by.endswith("--api_key=*** --seed 3")
        and "python -m vllm.entrypoints.launchers" in system.started_by
    )


def settings_of(argv: list[str]) -> tuple[list[str], dict]:
    """The flags that servers get, and the settings that are kept."""
    args = build_parser().parse_args(spelt_out(argv))
    return plans.server_flags(args.vllm_flag, 2), plans._settings(args, ModelChoice(Path("model")), [], [], [])


def test_vllm_flags_may_be_written_with_a_blank():
    for flags in (
        ["--vllm-flag", "--max-model-len 4096", "--vllm-flag", '--hf-overrides {"a": 1}'],
        ["--vllm-flag", "--max-model-len=4096", "--vllm-flag", '--hf-overrides={"a": 1}'],
        ["--vllm-flag=--max-model-len 4096", "--vllm-flag=--hf-overrides '{\"a\": 1}'"],
        ["--vllm-flag", "--max-model-len 4096 --hf-overrides '{\"a\": 1}'"],
    ):
        given, _ = settings_of(["eval", "quick", *flags, "--vllm-flag", "--enforce-eager"])
        read = [part for flag in given for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
        assert read[:5] == ["--max-model-len", "4096", "--hf-overrides", '{"a": 1}', "--enforce-eager"]
        assert read[5] == "--kv-cache-memory-bytes"
    given, _ = settings_of(["eval", "tpt", "--out", "x", "--vllm-flag", "--kv_cache_memory_bytes 1G"])
    assert given == ["--kv_cache_memory_bytes", "1G"]
    with pytest.raises(ValueError, match="--vllm-flag: --port is set by the evaluation itself"):
        settings_of(["eval", "quick", "--vllm-flag", "--port 8000"])


def test_no_key_is_kept():
    argv = ["eval", "tpt", "--out", "x", "--api-key", "sk-1", "--vllm-flag", "--api-key sk-2 sk-3", "--seed", "3"]
    argv += ["--vllm-flag=--api_key=sk-4", "--vllm-flag", "--api-key=sk-5", "--api-key=sk-6"]
    assert "sk-" not in str(settings_of(argv)[1]) and "sk-" not in " ".join(redacted(argv))
    assert redacted(argv)[-1] == "--api-key=***" and "3" in redacted(argv)
