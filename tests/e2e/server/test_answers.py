"""A real server on a tiny model, over HTTP and in the terminal, as its users meet it."""

import subprocess
import sys

import httpx
import openai
import pytest


def test_settings_of_file_flags_and_keys_are_all_in_force(server):
    config = httpx.get(f"{server}/early_exit/config").json()["config"]
    assert (config["policy"], config["accuracy_bound"], config["threshold"]) == ("static", 0.5, 0.05)
    assert httpx.get(f"{server}/v1/models").json()["data"][0]["id"] == "tiny"


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


def test_chat_in_the_terminal(server):
    command = [sys.executable, "-m", "apparate_llm.cli", "chat", "--url", server, "--max-tokens", "30"]
    done = subprocess.run(command, input="w1 w2\n/new\nw3\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ms per token") == 2 and "released" in done.stdout
