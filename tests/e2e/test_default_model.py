"""`apparate-llm serve` with nothing named: the embedded model, its shipped ramps, exits that hit, and the dashboard in
a real browser."""

import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest

from apparate_llm.cli import main
from apparate_llm.default_model import NAME
from apparate_llm.sealed import is_complete
from tests.environment import clean_environment

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-sync",
)
QUESTION = "Write a Python function that reverses a list."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(serve, folder):
    # float32: whether exits pay in bfloat16 depends on the CPU.
    with serve(
        "--enforce-eager", "--dtype", "float32", "--max-model-len", "1024", APPARATE_CACHE=str(folder)
    ) as base_url:
        yield base_url


def test_the_default_model_serves_with_useful_exits_within_the_bound(server, folder):
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=96,
        extra_body={"vllm_xargs": {"early_exit_report": 1}},
    )
    counts = httpx.get(f"{server}/early_exit/status").json()["counts"]
    assert is_complete(folder / NAME)
    assert "reversed" in answer.choices[0].message.content
    assert counts["divergences"] <= 0.01 * counts["emitted"] and counts["fallbacks"] == 0
    assert counts["emitted"] == answer.usage.completion_tokens
    assert counts["accepted"] / counts["emitted"] > 0.3, "the shipped ramps no longer fit the default model"
    (report,) = answer.model_extra["early_exit"]
    assert "".join(report["texts"]) == answer.choices[0].message.content
    assert report["tokens"]["held"] + report["tokens"]["held_divergence"] == counts["accepted"]
    assert report["tokens"]["checked"] == counts["emitted"] - counts["accepted"] - counts["released"]


LINE = re.compile(r"TPT [\d.to ]+ ms without exits, [\d.to ]+ ms with: .*; texts identical$", re.M)


def test_the_demo_asks_a_running_server_on_both_sides(server, capsys):
    before = httpx.get(f"{server}/early_exit/status").json()["counts"]
    assert main(["demo", QUESTION, "--url", server, "--repeat", "2", "--max-tokens", "48"]) == 0
    counts = httpx.get(f"{server}/early_exit/status").json()["counts"]
    shown = capsys.readouterr().out
    assert LINE.search(shown), shown
    assert shown.index("without exits:") < shown.index("with exits:") and f"Prompt: {QUESTION}" in shown
    assert counts["accepted"] > before["accepted"] and counts["divergences"] == before["divergences"]


@pytest.mark.long
def test_the_demo_starts_a_server_of_its_own_and_leaves_nothing(folder, tmp_path):
    flags = ["--enforce-eager", "--dtype float32", "--max-model-len 1024"]
    command = [sys.executable, "-m", "apparate_llm.cli", "demo", "--repeat", "2", "--max-tokens", "48"]
    environment = clean_environment() | {"APPARATE_CACHE": str(folder), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, *(f"--vllm-flag={flag}" for flag in flags)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        process_group=0,
    )
    assert done.returncode == 0, done.stderr
    assert LINE.search(done.stdout), done.stdout
    assert not list(tmp_path.glob("apparate-llm-*.log"))
    bad = subprocess.run([*command, "--vllm-flag=--dtype float17"], capture_output=True, text=True, env=environment)
    (log,) = tmp_path.glob("apparate-llm-*.log")
    assert bad.returncode == 1 and "invalid choice: 'float17'" in bad.stderr and str(log) in bad.stderr


@contextmanager
def load(base_url: str):
    """One client that asks again and again."""
    ended = threading.Event()
    body = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 128}

    def ask() -> None:
        with httpx.Client(base_url=base_url, timeout=120) as http:
            while not ended.is_set():
                http.post("/v1/chat/completions", json=body).raise_for_status()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    options = {"executable_path": CHROMIUM, "args": list(CHROMIUM_FLAGS)}
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as running:
        yield running


def until(page, condition: str, timeout_s: float) -> None:
    """Playwright's own waiting needs `eval`, which the page does not allow."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"{condition} did not come true; {page.locator('#notice').inner_text()}"
        page.wait_for_timeout(100)


def test_the_dashboard_draws_a_server_under_load_and_its_switch_slows_it_down(server, browser):
    page = browser.new_page()
    messages, asked = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server}/early_exit")
    switch = page.get_by_role("switch")

    def number(name: str) -> float:
        return float(page.locator(f"#{name}").inner_text().split()[0])

    with load(server):
        until(page, "samples.filter((s) => s.tokens > 0).length >= 6", 60)
        assert switch.get_attribute("aria-checked") == "true" and number("tpt") > 0
        assert number("per-pass") > 1.2
        assert page.locator("#charts svg path[d*='L']").count() >= 4
        assert "Now: measured" in page.locator("#charts svg").first.get_attribute("aria-label")
        switch.focus()
        for _ in range(3):  # interleaved, as the machine has other work as well
            page.keyboard.press("Space")
            until(page, "config.policy === 'off'", 10)
            begun = page.evaluate("samples.length")
            until(page, f"samples.length >= {begun + 8}", 60)
            assert switch.get_attribute("aria-checked") == "false" and number("per-pass") == 1.0
            page.keyboard.press("Space")
            until(page, "config.policy === 'adaptive'", 10)
            begun = page.evaluate("samples.length")
            until(page, f"samples.length >= {begun + 8}", 60)
            if number("gain") < 1:
                break
        assert number("gain") < 1, page.locator("#gain-note").inner_text()
    assert messages == []
    assert {url.split("/")[2] for url in asked} == {server.split("/")[2]}
    page.close()


def test_the_dashboard_colours_a_prompt_s_tokens_and_says_why_an_option_is_refused(server, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.goto(f"{server}/early_exit/")
    page.get_by_label("Prompt").fill(QUESTION)
    page.get_by_label("Most tokens").fill("64")
    page.get_by_role("button", name="Send").click()
    until(page, "document.querySelectorAll('#answer span').length > 0", 60)
    origins = page.eval_on_selector_all("#answer span", "spans => spans.map((span) => span.className)")
    assert len(origins) == 64 and {"checked", "held"} <= set(origins)
    assert "reversed" in page.locator("#answer").inner_text()
    assert page.locator("#answer-note").inner_text().startswith("64 tokens at ")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than a phone"
    page.get_by_label("Accuracy bound").fill("2")
    page.get_by_role("button", name="Apply").click()
    until(page, "document.getElementById('steer-result').textContent.includes('accuracy_bound')", 10)
    assert "less than 1, got 2" in page.locator("#steer-result").inner_text()
    page.get_by_label("Accuracy bound").fill("0.02")
    page.get_by_role("button", name="Apply").click()
    until(page, "config.accuracy_bound === 0.02", 10)
    httpx.patch(f"{server}/early_exit/config", json={"accuracy_bound": 0.01}).raise_for_status()
    page.close()
