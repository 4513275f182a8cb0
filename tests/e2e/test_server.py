"""A real server on a tiny model, over HTTP, as its users meet it."""

import asyncio
import hashlib
import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest

from apparate_llm.api.access import BODY_TIMEOUT_S
from apparate_llm.config import parse_config
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.eval.client import PlannedRequest, run_block
from apparate_llm.eval.servers import Server, free_port
from apparate_llm.eval.systems import System, prefix_cache_of
from apparate_llm.sse import event_data
from tests.e2e.conftest import TINY_FLAGS, running


@pytest.fixture(scope="module")
def server(serve, tiny_llama, lens_ramps, tmp_path_factory):
    """Started with settings in every way that vLLM takes them."""
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text("served-model-name: tiny\naccuracy_bound: 0.5\nadditional-config: {theirs: {x: 1}}\n")
    flags = ["--config", str(file), "--ramps", str(lens_ramps(depth=3)), "--policy=static"]
    flags += ["--enable-scale-out"]  # the route that takes tokens
    flags += ["--additional-config.early_exit.threshold", "0.05", "--additional_config.theirs.y=2"]
    with serve(str(tiny_llama), *flags, *TINY_FLAGS) as base_url:
        yield base_url


def test_settings_of_file_flags_and_keys_are_all_in_force(server):
    config = httpx.get(f"{server}/early_exit/config").json()["config"]
    assert (config["policy"], config["accuracy_bound"], config["threshold"]) == ("static", 0.5, 0.05)
    assert httpx.get(f"{server}/v1/models").json()["data"][0]["id"] == "tiny"


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none")


def test_health_models_and_metrics_answer(server, client):
    assert httpx.get(f"{server}/health").status_code == 200
    assert [model.id for model in client.models.list()] == ["tiny"]
    metrics = httpx.get(f"{server}/metrics").text
    assert "vllm:generation_tokens_total" in metrics
    assert "apparate:active 1.0" in metrics and "apparate:fallbacks_total 0.0" in metrics


def test_a_chat_completion_streams_with_its_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "w3 w5 w9"}],
            temperature=0,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    whole = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "w3 w5 w9"}],
        temperature=0,
        max_tokens=30,
        extra_body={"ignore_eos": True},
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens == 5
    assert text and len(whole.choices[0].message.content) > 0
    assert {c.finish_reason for chunk in chunks for c in chunk.choices} == {None, "length"}


def test_a_text_completion_streams_with_its_usage(client):
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="w3 w5 w9",
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[-1].usage.completion_tokens == 12
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices)


