"""Systems of an evaluation: by name, as baselines, with their variables, flags and keys."""

import json
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from apparate_llm.cli import build_parser, spelt_out
from apparate_llm.eval import plan as plans
from apparate_llm.eval import systems as systems_module
from apparate_llm.eval.evaluate import evaluate
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import ModelChoice, System, baselines_of, check_names, plain_vllm, systems_of
from apparate_llm.host.choice import BIND
from apparate_llm.host.limits import CpuLimits
from apparate_llm.progress import Progress
from apparate_llm.redact import redacted
from tests.evaluations import evaluation_of, prompts
from tests.fake_server import fake_server

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("names", [("Q4 n-gram", "Q4-n-gram"), ("q4(1)", "q4:1:")], ids=str)
def test_systems_that_would_have_the_same_files_are_refused(names):
    """Of the second one nothing would be measured: its blocks would be there already."""
    systems = [System(name, command=("x",)) for name in names]
    with pytest.raises(ValueError, match=r"systems '.*' and '.*' would have the same files: choose another name"):
        check_names(systems)
    check_names([systems[0], System("vllm"), System("vllm-tuned")])


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
