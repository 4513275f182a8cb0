"""`tune`: what is worth measuring, what is kept of it, and a run over fake servers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from apparate_llm import coverage
from apparate_llm.cli import main
from apparate_llm.config import parse_config
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.systems import ModelChoice, System
from apparate_llm.flags import config_of
from apparate_llm.host import chosen
from apparate_llm.host.choice import AS_VLLM, BIND, DEFAULT, OWN_PROCESS, QUEUES, WORKER, Choice
from apparate_llm.host.chosen import choose
from apparate_llm.host.limits import CpuLimits
from apparate_llm.host.options import Tuning
from apparate_llm.progress import Progress
from apparate_llm.tune import command, trials
from apparate_llm.tune.candidates import flags_of, of_kernels, of_pages, of_processes, same
from apparate_llm.tune.decide import Times, Trial, best_of
from apparate_llm.tune.trials import TunePlan, measure, variance
from tests.fake_server import fake_server

TWO = CpuLimits(num_cpus=2, cores=(0, 1), quota=None)
ONE = CpuLimits(num_cpus=1, cores=(0,), quota=None)
SHARED = CpuLimits(num_cpus=8, cores=(0, 1, 2, 3, 4, 5, 6, 7), quota=2.0)

OLD = Choice(threads="all", huge_pages=True, queues="block")

# ---- candidates


@pytest.mark.parametrize("old", [OLD, AS_VLLM, Choice(threads=2, worker="engine", huge_pages=True)], ids=str)
def test_vllms_own_way_is_always_measured_and_the_old_choice_never_twice(old, zentorch):
    candidates = of_processes(old, TWO)
    assert not any(same(one, old, TWO) for one in candidates)
    assert all(one.huge_pages == old.huge_pages and one.kernels == old.kernels for one in candidates), (
        "one thing at a time"
    )
    like_vllm = AS_VLLM.model_copy(update={"huge_pages": old.huge_pages})
    assert any(same(one, like_vllm, TWO) for one in [*candidates, old])
    assert any(one.worker == "engine" for one in [*candidates, old])
    assert len(candidates) == 4


def test_where_one_thread_may_compute_there_are_no_fewer(zentorch):
    assert {one.threads for one in of_processes(OLD, ONE)} == {"all"}


def test_no_candidate_takes_more_threads_than_the_control_group_gives_time_for(zentorch):
    """vLLM knows nothing of the quota: by itself it would take all cores."""
    assert {one.threads for one in of_processes(OLD, SHARED)} == {"all", 1}


def test_kernels_and_pages_are_tried_with_the_best_so_far(zentorch):
    best = Choice(threads="all", worker="engine", huge_pages=True)
    assert of_kernels(best, OLD, TWO, zentorch=False) == []
    zentorch(True)
    (of_vllm,) = of_kernels(best, OLD, TWO, zentorch=True)  # where it is installed, vLLM takes it by itself
    assert of_vllm == best.model_copy(update={"kernels": "stock"})
    (back,) = of_kernels(of_vllm, OLD, TWO, zentorch=True)
    assert back.kernels == "zentorch"
    (small,) = of_pages(best, OLD, TWO, given="madvise")
    assert small == best.model_copy(update={"huge_pages": False})
    left_open = AS_VLLM  # then servers with exits have huge ones
    for by_exits in (True, False):
        (other,) = of_pages(left_open, OLD, TWO, given="always", by_exits=by_exits)
        assert other == left_open.model_copy(update={"huge_pages": not by_exits})
    assert of_pages(best, OLD, TWO, given="never") == of_pages(best, OLD, TWO, given=None) == []


@pytest.mark.parametrize(
    "choice",
    [
        AS_VLLM,
        Choice(threads=1, queues="block"),
        Choice(threads="all", worker="engine", huge_pages=False, kernels="stock"),
    ],
    ids=str,
)
def test_a_candidates_server_is_told_all_of_it(choice, zentorch, tmp_path, monkeypatch):
    monkeypatch.setattr(chosen, "cpu_limits", lambda: TWO)
    tuning, pages = flags_of(choice, TWO)
    parsed = Tuning.model_validate({flag[2:]: value for flag, value in zip(tuning[::2], tuning[1::2], strict=True)})
    config = config_of(pages)
    assert same(choose(parsed, tmp_path, config=config, given={}).choice, choice, TWO)


# ---- what is kept


def trial_of(*levels: tuple[list[float | None], list[float | None]], choice=AS_VLLM, gaps=(20.0, 20.0)) -> Trial:
    """levels: (ms per token in each turn, the old choice's), with 1, 4, ... clients."""
    times = {
        clients: (Times(ours, 10.0, gaps[0]), Times(theirs, 10.0, gaps[1]))
        for clients, (ours, theirs) in zip((1, 4), levels, strict=False)
    }
    return Trial(choice, times)


STEADY = [10.0, 10.2, 9.9, 10.1, 10.0, 9.8, 10.1, 9.9]
NOISY = [7.0, 13.0, 10.0, 8.0, 12.5, 9.5, 11.0, 7.5]


def scaled(values: list[float], by: float) -> list[float | None]:
    return [value * by for value in values]


DECISIONS = {
    "faster with both": (trial_of((scaled(STEADY, 0.8), STEADY), (scaled(STEADY, 0.9), STEADY)), None),
    "faster with both, in a machine that is slower for a while": (
        trial_of((scaled(NOISY, 0.8), NOISY), (scaled(NOISY, 0.9), NOISY)),
        None,
    ),
    "faster, in too few turns": (trial_of((scaled(STEADY[:7], 0.5), STEADY[:7])), "too few turns to be certain"),
    "hardly faster": (trial_of((scaled(STEADY, 0.99), STEADY)), "not faster by more than noise"),
    "faster on average, by noise": (
        trial_of((STEADY, [13.0, 9.0, 12.0, 8.0, 13.0, 9.0, 12.0, 8.0])),
        "not faster by more than noise",
    ),
    "the same": (trial_of((STEADY, STEADY)), "not faster by more than noise"),
    "slower": (trial_of((scaled(STEADY, 1.2), STEADY)), "slower with 1 client"),
    "faster with one, slower with four": (
        trial_of((scaled(STEADY, 0.6), STEADY), (scaled(STEADY, 1.1), STEADY)),
        "slower with 4 clients",
    ),
    "faster with longer gaps": (
        trial_of((scaled(STEADY, 0.8), STEADY), gaps=(30.0, 20.0)),
        "longer gaps with 1 client",
    ),
    "a turn without tokens": (trial_of(([None, *scaled(STEADY, 0.8)], [10.0, *STEADY])), None),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_candidate_is_kept_only_if_it_is_faster_for_certain(name):
    trial, verdict = DECISIONS[name]
    assert trial.verdict() == verdict
    assert best_of([trial]) is (trial if verdict is None else None)


def test_the_fastest_of_those_that_may_be_kept_is():
    fast = trial_of((scaled(STEADY, 0.8), STEADY))
    faster = trial_of((scaled(STEADY, 0.7), STEADY))
    fastest = trial_of((scaled(STEADY, 0.5), STEADY))
    fastest.problem = "not batch-invariant"
    failed = Trial(AS_VLLM, problem="ended with exit code 1")
    assert best_of([fast, failed, fastest, faster]) is faster
    assert best_of([failed, fastest]) is None and best_of([]) is None
    assert failed.as_dict()["not_kept"] == "ended with exit code 1" and failed.as_dict()["ratio"] is None


def test_a_trial_without_any_tokens_is_said():
    with pytest.raises(ValueError, match="no answer had two tokens"):
        trial_of(([None, None], STEADY[:2])).ratio()


# ---- a run


@pytest.fixture(scope="module")
def base_url():
    with fake_server() as url:
        yield url


@pytest.fixture
def plan(tmp_path, monkeypatch, zentorch):
    monkeypatch.setattr(trials, "has_zentorch", lambda: False)
    monkeypatch.setattr(trials, "huge_pages_given", lambda: None)
    monkeypatch.setattr(trials, "TURN_S", 0.7)
    monkeypatch.setattr(trials, "SETTLE_S", 0.2)
    return TunePlan(
        served=ModelChoice(tmp_path / "a-model"),
        old=OLD,
        limits=ONE,
        prompts=[Prompt([{"role": "user", "content": "steady"}])] * 3,
        clients=[2],
        seconds=1.4,
        max_tokens=9,
        config=parse_config({}),
        logs=tmp_path,
        cache=tmp_path / "cache",
        start_timeout_s=2.0,
    )


def quiet() -> Progress:
    return Progress(Console(quiet=True))


def test_each_candidate_is_measured_beside_the_old_choice(base_url, plan, monkeypatch):
    started = []

    def system(name, choice, *options):
        started.append((name, choice.tuning))
        return System(name, base_url=base_url)

    monkeypatch.setattr(trials, "early_exits", system)
    coverage.keep(plan.cache, "a-model", "bfloat16", 1, "alike", True)
    announced = []
    trials_of_plan = measure(plan, quiet(), announced.append)
    assert [name for name, _ in started] == ["old", "candidate-1", "candidate-2"]
    assert "block" in started[0][1] and "engine" in started[2][1]
    assert announced == trials_of_plan and len(trials_of_plan) == 2
    for trial in trials_of_plan:
        (ours, theirs) = trial.times[2]
        assert len(ours.tpt_by_turn_ms) == len(theirs.tpt_by_turn_ms) == 2
        assert all(40 < tpt_ms < 100 for tpt_ms in ours.tpt_by_turn_ms) and 40 < ours.gap_p99_ms < 150  # 50 ms apart
        assert 0 < ours.tpt_ms < 100  # a fake server is not frozen, and answers in others' turns, too
        assert 0.5 < trial.ratio()[0] < 2.0 and trial.problem is None
        assert trial.ratio()[1] is None and trial.verdict() == "too few turns to be certain"
        written = json.loads(json.dumps(trial.as_dict()))
        assert written["levels"][0]["clients"] == 2 and written["ci95"] is None


def test_a_candidate_that_does_not_start_is_no_end(base_url, plan, monkeypatch):
    def system(name, choice, *options):
        return System(name, base_url="http://127.0.0.1:9" if name == "candidate-1" else base_url)

    monkeypatch.setattr(trials, "early_exits", system)
    first, second = measure(plan, quiet(), lambda trial: None)
    assert "candidate-1 does not answer" in first.problem and not first.times and first.verdict() is not None
    assert second.times and second.problem == "not known to be batch-invariant"


def test_ramps_that_do_not_fit_are_said_before_anything_starts(plan, monkeypatch):
    monkeypatch.setattr(trials, "early_exits", lambda name, *_: System(name, problem="they do not fit"))
    with pytest.raises(ValueError, match="they do not fit"):
        measure(plan, quiet(), lambda trial: None)


def test_texts_of_a_candidate_must_not_depend_on_the_load(plan, monkeypatch):
    assert variance(plan, AS_VLLM) == "not known to be batch-invariant"
    coverage.keep(plan.cache, "a-model", "bfloat16", 1, "alike", True)
    coverage.keep(plan.cache, "b-model", "bfloat16", 1, "differ", False)
    coverage.keep(plan.cache, "a-model", "bfloat16", 2, "differ", False)
    coverage.keep(plan.cache, "a-model", "bfloat16", 1, "differ", False, kernels="zentorch")
    assert variance(plan, Choice(threads=1)) is None
    two = replace(plan, limits=TWO)
    assert variance(two, Choice(threads="all")) == variance(two, AS_VLLM) == "not batch-invariant"
    assert variance(plan, Choice(threads=1, kernels="zentorch")) == "not batch-invariant"
    monkeypatch.setattr(trials, "has_zentorch", lambda: True)  # then vLLM takes it by itself
    assert variance(plan, Choice(threads=1)) == "not batch-invariant"


@pytest.fixture
def measured(tmp_path, monkeypatch, zentorch):
    """measured(trials) -> in place of a measurement; the model, the cache and the user's variables are the test's."""
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 64, "num_hidden_layers": 4, "architectures": ["LlamaForCausalLM"]}'
    )
    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(OWN_PROCESS)
    monkeypatch.setattr(chosen, "cpu_limits", lambda: TWO)

    def results(*outcomes: Trial) -> Path:
        monkeypatch.setattr(trials, "measure", lambda plan, progress, on_trial: list(outcomes))
        return tmp_path

    return results