def test_released_tokens_reach_the_client_and_are_counted(server, client):
    before = httpx.get(f"{server}/early_exit/status").json()["counts"]
    answer = client.completions.create(
        model="tiny", prompt="w8 w8 w1", temperature=0, max_tokens=100, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 100
    status = httpx.get(f"{server}/early_exit/status").json()
    after = status["counts"]
    assert status["active"] is True and status["depth"] == 3 and status["config"]["accuracy_bound"] == 0.5
    assert after["emitted"] - before["emitted"] == 100
    assert after["released"] > before["released"]
    assert after["outstanding"] == 0
    assert after["divergences"] <= 0.5 * after["emitted"]


def test_a_prompt_longer_than_the_context_is_a_400_and_costs_nobody_else(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="w1 " * 300, max_tokens=5)
    assert "256" in str(error.value)
    assert client.completions.create(model="tiny", prompt="w1", max_tokens=5).usage.completion_tokens > 0


def test_an_aborted_stream_leaves_the_server_well(server, client):
    stream = client.completions.create(
        model="tiny", prompt="w8 w2", temperature=0, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="tiny", prompt="w1", max_tokens=5).usage.completion_tokens > 0
    for _ in range(50):
        counts = httpx.get(f"{server}/early_exit/status").json()["counts"]
        if counts["outstanding"] == 0:
            break
    assert counts["outstanding"] == 0 and counts["fallbacks"] == 0


KEYS = {"mine": "sk-mine", "theirs": "sk-theirs"}
DIGESTS = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
BOSS = hashlib.sha256(b"sk-boss").hexdigest()


def documented_command(model: Path, ramps: Path, port: int) -> list[str]:
    tenants = {
        "mine": {"api_keys_sha256": [DIGESTS["mine"]]},
        "theirs": {"early_exit": 0, "api_keys_sha256": [DIGESTS["theirs"]]},
    }
    options = {"ramps": str(ramps), "policy": "static", "tenants": tenants}
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model)]
    for name, value in vllm_args(parse_config(options), "LlamaForCausalLM").items():
        command += ["--" + name.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else value]
    return [*command, *TINY_FLAGS, "--host", "127.0.0.1", "--port", str(port), "--api-key", *KEYS.values()]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ask_for_40(base_url: str, model: Path, key: str, **xargs) -> httpx.Response:
    body = {"model": str(model), "prompt": "w1 w2", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    asked = body | {"vllm_xargs": xargs}
    return httpx.post(f"{base_url}/v1/completions", json=asked, headers=bearer(key), timeout=60)


def status_for(base_url: str, key: str) -> httpx.Response:
    return httpx.get(f"{base_url}/early_exit/status", headers=bearer(key))


def change_with(base_url: str, key: str) -> int:
    """The status code."""
    headers = bearer(key) | {"X-Forwarded-For": "127.0.0.1"}
    return httpx.patch(f"{base_url}/early_exit/config", json={"accuracy_bound": 0.02}, headers=headers).status_code


def test_plain_vllm_with_the_documented_flags_serves_exits_too(tiny_llama, lens_ramps, tmp_path):
    """No hidden dependence on our command: vLLM's own server module and flags only; here with API keys, each of
    its own tenant."""
    port = free_port()
    command = documented_command(tiny_llama, lens_ramps(depth=4), port)
    environment = {"VLLM_PLUGINS": "apparate", "APPARATE_ADMIN_KEY": "sk-boss", "VLLM_LOGGING_LEVEL": "INFO"}
    with running(command, port, tmp_path / "log", **environment) as base_url:
        ask, status = partial(ask_for_40, base_url, tiny_llama), partial(status_for, base_url)
        assert ask("sk-mine").json()["usage"]["completion_tokens"] == 40
        accepted = status("sk-boss").json()["counts"]["accepted"]
        assert accepted > 20
        assert ask("sk-theirs").json()["usage"]["completion_tokens"] == 40
        counted = status("sk-boss").json()
        assert counted["counts"]["accepted"] == accepted
        assert counted["tenants"]["mine"]["emitted"] == counted["tenants"]["theirs"]["emitted"] == 40
        assert not any(key in json.dumps(counted) for key in (*KEYS.values(), DIGESTS["mine"]))
        seen = status("sk-theirs").json()
        assert list(seen["tenants"]) == ["theirs"] and seen["counts"]["emitted"] == 40
        assert "mine" not in json.dumps(seen)
        refused = ask("sk-theirs", early_exit_tenant="mine")
        assert refused.status_code == 400 and "requests with this API key are theirs" in refused.text
        assert ask("sk-none").status_code == status("sk-none").status_code == 401
        assert httpx.get(f"{base_url}/early_exit/events").status_code == 401
        assert httpx.patch(f"{base_url}/early_exit/config", content=b"{").status_code == 401
        assert httpx.get(f"{base_url}/early_exit/").status_code == 200  # it asks for the key itself
        changed = [change_with(base_url, key) for key in ("sk-mine", "sk-none", "sk-boss")]
        assert changed == [403, 401, 200]
    log = (tmp_path / "log").read_text()
    assert f"Options changed by admin key {BOSS[:8]} from 127.0.0.1: accuracy_bound 0.01 -> 0.02" in log
    assert "non-default args" in log  # with our tenants in them
    assert not [secret for secret in ("sk-", BOSS, *DIGESTS.values()) if secret in log]


@pytest.fixture(scope="module")
def plain_server(serve, tiny_llama):
    with serve(str(tiny_llama), "--policy", "off", *TINY_FLAGS) as base_url:
        yield base_url


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


@pytest.mark.parametrize(
    ("xargs", "says"),
    [
        ({"early_exit": 7}, "early_exit: Input should be 0 or 1, got 7"),
        ({"accuracy_bound": 0.9}, "accuracy_bound: at most the server's 0.5, got 0.9"),
        ({"early_exot": 1, "early_exit_depth": 1}, "early_exit_depth: unknown option"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_option_is_a_400(server, client, xargs, says, stream):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "w1 w2"}],
            max_tokens=4,
            stream=stream,
            extra_body={"vllm_xargs": xargs},
        )
    assert says in str(error.value)
    assert httpx.get(f"{server}/health").status_code == 200


def test_a_request_may_switch_exits_off_for_itself(server, client):
    def counts():
        return httpx.get(f"{server}/early_exit/status").json()["counts"]

    before = counts()
    for options in ({"early_exit": 0}, {"accuracy_bound": 0.0}):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "w1 w2"}],
            max_tokens=40,
            temperature=0,
            extra_body={"vllm_xargs": options, "ignore_eos": True},
        )
        after = counts()
        assert after["released"] == before["released"]
        if options.get("early_exit") == 0:
            assert after["held"] == before["held"] and after["emitted"] == before["emitted"] + 40


