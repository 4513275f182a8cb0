"""A model by its name on a hub, and a GGUF file: served and prepared, cold, from what is kept, and without network."""

import subprocess
import sys

import httpx
import openai
import pytest

from apparate_llm.ramps.checkpoint import BaseModelInfo, read_manifest
from tests.e2e.conftest import TINY_FLAGS
from tests.environment import clean_environment
from tests.fake_hub import TOKEN, running_hub
from tests.tiny import build_lens_ramps
from tests.tiny_gguf import build_tiny_gguf

NAME = "org/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tiny_llama):
    """It has the tiny model, gated."""
    with running_hub() as hub:
        hub.add(NAME, tiny_llama)
        hub.gated.add(NAME)
        yield hub


def answer_of(base_url, model):
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none")
    return client.completions.create(model=model, prompt="w1 w2 w3", temperature=0, max_tokens=24).choices[0].text


@pytest.mark.long
def test_serve_takes_a_name_cold_from_its_cache_and_without_network(serve, hub, lens_ramps, tmp_path):
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    flags = (NAME, "--ramps", str(lens_ramps()), "--hf-token", TOKEN, *TINY_FLAGS)
    texts = []
    for case in ("cold", "the hub is down", "offline"):
        before = len(hub.asked)
        with serve(*flags, **home, HF_HUB_OFFLINE=str(int(case == "offline"))) as base_url:
            assert httpx.get(f"{base_url}/v1/models").json()["data"][0]["id"] == NAME
            texts.append(answer_of(base_url, NAME))
            assert httpx.get(f"{base_url}/early_exit/status").json()["counts"]["emitted"] > 0, case
        assert (len(hub.asked) > before) == (case == "cold")
        hub.stop()
    assert texts[0] and len(set(texts)) == 1
    assert hub.downloaded().count(WEIGHTS) == 1


@pytest.mark.long
def test_prepare_takes_a_name_cold_from_its_cache_and_without_network(hub, tiny_llama, tmp_path):
    out = tmp_path / "ramps"
    command = [sys.executable, "-m", "apparate_llm.cli", "prepare", NAME, "--out", str(out), "--tokens", "2000"]
    command += ["--depths", "0", "--ramp-vocab", "120", "--enforce-eager"]
    env = clean_environment() | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    for case in ("cold", "the hub is down", "offline"):
        before = len(hub.asked)
        offline = {"HF_HUB_OFFLINE": str(int(case == "offline"))}
        done = subprocess.run(command, env=env | offline, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"next: apparate-llm serve {NAME} --ramps {out}" in done.stderr + done.stdout
        assert (len(hub.asked) > before) == (case == "cold")
        hub.stop()
    assert hub.downloaded().count(WEIGHTS) == 1
    assert read_manifest(out).base_model == BaseModelInfo.of(tiny_llama)
    assert NAME in (out / "report.html").read_text()


@pytest.mark.long
def test_serve_takes_a_gguf_file_and_keeps_what_it_made_of_it(serve, tiny_llama, tmp_path, monkeypatch):
    from apparate_llm.gguf_model import gguf_folder

    file = build_tiny_gguf(tmp_path / "tiny.gguf", tiny_llama)
    cache = str(tmp_path / "cache")
    monkeypatch.setenv("APPARATE_CACHE", cache)
    folder = gguf_folder(file)
    ramps = build_lens_ramps(tmp_path / "ramps", folder, depth=3, confidence_offset=6.0)
    made = (folder / WEIGHTS).stat().st_mtime_ns
    with serve(str(file), "--ramps", str(ramps), *TINY_FLAGS, APPARATE_CACHE=cache) as base_url:
        assert httpx.get(f"{base_url}/v1/models").json()["data"][0]["id"] == str(file)
        assert answer_of(base_url, str(file))
    assert (folder / WEIGHTS).stat().st_mtime_ns == made
