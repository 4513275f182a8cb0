"""llama.cpp's server as a system: what it is started with, asked for, and measured like the others."""

import argparse
import os
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from apparate_llm.cli import build_parser
from apparate_llm.eval import llama_cpp
from apparate_llm.eval.client import PlannedRequest
from apparate_llm.eval.closed_loop import engine_steps
from apparate_llm.eval.evaluate import Evaluation, evaluate
from apparate_llm.eval.llama_cpp import (
    OPEN_LOOP_SLOTS,
    Demand,
    demand_of,
    find_server,
    llama_cpp_systems,
    longest_prompt,
    request_fields,
    version_of,
)
from apparate_llm.eval.plan import steady_plan, tpt_plan
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.servers import Server
from apparate_llm.eval.steady import measure_level
from apparate_llm.eval.store import Store
from apparate_llm.eval.summary import Summary, cells_of, prompt_notes, ratios_of, runs_of
from apparate_llm.eval.systems import System
from apparate_llm.eval.workloads import closed
from apparate_llm.host.limits import CpuLimits, cpu_limits
from apparate_llm.launch import clean_environment
from apparate_llm.progress import SECONDS, Progress
from tests.fake_server import fake_server
from tests.unit.test_steady import plan_of

DEMAND = Demand(num_slots=4, slot_tokens=300)
THREADS = str(cpu_limits().logical_threads)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return script(tmp_path_factory.mktemp("bin") / "llama-server", f'exec {sys.executable} -m tests.fake_llama "$@"')


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("models") / "a model.gguf"
    file.write_bytes(b"GGUF and more")
    return file


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def settings_of(command: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(command[3::2], command[4::2], strict=True))  # behind the program, -m and the file


def test_what_the_flags_leave_open_is_set(gguf):
    (system,) = llama_cpp_systems([f"llama={str(gguf)!r}"], Path("/bin/llama-server"), DEMAND)
    assert (system.name, system.is_foreign) == ("llama", True)
    assert system.command[:3] == ("/bin/llama-server", "-m", str(gguf))
    assert settings_of(system.command) == {
        "--threads": THREADS,
        "--parallel": "4",
        "--ctx-size": str(4 * 512),  # it is divided by the slots
        "--cache-ram": "0",
    }
    assert "--ctx-size 2048" in system.started_by


def test_it_has_no_more_threads_than_there_is_time_for(gguf, monkeypatch):
    """As ours: with more of them than a control group gives time for all wait for each other."""
    monkeypatch.setattr(llama_cpp, "cpu_limits", lambda: CpuLimits(num_cpus=64, cores=tuple(range(64)), quota=2.5))
    (system,) = llama_cpp_systems([f"llama='{gguf}'"], Path("x"), DEMAND)
    assert settings_of(system.command)["--threads"] == "2"


def test_what_the_flags_say_stays(gguf):
    text = f"""Q4, n-gram="{gguf}" -t 1 -np 8 --cache_ram 9 --alias 'a, "b" c' --spec-type ngram-simple,ngram-mod"""
    (system,) = llama_cpp_systems([text], Path("x"), DEMAND)
    assert system.name == "Q4, n-gram"
    assert settings_of(system.command) == {
        "-t": "1",
        "-np": "8",
        "--cache_ram": "9",
        "--alias": 'a, "b" c',
        "--spec-type": "ngram-simple,ngram-mod",
        "--ctx-size": str(8 * 512),
    }
    (system,) = llama_cpp_systems([f"x='{gguf}' --parallel -1 -c 999"], Path("x"), DEMAND)  # as many as it likes
    assert settings_of(system.command) == {"--parallel": "-1", "-c": "999", "--threads": THREADS, "--cache-ram": "0"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model.gguf", "\"NAME=FILE.gguf FLAGS\" wanted, got 'model.gguf'"),
        ("llama=", '"NAME=FILE.gguf FLAGS" wanted'),
        ("=model.gguf", '"NAME=FILE.gguf FLAGS" wanted'),
        ("/models/m.gguf --alias=x", "the name without a slash"),
        ("llama=m.gguf 'x", "No closing quotation"),
        ("llama=/nowhere/m.gguf", "--llama-cpp llama: cannot read /nowhere/m.gguf: No such file"),
        (f"llama={__file__}", "is not a GGUF file"),
        ("llama=m.gguf --port 80", "--llama-cpp llama: --port is set by the evaluation itself"),
        ("llama=m.gguf --api_key secret", "--llama-cpp llama: --api-key is set by the evaluation itself"),
    ],
)
def test_what_cannot_be_served_is_refused(text, says):
    with pytest.raises(ValueError, match=says) as error:
        llama_cpp_systems([text], Path("x"), DEMAND)
    assert "secret" not in str(error.value)


def test_its_program_is_found_on_the_path_or_where_it_is_said_to_be(program, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(program.parent))
    assert find_server(None) == program
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no llama-server on PATH: give --llama-server PATH"):
        find_server(None)
    assert find_server(program) == program
    for given in (tmp_path / "none", tmp_path, Path(__file__)):
        with pytest.raises(ValueError, match="--llama-server: not a program that can be run"):
            find_server(given)


