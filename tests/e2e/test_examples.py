"""The files in examples/ do what they say, on a server started as tenants.toml says."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from apparate_llm import api
from tests.e2e.conftest import TINY_FLAGS
from tests.environment import clean_environment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TENANTS = tomllib.loads((EXAMPLES / "tenants.toml").read_text())
KEYS = {name: tenant["api_keys"][0] for name, tenant in TENANTS.items()}
QUESTION = "w3 w5 w9"


@pytest.fixture(scope="module")
def server(serve, tiny_llama, lens_ramps):
    """Exits wherever they can be: by a policy that does not look at what they cost."""
    flags = ["--ramps", str(lens_ramps(depth=3)), "--policy", "static", "--threshold", "0.05", "--tpt-target-ms", "20"]
    flags += ["--tenants", str(EXAMPLES / "tenants.toml"), "--api-key", *KEYS.values(), "--served-model-name", "tiny"]
    with serve(str(tiny_llama), *flags, *TINY_FLAGS, APPARATE_ADMIN_KEY="sk-boss") as base_url:
        yield base_url


def run(server: str, key: str, *command: str, **variables: str) -> str:
    environment = {"OPENAI_BASE_URL": f"{server}/v1", "OPENAI_API_KEY": key, "MODEL": "tiny", **variables}
    done = subprocess.run(command, env=clean_environment() | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def counts(server: str) -> dict[str, dict[str, int]]:
    headers = {"Authorization": "Bearer sk-boss"}
    return httpx.get(f"{server}/early_exit/status", headers=headers).json()["tenants"]


def test_the_command_in_tenants_toml_has_the_keys_in_it():
    command = re.search(r"apparate-llm serve .*", (EXAMPLES / "tenants.toml").read_text())[0]
    assert command.partition("--api-key ")[2].split() == [*KEYS.values()]


def test_stream_shows_an_answer_and_what_its_tokens_took(server):
    before = counts(server)["reports"]["emitted"]
    text, _, last = run(server, KEYS["reports"], sys.executable, str(EXAMPLES / "stream.py"), QUESTION).rpartition(
        "\n\n"
    )
    number = re.fullmatch(r"first token after \d+ ms, then \d+\.\d ms for each of (\d+)\n", last)[1]
    assert 1 < int(number) <= 128 and text
    assert counts(server)["reports"]["emitted"] == before + int(number)


def test_per_request_asks_in_each_way_and_says_where_tokens_came_from(server):
    out = run(server, KEYS["chat"], sys.executable, str(EXAMPLES / "per_request.py"), QUESTION)
    answers = re.findall(r"^--- (.+?): (.+)\n.*: (\d+)\n(.+)$", out, re.M)
    origins = {way: dict(reversed(item.split()) for item in counted.split(", ")) for way, counted, _, _ in answers}
    texts = {way: text.replace("[", "").replace("]", "") for way, _, _, text in answers}
    assert len(answers) == 4 and set(origins["without exits"]) == {"checked"}
    assert "held" in origins["lossless"] and not [name for name in origins["lossless"] if "divergence" in name]
    assert texts["lossless"] == texts["without exits"]
    assert answers[1][0] == "lossless" and answers[1][2] == "0" and "[" in answers[1][3]


def test_langchain_gets_its_answer(server):
    if find_spec("langchain_openai") is None:
        pytest.skip("langchain-openai is not installed, and no dependency of ours")
    assert run(server, KEYS["chat"], sys.executable, str(EXAMPLES / "langchain_chat.py"), QUESTION).strip()


def test_tenants_have_options_and_figures_of_their_own(server):
    body = {"model": "tiny", "prompt": QUESTION, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    before, held = counts(server), {}
    for name, key in KEYS.items():
        asked = body | {"vllm_xargs": {"early_exit_report": 1}}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{server}/v1/completions", json=asked, headers=headers, timeout=60).raise_for_status()
        held[name] = answer.json()["early_exit"][0]["tokens"]["held"]
    after = counts(server)
    assert {name: after[name]["emitted"] - before[name]["emitted"] for name in TENANTS} == dict.fromkeys(TENANTS, 40)
    assert held["reports"] > 0 == held["jobs"]
    assert after["reports"]["divergences_at_worst"] == 0


def test_bench_measures_with_and_without_exits_and_leaves_the_policy_as_it_was(server):
    out = run(
        server, KEYS["reports"], str(EXAMPLES / "bench.sh"), server, "1", APPARATE_ADMIN_KEY="sk-boss"
    ).splitlines()
    times = {line.split()[0]: float(line.split()[1]) for line in out[:2]}
    assert set(times) == {"static", "off"} and min(times.values()) > 0
    ratio = float(re.fullmatch(r"static over off: (\d+\.\d\d)", out[2])[1])
    assert ratio == pytest.approx(times["static"] / times["off"], abs=0.02)
    config = httpx.get(f"{server}/early_exit/config", headers={"Authorization": "Bearer sk-boss"}).json()
    assert config["config"]["policy"] == "static"


def test_the_server_has_every_metric_that_dashboard_and_alerts_ask_for(server):
    folder = Path(api.__path__[0])
    text = json.dumps(json.loads((folder / "grafana.json").read_text())) + (folder / "alerts.yml").read_text()
    asked = set(re.findall(r"\b(?:apparate|vllm):\w+", text))
    shown = set(re.findall(r"^([\w:]+)[ {]", httpx.get(f"{server}/metrics").text, re.M))
    assert len(asked) > 10 and asked <= shown, asked - shown