def test_a_hundred_changes_under_load_fail_no_request(server):
    """Every change is in force, and on the metrics page, when its answer arrives."""
    body = {"model": "tiny", "prompt": "w1 w2 w3", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    begun, changed = threading.Barrier(3, timeout=60), threading.Event()

    def load() -> list[str]:
        """Requests until all changes are made, one at the least; returns the answers that are not whole."""
        broken = []
        with httpx.Client(base_url=server, timeout=60) as http:
            begun.wait()
            while True:
                answer = http.post("/v1/completions", json=body)
                if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != 100:
                    broken.append(answer.text)
                if changed.is_set():
                    return broken

    with ThreadPoolExecutor(2) as clients, httpx.Client(base_url=f"{server}/early_exit", timeout=60) as http:
        start = http.get("/config").json()["config"]
        loads = [clients.submit(load) for _ in range(2)]
        begun.wait()
        try:
            for number in range(100):
                policy = ("static", "adaptive", "off", "apparate")[number % 4]
                changes = {"policy": policy, "max_exits": 1 + number % 6, "accuracy_bound": (number % 5) / 10}
                answer = http.patch("/config", json=changes)
                assert answer.status_code == 200, answer.text
                assert answer.json()["config"].items() >= changes.items()
                if number % 10 == 0:
                    assert http.get("/status").json()["config"].items() >= changes.items()
                    assert f"\napparate:max_exits {1 + number % 6}.0\n" in http.get(f"{server}/metrics").text
        finally:
            changed.set()
            back = {name: start[name] for name in ("policy", "max_exits", "accuracy_bound")}
            http.patch("/config", json=back).raise_for_status()
        assert [future.result() for future in loads] == [[], []]
        status = http.get("/status").json()
    assert status["active"] and status["counts"]["fallbacks"] == 0 and status["config"] == start


def test_events_tell_the_totals(server):
    with httpx.stream("GET", f"{server}/early_exit/events", timeout=10) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        status = json.loads(next(event_data(stream.iter_bytes())))
    assert status["active"] and status["counts"]["emitted"] > 0


def ask_with_report(client, **more):
    return client.completions.create(
        model="tiny",
        prompt="w3 w5 w9",
        temperature=0,
        max_tokens=60,
        extra_body={"ignore_eos": True, "vllm_xargs": {"early_exit_report": 1}},
        **more,
    )


def test_an_answer_says_where_its_tokens_came_from(server, client):
    def totals():
        return httpx.get(f"{server}/early_exit/status").json()["counts"]

    before = totals()
    (report,) = ask_with_report(client).model_extra["early_exit"]
    after = totals()
    tokens = report["tokens"]
    assert sum(tokens.values()) == len(report["origins"]) == 60
    assert tokens["held"] + tokens["held_divergence"] == after["accepted"] - before["accepted"]
    assert tokens["released"] > 0 and tokens["unverified"] <= after["unverified"] - before["unverified"]
    assert report["divergences"] == after["divergences"] - before["divergences"]
    assert sum(report["exits_by_depth"].values()) == 60 - tokens["checked"] and report["tpt_ms"] > 0
    chunks = list(ask_with_report(client, stream=True))
    assert [chunk.model_extra.get("early_exit") is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    (streamed,) = chunks[-1].model_extra["early_exit"]
    assert "".join(streamed["texts"]) == "".join(choice.text for chunk in chunks for choice in chunk.choices)
    plain = client.completions.create(model="tiny", prompt="w3", max_tokens=4)
    assert "early_exit" not in plain.model_extra


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_of_every_prompt_is_reported_under_its_index(client, stream):
    answer = client.completions.create(
        model="tiny",
        prompt=["w3", "w8 w8 w1"],
        max_tokens=12,
        n=3,
        temperature=1.0,
        stream=stream,
        extra_body={"ignore_eos": True, "vllm_xargs": {"early_exit_report": 1}},
    )
    texts = dict.fromkeys(range(6), "")
    for chunk in answer if stream else [answer]:
        reports = (chunk.model_extra or {}).get("early_exit")
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [report["index"] for report in reports] == list(texts) and len(set(texts.values())) > 1
    for report in reports:
        assert "".join(report["texts"]) == texts[report["index"]] and len(report["origins"]) == 12


HELLO = [{"role": "user", "content": "w1 w2"}]
ROUTES = {
    "/v1/completions": {"prompt": "w1 w2"},
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/chat/completions/batch": {"messages": [HELLO, [{"role": "user", "content": "w9"}]]},
    "/v1/messages": {"messages": HELLO},
    "/v1/responses": {"input": "w1 w2"},
    "/invocations": {"prompt": "w1 w2"},
    "/inference/v1/generate": {"token_ids": [5, 6, 7], "output_mode": "text"},
}


def text_of(part):
    """Of a whole answer or an event of a stream, by choice."""
    if "choices" in part:
        choices = [(one["index"], one.get("message") or one.get("delta") or {}, one) for one in part["choices"]]
        return {index: own.get("content") or one.get("text") or "" for index, own, one in choices}
    if "content" in part:
        return {0: "".join(block.get("text", "") for block in part["content"])}
    if "output" in part:
        return {0: "".join(block["text"] for item in part["output"] for block in item["content"])}
    delta = part.get("delta") if part.get("type") in ("content_block_delta", "response.output_text.delta") else ""
    return {0: delta if isinstance(delta, str) else delta.get("text", "")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_every_route_reports_and_refuses_a_bad_option(server, path, stream):
    body = {"model": "tiny", "temperature": 0, "stream": stream, **ROUTES[path]}
    body |= {"max_output_tokens": 20} if path == "/v1/responses" else {"max_tokens": 20}

    def asking(**options):
        if path == "/inference/v1/generate":
            return {**body, "sampling_params": {"max_tokens": 20, "temperature": 0, "extra_args": options}}
        return {**body, "vllm_xargs": options}

    with httpx.Client(base_url=server, timeout=60) as http:
        refused = http.post(path, json=asking(early_exit=7))
        assert refused.status_code == 400 and "early_exit: Input should be 0 or 1" in refused.text
        if path.endswith("batch"):
            body.pop("stream")
        answer = http.post(path, json=asking(early_exit_report=1))
        assert answer.status_code == 200, answer.text
    is_stream = answer.headers["content-type"].startswith("text/event-stream")
    assert is_stream == (stream and not path.endswith("batch"))
    parts = (
        [json.loads(data) for data in event_data([answer.content]) if data != "[DONE]"]
        if is_stream
        else [answer.json()]
    )
    texts: dict[int, str] = {}
    for part in parts:
        for index, text in text_of(part).items():
            texts[index] = texts.get(index, "") + text
    (reports,) = [report for part in parts if (report := {**part, **part.get("response", {})}.get("early_exit"))]
    assert {report["index"]: "".join(report["texts"]) for report in reports} == texts and all(texts.values())
    assert all(sum(report["tokens"].values()) == len(report["texts"]) <= 20 for report in reports)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "more", [{"stop": ["w"]}, {"stop": ["w"], "include_stop_str_in_output": True}, {"echo": True}, {"min_p": 0.1}]
)
def test_texts_are_the_choices_own_whatever_ends_it(server, more, stream):
    """A tiny model's every word has a w in it."""
    body = {"model": "tiny", "prompt": "w3 w5 w9", "temperature": 0, "max_tokens": 30, "stream": stream, **more}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    answer = httpx.post(f"{server}/v1/completions", json={**body, "vllm_xargs": {"early_exit_report": 1}}, timeout=60)
    parts = (
        [json.loads(data) for data in event_data([answer.content]) if data != "[DONE]"] if stream else [answer.json()]
    )
    text = "".join(choice["text"] for part in parts for choice in part["choices"])
    (report,) = next(part["early_exit"] for part in parts if "early_exit" in part)
    (usage,) = [part["usage"] for part in parts if part.get("usage")]
    assert "".join(report["texts"]) == (text.removeprefix("w3 w5 w9") if more.get("echo") else text)
    assert len(report["texts"]) == sum(report["tokens"].values()) == usage["completion_tokens"]
    assert sum(report["exits_by_depth"].values()) == len(report["texts"]) - report["tokens"]["checked"]
    assert report["divergences_at_worst"] == report["divergences"] + report["tokens"]["unverified"]


def test_beam_search_refuses_what_it_cannot_do_and_does_the_rest(server):
    body = {"model": "tiny", "prompt": "w1", "max_tokens": 3, "n": 2, "use_beam_search": True, "temperature": 0}
    with httpx.Client(base_url=server, timeout=60) as http:
        for xargs, says in (({"early_exit": 7}, "should be 0 or 1"), ({"early_exit_report": 1}, "takes no exits")):
            answer = http.post("/v1/completions", json={**body, "vllm_xargs": xargs})
            assert answer.status_code == 400 and says in answer.text
        answer = http.post("/v1/completions", json={**body, "vllm_xargs": {"early_exit": 0}})
        assert answer.status_code == 200 and len(answer.json()["choices"]) == 2


def test_idle_listeners_and_one_that_never_reads_cost_nobody_anything(server, client):
    async def listen():
        loop = asyncio.get_running_loop()
        port = int(server.rpartition(":")[2])
        request = b"GET /early_exit/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
        writers = []
        for _ in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            writers.append(writer)
        _, slow = await asyncio.open_connection("127.0.0.1", port)
        slow.write(request[:20])  # and then nothing more
        half = b"PATCH /early_exit/config HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        reader, unfinished = await asyncio.open_connection("127.0.0.1", port)
        unfinished.write(half)
        answer = await loop.run_in_executor(None, lambda: ask_with_report(client))
        assert answer.usage.completion_tokens == 60
        status = await loop.run_in_executor(None, lambda: httpx.get(f"{server}/early_exit/status"))
        assert status.json()["active"]
        assert b" 408 " in await asyncio.wait_for(reader.readline(), BODY_TIMEOUT_S + 10)
        for writer in (*writers, slow, unfinished):
            writer.close()

    asyncio.run(listen())


def test_chat_in_the_terminal(server):
    command = [sys.executable, "-m", "apparate_llm.cli", "chat", "--url", server, "--max-tokens", "30"]
    done = subprocess.run(command, input="w1 w2\n/new\nw3\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ms per token") == 2 and "released" in done.stdout
