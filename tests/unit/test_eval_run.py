"""An evaluation from its plan to its results, over fake servers."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from apparate_llm.eval import plan as plans
from apparate_llm.eval.client import Chunk, Completion
from apparate_llm.eval.evaluate import difference, evaluate
from apparate_llm.eval.notes import notes_of
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.servers import Server, free_port
from apparate_llm.eval.store import Block, BlockKey, Store
from apparate_llm.eval.summary import Summary, cells_of, quality_of, ratios_of, runs_of
from apparate_llm.eval.systems import ModelChoice, System
from apparate_llm.progress import Progress
from tests.evaluations import evaluation_of, prompts, results_of
from tests.fake_server import fake_server


@pytest.fixture(scope="module")
def base_url():
    with fake_server() as url:
        yield url


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