def tune(model: Path, *flags: str) -> int:
    return main(["tune", str(model), "--logs", str(model / "logs"), *flags])


def test_the_best_is_kept_and_then_in_force(measured, capsys):
    best = Choice(threads="all", worker="engine", huge_pages=True)
    model = measured(
        trial_of((scaled(STEADY, 0.9), STEADY), choice=AS_VLLM),
        trial_of((scaled(STEADY, 0.6), STEADY), choice=best),
    )
    without = parse_config({"policy": "off"})  # as measured, without ramps for the model
    assert choose(Tuning(), model, config=without).choice == DEFAULT
    assert tune(model, "--json", str(model / "out.json")) == 0
    output = capsys.readouterr()
    assert (
        "2 threads, in engine, huge pages, stock kernels" in output.out
        and "0.600 (" in output.out
        and "kept" in output.out
    )
    assert "kept: 2 threads, in engine, huge pages, stock kernels" in output.err
    written = json.loads((model / "out.json").read_text())
    assert written["choice"]["worker"] == "engine" and len(written["table"]) == 2 and written["machine"]["cpu"]
    assert choose(Tuning(), model, config=without).choice == best
    assert choose(Tuning(), model).choice == DEFAULT, "with exits nothing was measured"
    assert choose(Tuning(), model, ["--dtype", "float32"], without).choice == DEFAULT