@pytest.mark.parametrize("given", ["llama-server", "./llama-server"])
def test_a_program_in_this_folder_is_that_one(given, tmp_path, monkeypatch):
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
        script(tmp_path / name / "llama-server", f"echo version: {name}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'elsewhere'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path / "here")
    assert version_of(find_server(Path(given))) == "version: here"


def test_its_version_is_what_it_says(program, tmp_path):
    assert version_of(program) == "version: 11434 (fake)"
    broken = script(tmp_path / "broken", "echo a library is missing >&2; exit 127")
    with pytest.raises(ValueError, match="ended with 127 and said: a library is missing"):
        version_of(broken)
    broken.write_text("no program")
    with pytest.raises(ValueError, match=r"--llama-server: .*Exec format error"):
        version_of(broken)


def test_a_slot_has_room_for_the_longest_request(tiny_llama, tmp_path):
    asked = [Prompt([{"role": "user", "content": text}]) for text in ("w1", "w1 w2 w3 w4 w5")]
    added = 16 + 256
    assert longest_prompt(tiny_llama, asked) == 5 + added
    assert longest_prompt(tmp_path, asked) == len("w1 w2 w3 w4 w5") + added  # no tokenizer: as many as bytes
    assert demand_of(tiny_llama, asked, [1, 4, 2], 96) == Demand(4, 5 + added + 96)
    assert demand_of(tiny_llama, asked, [None], 96).num_slots == OPEN_LOOP_SLOTS


def test_tokens_are_drawn_among_all_where_they_are_drawn():
    greedy, drawn = request_fields(0.0), request_fields(0.7)
    assert greedy == {"cache_prompt": False, "timings_per_token": True}
    assert drawn == {**greedy, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_an_evaluation_that_draws_asks_it_to_draw_among_all(flags, gguf):
    plan = tpt_plan(flags("tpt", "--llama-cpp", f"a='{gguf}'", "--temperature", "0.7"))
    server = Server(plan.systems[-1], log=Path("unused"), start_timeout_s=1.0)
    asked = server.fields(PlannedRequest(0, 9), plan.sampling)
    assert asked == {"temperature": 0.7, **request_fields(0.7)}  # no salt: it keeps no prompts


@pytest.fixture
def running(program, gguf, tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "KMP_BLOCKTIME", "LLAMA_ARG_THREADS", "VLLM_PLUGINS"):
        monkeypatch.setenv(name, "1")
    (system,) = llama_cpp_systems([f"llama='{gguf}' --alias x"], program, DEMAND)
    with Server(system, log=tmp_path / "log", start_timeout_s=60.0) as server:
        server.wait_ready()  # through the 503 of a model that is being loaded
        yield server


def test_it_starts_in_a_clean_environment_and_is_asked_as_the_others(running, tmp_path):
    asked = [Prompt([{"role": "user", "content": "steady"}])]
    evaluation = Evaluation(
        Path("fake"), [running.system], asked, [closed(1, 1, max_tokens=9, length="free")], 1, Store(tmp_path), 60.0
    )
    from apparate_llm.eval import evaluate as module

    module._ask(running, evaluation, list(evaluation.loads[0].blocks[0]), 1)
    seen = httpx.get(f"{running.base_url}/seen").json()
    of_shell_and_python = {"PWD", "SHLVL", "_", "OLDPWD", "LC_CTYPE"}
    assert set(seen["environment"]) - of_shell_and_python <= set(clean_environment())
    assert seen["environment"]["PATH"] == os.environ["PATH"]
    assert seen["argv"][-4:-1] == ["--host", "127.0.0.1", "--port"]
    (body,) = seen["bodies"]
    assert (body["cache_prompt"], body["timings_per_token"], body["temperature"]) == (False, True, 0.0)


def test_it_counts_no_steps_and_is_killed_with_us(running):
    assert engine_steps(running) is None  # its /metrics says 501
    pid = running.process.pid
    running.pause()
    assert state_of(pid) == "T"
    running.__exit__()
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def state_of(pid: int) -> str:
    """One letter; T: stopped."""
    until = time.monotonic() + 5
    while (state := Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return state


def test_it_is_measured_beside_others(program, gguf, tmp_path):
    asked = [Prompt([{"role": "user", "content": kind}]) for kind in ("steady", "drafted, counted at once")]
    loads = [closed(2, 1, max_tokens=9, length="free")]
    store = Store(tmp_path / "out")
    store.open({}, fresh=False)
    with fake_server() as url:
        systems = [System("vllm", base_url=url), *llama_cpp_systems([f"llama='{gguf}'"], program, DEMAND)]
        evaluation = Evaluation(Path("fake"), systems, asked, loads, repeat=1, store=store, start_timeout_s=60.0)
        evaluate(evaluation, Progress(Console(quiet=True)))
    assert not evaluation.dead
    cells = cells_of(list(store.blocks()), systems, loads)
    runs = runs_of(cells, Summary(Path("fake"), 4, asked, (), {}))
    (llama,) = [run for run in runs if run.system == "llama"]
    assert (llama.requests, llama.failed, llama.output_tokens) == (2, 0, 6 + 7)
    assert llama.shared_chunk_frac == pytest.approx(4 / 13)  # 13 tokens in 9 chunks
    assert llama.peak_memory_gib > 0 and llama.blocks_per_token is None
    (ratio,) = ratios_of(cells, runs)
    assert (ratio.system, ratio.baseline) == ("llama", "vllm") and ratio.tpt_mean < 1.5


def test_clients_that_never_stop_see_its_tokens(running, tmp_path):
    with fake_server() as url:
        systems = [System("vllm", base_url=url), running.system]
        plan = replace(plan_of(tmp_path, systems), baselines=("llama", "vllm"))
        servers = [Server(systems[0], log=tmp_path / "log", start_timeout_s=5.0), running]
        with Progress(Console(quiet=True)).stage("measure", total=plan.level_s, unit=SECONDS) as stage:
            level = measure_level(plan, servers, 2, stage)
    ours = level.runs[1]
    assert ours.failed == 0 and ours.output_tokens_per_s > 0 and ours.step_ms is None
    assert [(ratio.system, ratio.baseline) for ratio in level.ratios] == [("vllm", "llama"), ("llama", "vllm")]
    assert level.ratios[0].tpt == pytest.approx(1 / level.ratios[1].tpt)


def test_prompts_that_another_template_makes_are_told_of():
    from apparate_llm.eval.client import Completion
    from apparate_llm.eval.store import Block, BlockKey

    load = closed(2, 1, max_tokens=9, length="free")
    systems = [System("vllm"), System("same"), System("other"), System("silent")]
    tokens = {"vllm": (10, 20), "same": (10, 20), "other": (13, 24), "silent": (None, None)}
    blocks = [
        Block(
            BlockKey(0, 0, 0, name),
            [Completion(index, 0.0, prompt_tokens=number) for index, number in enumerate(numbers)],
            1.0, None, None, None, None, 5.0, 0.0,
        )
        for name, numbers in tokens.items()
    ]  # fmt: skip
    (note,) = prompt_notes(cells_of(blocks, systems, [load]), "vllm")
    assert note.startswith("other reads other prompts than vllm, by +3.5 tokens on average")


@pytest.fixture
def flags(tiny_llama, program, tmp_path):
    def parsed(kind: str, *more: str) -> argparse.Namespace:
        argv = ["eval", kind, str(tiny_llama), "--out", str(tmp_path / "out"), "--systems", "vllm,vllm-tuned"]
        return build_parser().parse_args([*argv, "--llama-server", str(program), *more])

    return parsed


def test_an_evaluation_has_them_beside_its_other_systems(flags, gguf, monkeypatch):
    monkeypatch.setattr("apparate_llm.engine.vllm_settings.available_memory_bytes", lambda: 4 << 30)
    plain = tpt_plan(flags("tpt", "--llama-cpp", f"a='{gguf}'"))
    given = ["--llama-cpp", f"a='{gguf}'", "--llama-cpp", f"b='{gguf}' -t 1", "--baseline", "vllm-tuned"]
    plan = tpt_plan(flags("tpt", *given, "--baseline", "a", "--concurrency", "1,4"))
    assert [system.name for system in plan.systems] == ["vllm-tuned", "vllm", "a", "b"]
    assert plan.baselines == ("vllm-tuned", "a", "vllm") and plain.baselines == ("vllm",)
    assert settings_of(plan.systems[2].command)["--parallel"] == "4"
    assert plan.settings["llama_cpp"] == [given[1], given[3]]
    assert plan.settings["llama_server"] == "version: 11434 (fake)"
    assert plan.settings["request_fields"]["b"] == {"cache_prompt": False, "timings_per_token": True}
    sizes = [
        int(p.systems[0].command[p.systems[0].command.index("--kv-cache-memory-bytes") + 1]) for p in (plain, plan)
    ]
    assert sizes == [(4 << 30) // (4 * 4), (4 << 30) // (4 * 5)]  # one more server has its share
    steady = steady_plan(flags("steady", *given, "--clients", "1,16"))
    assert [system.name for system in steady.systems] == ["vllm", "vllm-tuned", "a", "b"]
    assert steady.baselines == ("vllm-tuned", "vllm")
    assert settings_of(steady.systems[2].command)["--parallel"] == "16"
    assert steady.settings["llama_server"] == "version: 11434 (fake)"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "--llama-server is for --llama-cpp, and none is given"),
        (["--llama-cpp", "vllm='GGUF'"], "two systems are called vllm"),
        (["--llama-cpp", "a='GGUF'", "--baseline", "b"], "--baseline: b is not measured; there are vllm, .*, a"),
    ],
)
@pytest.mark.parametrize(("kind", "plan"), [("tpt", tpt_plan), ("steady", steady_plan)])
def test_flags_that_do_not_fit_are_refused(flags, gguf, kind, plan, more, says):
    with pytest.raises(ValueError, match=says):
        plan(flags(kind, *(text.replace("GGUF", str(gguf)) for text in more)))
