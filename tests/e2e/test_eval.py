"""`apparate-llm eval` from start to finish, on a tiny model."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.conftest import TINY_FLAGS
from tests.environment import clean_environment


def test_it_compares_the_two_systems_and_keeps_the_shape(tiny_llama, lens_ramps, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 3} w7"}) + "\n" for i in range(6)))
    command = [sys.executable, "-m", "apparate_llm.cli", "eval", "quick", str(tiny_llama)]
    command += ["--ramps", str(lens_ramps(depth=4)), "--prompts", str(prompts), "--concurrency", "1,3"]
    command += [
        "--policy",
        "static",
        "--accuracy-bound",
        "0",
        "--max-batch-tokens",
        "64",
    ]  # exits whatever they cost here
    command += ["--max-tokens", "48", "--json", str(tmp_path / "out.json"), "--logs", str(tmp_path / "logs")]
    command += [f"--vllm-flag={flag}" for flag in TINY_FLAGS]
    env = clean_environment()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["schema_version"] == 1 and results["command"].startswith("apparate-llm eval quick")
    runs = {(run["system"], run["concurrency"]): run for run in results["runs"]}
    assert set(runs) == {(name, c) for name in ("vllm", "static lossless") for c in (1, 3)}
    for (name, _), run in runs.items():
        assert run["requests"] == 12 and run["failed"] == 0
        assert run["cpu_s_per_token"] > 0 and run["peak_memory_gib"] > 0.1
        assert run["tpt_ms"]["p50"] <= run["tpt_ms"]["p95"] <= run["tpt_ms"]["p99"]
        assert (run["exits"] is None) == (name == "vllm")
    for concurrency in (1, 3):
        ours = runs["static lossless", concurrency]
        assert ours["identical_frac"] == 1.0
        assert ours["exits"]["released"] == 0 and ours["divergences"] == 0
        assert (
            0 < ours["exits"]["accepted"] <= ours["exits"]["held"] <= (ours["served_tokens"] or ours["output_tokens"])
        )
        assert ours["output_tokens"] == runs["vllm", concurrency]["output_tokens"]
    assert [(item["system"], item["baseline"]) for item in results["ratios"]] == [("static lossless", "vllm")] * 2
    assert all(len(item["tpt_mean_by_repeat"]) == 2 for item in results["ratios"])
    assert "lossless" in done.stdout
    assert not processes_of(tiny_llama)


@pytest.mark.long
def test_stopping_it_stops_its_servers(tiny_llama, lens_ramps):
    command = [sys.executable, "-m", "apparate_llm.cli", "eval", "quick", str(tiny_llama)]
    command += ["--ramps", str(lens_ramps(depth=4)), *(f"--vllm-flag={flag}" for flag in TINY_FLAGS)]
    env = clean_environment()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    deadline = time.monotonic() + 240  # the second starts when the first is ready
    while len(processes_of(tiny_llama)) < 3:  # itself and the two servers, one of them stopped with SIGSTOP
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 143
    assert not processes_of(tiny_llama)


def processes_of(model) -> list[str]:
    return subprocess.run(["pgrep", "-f", str(model)], capture_output=True, text=True).stdout.split()