def test_what_cannot_be_kept_is_shown_and_written_all_the_same(measured, capsys):
    """It has taken 20 minutes."""
    model = measured(trial_of((scaled(STEADY, 0.6), STEADY)))
    (model / "cache").mkdir()
    (model / "cache" / "host").write_text("no folder")
    assert tune(model, "--json", str(model / "out.json")) == 2
    output = capsys.readouterr()
    assert "0.600 (" in output.out and str(model / "cache" / "host") in output.err and "kept:" not in output.err
    assert len(json.loads((model / "out.json").read_text())["table"]) == 1


def test_where_nothing_is_faster_the_old_choice_stays(measured, capsys):
    model = measured(trial_of((scaled(STEADY, 0.99), STEADY)), Trial(AS_VLLM, problem="ended with exit code 1"))
    assert tune(model) == 0
    assert "(as before)" in capsys.readouterr().err
    chosen = choose(Tuning(), model, config=parse_config({"policy": "off"}))
    assert chosen.choice == DEFAULT and "kept" in chosen.origin


def test_variables_are_printed_as_a_shell_takes_them(measured, capsys):
    model = measured(trial_of((scaled(STEADY, 0.6), STEADY), choice=Choice(threads="all", worker="engine")))
    assert tune(model) == 0
    capsys.readouterr()
    assert tune(model, "--print-env") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {f"export {BIND}=0,1", f"export {WORKER}=engine", f"export {OWN_PROCESS}=0"} <= set(lines)
    assert all(line.startswith("export ") for line in lines)


