"""What a perfect ramp would reach: by the log of the ramps that serve the model, its own or a sibling's."""

import json

import pytest

from apparate_llm.controller.feedback import SCHEMA_VERSION
from apparate_llm.eval import oracle
from apparate_llm.ramps import fitting
from apparate_llm.ramps.checkpoint import read_manifest
from tests import logs
from tests.quantised import FORMATS
from tests.tiny import build_fused_ramps


@pytest.fixture
def shipped(lens_ramps, tiny_models, monkeypatch, tmp_path):
    """As if ramps of two tiny models were shipped, those of the llama with a log of two and of three clients."""
    llama, other = lens_ramps("llama", 3), build_fused_ramps(tmp_path / "other", tiny_models["qwen2"], depth=2)
    monkeypatch.setattr(fitting, "shipped_folders", lambda: [other, llama])
    header = {"schema_version": SCHEMA_VERSION, "num_layers": 4, "ramps": read_manifest(llama).weights_sha256}
    lines = [header]
    for count, requests in ((oracle.LEAST_STEPS, 2), (oracle.LEAST_STEPS - 1, 3)):
        for step in logs.steps(count, requests=requests):
            lines.append([*step[:4], [[*exit_[:5], int(exit_.agrees), exit_[6]] for exit_ in step.exits]])
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(oracle, "shipped_logs", lambda: {"llama": path})


def test_the_model_and_its_siblings_have_an_oracle_at_the_loads_of_the_log(shipped, tiny_llama, tmp_path):
    ratios = oracle.oracle_ratios(tiny_llama, [1, 2, 3])
    assert ratios.keys() == {"2"} and 0.2 < ratios["2"] < 0.9
    sibling = FORMATS["W8A8"](tiny_llama, tmp_path / "int8")
    assert oracle.oracle_ratios(sibling, [1, 2, 3]) == ratios


def test_a_stranger_a_model_whose_ramps_have_no_log_and_weights_of_another_kind_have_none(
    shipped, tiny_models, tmp_path
):
    assert oracle.oracle_ratios(tiny_models["qwen3"], [2]) == {}
    assert oracle.oracle_ratios(tiny_models["qwen2"], [2]) == {}
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert oracle.oracle_ratios(tmp_path, [2]) == {}
