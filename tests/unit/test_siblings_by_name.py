"""Siblings and int8 weights of models by name: on a hub, and as GGUF files."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from apparate_llm import serve
from apparate_llm.cli import main
from apparate_llm.gguf_model import gguf_folder
from tests.tiny import build_lens_ramps
from tests.tiny_gguf import build_tiny_gguf

NAME = "org/tiny"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The flags that vLLM would be started with."""
    flags_of_starts = []
    monkeypatch.setattr(serve, "start_vllm", lambda flags, wanted: flags_of_starts.append(flags) or 0)
    monkeypatch.setattr(serve, "reexec_with_libraries", lambda: None)
    monkeypatch.setattr(serve, "port_problem", lambda *args: None)
    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path / "ours"))
    return flags_of_starts


def test_serve_quantises_a_model_of_the_hub_and_its_ramps_fit(hub, tiny_llama, lens_ramps, started, capsys, tmp_path):
    hub.add(NAME, tiny_llama)
    ramps = ["--ramps", str(lens_ramps("llama", 3)), "--controller-state", "none"]
    assert main(["serve", NAME, "--weights", "int8", *ramps]) == 0
    (flags,) = started
    assert Path(flags[0]).parent == tmp_path / "ours" / "int8" and Path(flags[0]).name.startswith("org--tiny-W8A8-")
    assert flags[flags.index("--served-model-name") + 1] == NAME
    err = capsys.readouterr().err
    assert (
        "Ramps of llama for a sibling: compressed-tensors weights" in err and f"Int8 weights: using {flags[0]}" in err
    )
    assert main(["quantize", NAME, "--out", str(tmp_path / "int8"), "--measure-s", "0"]) == 0
    assert f"{NAME} has " in capsys.readouterr().out
    assert hub.downloaded().count("model.safetensors") == 1


def test_a_fine_tuned_model_of_the_hub_is_served_with_its_siblings_ramps(
    hub, tiny_llama, lens_ramps, started, capsys, tmp_path
):
    tuned = shutil.copytree(tiny_llama, tmp_path / "tuned")
    weights = {name: 1.01 * tensor for name, tensor in load_file(tuned / "model.safetensors").items()}
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    hub.add(NAME, tuned)
    ramps = ["--ramps", str(lens_ramps("llama", 3)), "--controller-state", "none"]
    assert main(["serve", NAME, *ramps]) == 0
    assert capsys.readouterr().err.count("Ramps of llama for a sibling: float32 weights") == 1
    assert len(started) == 1 and "snapshots" in started[0][0]


def test_what_cannot_be_quantised_is_refused_before_its_weights(hub, tiny_llama, started, capsys, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "repository")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    hub.add(NAME, folder)
    for command in (
        ["serve", NAME, "--weights", "int8", "--policy", "off"],
        ["quantize", NAME, "--out", str(tmp_path / "int8")],
    ):
        assert main(command) == 2
        assert "is quantised already (awq)" in capsys.readouterr().err
    assert "model.safetensors" not in hub.downloaded() and started == []


def test_other_tokens_are_refused_before_the_weights(hub, tiny_llama, lens_ramps, started, capsys, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "repository")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"][7]["content"] = "another"
    (folder / "tokenizer.json").write_text(json.dumps(document))
    hub.add(NAME, folder)
    assert main(["serve", NAME, "--ramps", str(lens_ramps("llama", 3))]) == 2
    assert f"another model than {NAME}: it is no sibling of llama: its tokenizer has" in capsys.readouterr().err
    assert "model.safetensors" not in hub.downloaded() and started == []


def test_serve_quantises_what_a_gguf_file_became(tiny_llama, tmp_path, started, capsys):
    file = build_tiny_gguf(tmp_path / "tiny.gguf", tiny_llama)
    ramps = build_lens_ramps(tmp_path / "ramps", gguf_folder(file), depth=3)
    command = ["serve", str(file), "--weights", "int8", "--ramps", str(ramps), "--controller-state", "none"]
    assert main(command) == 0
    (flags,) = started
    assert Path(flags[0]).name.startswith("tiny-") and "-W8A8-" in flags[0]
    assert flags[flags.index("--served-model-name") + 1] == str(file)
    assert "for a sibling: compressed-tensors weights" in capsys.readouterr().err
