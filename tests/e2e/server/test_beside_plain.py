"""A server with exits beside plain vLLM: what both answer, and an evaluation of both."""

import asyncio
import json
import re
import subprocess
import sys

import httpx
import pytest

from apparate_llm.eval.client import PlannedRequest, run_block
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import System, prefix_cache_of


def test_policy_off_serves_plain_vllm_and_says_so(plain_server, tiny_llama):
    reply = httpx.get(f"{plain_server}/early_exit/status")
    assert reply.status_code == 503 and "policy off" in reply.text
    body = {"model": str(tiny_llama), "prompt": "w1 w2", "max_tokens": 5, "min_p": 0.5}
    assert httpx.post(f"{plain_server}/v1/completions", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        {"min_p": 0.3, "temperature": 1.1, "seed": 3},
        {"logit_bias": {"9": 100, "40": -100}, "temperature": 0},
        {"temperature": 1.0, "seed": 4, "n": 3},
        {"logprob_token_ids": [5, 6], "logprobs": 1, "temperature": 0},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_other_speculation_refuses_or_changes_is_answered_as_by_plain_vllm(
    given, server, plain_server, tiny_llama
):
    asked = {"prompt": "w1 w2 w9", "max_tokens": 20, "ignore_eos": True, **given}
    choices = []
    for base_url, model in ((server, "tiny"), (plain_server, str(tiny_llama))):
        reply = httpx.post(f"{base_url}/v1/completions", json={"model": model, **asked}, timeout=60)
        assert reply.status_code == 200, reply.text
        choices.append(reply.json()["choices"])
    for ours, plain in zip(*choices, strict=True):
        assert ours["text"] == plain["text"] and ours["finish_reason"] == plain["finish_reason"]


@pytest.mark.parametrize(("cache", "found_again"), [("salted", False), ("warm", True)])
def test_a_salt_for_each_request_keeps_the_prefix_cache_cold(server, tmp_path, cache, found_again):
    def hits() -> float:
        lines = httpx.get(f"{server}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

    assert prefix_cache_of(server) == "salted"
    system = System("tiny", base_url=server, prefix_cache=cache)
    fields_of = Server(system, log=tmp_path / "log", start_timeout_s=5.0).fields
    words = " ".join(f"w{i % 20}" for i in range(180))  # more than a block of the cache
    before, asks = hits(), [PlannedRequest(0, 4)] * 2
    call = run_block(server, "tiny", [[{"role": "user", "content": words}]], asks, concurrency=1, fields_of=fields_of)
    assert [done.error for done in asyncio.run(call).completions] == [None, None]
    assert (hits() > before) == found_again


def test_the_full_evaluation_of_running_servers_reports_every_system_and_says_what_it_left_out(
    server, plain_server, tiny_llama, tmp_path
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 3} w7"}) + "\n" for i in range(4)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "apparate_llm.cli", "eval", "tpt", str(tiny_llama), "--out", str(out)]
    command += ["--systems", "suffix", "--base-url", f"vllm={plain_server}", "--base-url", f"exits={server}"]
    command += ["--prompts", str(prompts), "--concurrency", "1,2", "--max-tokens", "24", "--slo", "tpt=10000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    runs = {(run["system"], run["concurrency"]): run for run in results["runs"]}
    assert set(runs) == {("vllm", 1), ("vllm", 2), ("exits", 1), ("exits", 2)}
    assert set(results["skipped"]) == {"suffix"} and "not installed" in results["skipped"]["suffix"]
    for run in runs.values():
        assert run["failed"] == 0 and run["requests"] == 4 and run["output_tokens"] > 4
        assert run["goodput_frac"] == 1.0
    ours = runs["exits", 1]
    assert ours["exits"]["released"] > 0 and sum(ours["exits"]["by_depth"].values()) > 0
    assert sum(ours["exits"]["by_depth"].values()) == ours["exits"]["accepted"] + ours["exits"]["released"]
    assert ours["quality"]["identical_frac"] is not None and ours["timeline"][-1]["output_tokens"] > 4
    page = (out / "report.html").read_text()
    assert "exits" in page and "suffix" in page and "http://" not in re.sub(r"http://(www.w3.org|127)", "", page)
    again = subprocess.run([*command[:3], "eval", "report", str(out)], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and (out / "report.html").read_text() == page
    both = subprocess.run(
        [*command[:3], "eval", "compare", str(out), str(out)], capture_output=True, text=True, timeout=60
    )
    assert both.returncode == 0 and "exits" in both.stdout