@pytest.mark.parametrize(
    ("flags", "variables", "says"),
    [
        (["--seconds", "0"], {}, "must be a number above 0, got '0'"),
        (["--clients", "0"], {}, "must be a whole number of at least 1, got '0'"),
        (["--max-tokens", "1"], {}, "--max-tokens: at least 2"),
        (["--prompts", "/nowhere.jsonl"], {}, "cannot read prompts /nowhere.jsonl"),
        (["--json", "/nowhere/out.json"], {}, "--json: folder not found: /nowhere"),
        (["--vllm-flag", "--tensor-parallel-size 2"], {}, "--vllm-flag: vLLM binds the threads of several workers"),
        (["--vllm-flag", "--port 1"], {}, "--vllm-flag: --port is set by the evaluation itself"),
        ([], {QUEUES: "spin", BIND: "0"}, f"{BIND}, {QUEUES}: set by hand, and would stay so in all servers"),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_is_one_line(flags, variables, says, measured, monkeypatch, capsys):
    model = measured()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        code = tune(model, *flags)
    except SystemExit as end:  # of the parser
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and says in err and err.strip().count("\n") == 0


def test_serve_measures_again_if_asked_to(tmp_path, monkeypatch, capsys):
    import subprocess
    import sys

    from apparate_llm import serve

    asked = []

    class Done:
        returncode = 0

    monkeypatch.setattr(subprocess, "run", lambda line, **_: asked.append(line) or Done)
    monkeypatch.setattr(serve, "choose", lambda *_, **__: choose(Tuning(tuning="off"), tmp_path, given={}))
    again = Tuning(tuning="again")
    config = parse_config({"policy": "off"})
    where = ["--uds", "/run/a.sock", "--ssl-keyfile=key", "--ssl-certfile", "certificate", "--revision", "main"]
    serve.use_machine(again, tmp_path, [*where, "--dtype", "float32"], config, {})
    (line,) = asked
    assert line[:5] == [sys.executable, "-m", "apparate_llm.cli", "tune", str(tmp_path)]
    assert line[5:9] == ["--policy", "off", "--batch-invariant", "True"]
    assert line[9:] == ["--vllm-flag=--dtype", "--vllm-flag=float32"]
    Done.returncode = 1
    with pytest.raises(RuntimeError, match=r"`apparate-llm tune` ended with exit code 1"):
        serve.use_machine(again, tmp_path, [], config, {})


def test_a_servers_start_sets_variables_and_says_what_is_in_force(tmp_path, monkeypatch, zentorch):
    import os

    from apparate_llm import serve
    from apparate_llm.config import ADDITIONAL_CONFIG_KEY

    monkeypatch.setattr(chosen, "cpu_limits", lambda: TWO)
    monkeypatch.setattr(os, "environ", {"APPARATE_CACHE": str(tmp_path)})
    wanted = {"speculative_config": {}, "additional_config": {ADDITIONAL_CONFIG_KEY: {}}}
    config = parse_config({"huge_pages": False})
    (line,) = serve.use_machine(Tuning(tuning="off", worker="engine"), tmp_path, [], config, wanted)
    assert BIND not in os.environ and (os.environ[WORKER], os.environ[OWN_PROCESS]) == ("engine", "0")
    assert wanted["additional_config"][ADDITIONAL_CONFIG_KEY] == {"huge_pages": False}
    assert line.startswith("Tuned: threads as vLLM gives them, stock kernels, small pages")


def test_the_command_says_what_it_costs(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    output = capsys.readouterr().out
    assert "about 20 minutes" in output and all(len(line) <= 120 for line in output.splitlines())
    assert command.COSTS.splitlines()[0] in output
