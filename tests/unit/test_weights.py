"""A model folder is read as vLLM reads it: the same files, the same tensors, the same mark of the model."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from apparate_llm.models.architectures import UnsupportedModelError, architecture_of
from apparate_llm.prepare.draft_data import BaseParts
from apparate_llm.ramps.checkpoint import BaseModelInfo, RampError
from apparate_llm.ramps.fingerprint import WeightsError, checkpoint_tensors, fingerprint_of, weight_files
from tests.harness import Engine, greedy, token_prompts
from tests.tiny import NUM_LAYERS, build_lens_ramps

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LAYOUTS = {
    "one file": (["model.safetensors"], {}),
    "a file beside one without an index": (["model.safetensors", "extra.safetensors"], {}),
    "shards": ([*SHARDS], {"model": SHARDS}),
    "a file the index does not name": ([*SHARDS, "adapter.safetensors"], {"model": SHARDS}),
    "Mistral's format beside shards": ([*SHARDS, "consolidated.safetensors"], {"model": SHARDS}),
    "Mistral's format in shards": (
        ["consolidated-1.safetensors", "consolidated-2.safetensors", "consolidated-3.safetensors"],
        {"consolidated": ("consolidated-1.safetensors", "consolidated-2.safetensors")},
    ),
    "weights for torch beside": (["model.safetensors", "pytorch_model.bin"], {}),
}


def folder_of(folder: Path, layout: str) -> Path:
    files, indexes = LAYOUTS[layout]
    for name in files:
        (folder / name).write_bytes(b"")
    for stem, named in indexes.items():
        index = {"weight_map": {f"t{i}": name for i, name in enumerate(named)}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors", "mistral"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_those_that_vllm_chooses(layout, load_format, tmp_path):
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    folder = folder_of(tmp_path, layout)
    loader = DefaultModelLoader(LoadConfig(load_format=load_format))
    try:
        theirs = loader._prepare_weights(str(folder), None, None, True, None)[1]
    except RuntimeError:
        with pytest.raises(WeightsError):
            weight_files(folder, load_format)
    else:
        assert weight_files(folder, load_format) == sorted(map(Path, theirs))


def mistral_file(model: Path, folder: Path) -> Path:
    """A copy of a tiny Mistral with an index, and its weights in Mistral's own format beside them."""
    shutil.copytree(model, folder)
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs of a rotation stand beside each other there
            heads, half = tensor.shape[0] // 32, 16
            tensor = tensor.view(heads, 2, half, -1).transpose(1, 2).reshape(tensor.shape).contiguous()
        for ours, theirs in (
            ("model.embed_tokens", "tok_embeddings"),
            ("lm_head", "output"),
            ("model.", ""),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            *((f"self_attn.{part}_proj", f"attention.w{part}") for part in "qkvo"),
            *((f"mlp.{part}_proj", f"feed_forward.w{i}") for part, i in (("gate", 1), ("down", 2), ("up", 3))),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(renamed, folder / "consolidated.safetensors", metadata={"format": "pt"})
    return folder


def test_a_folder_with_mistrals_own_file_is_served_with_ramps_made_for_it(tiny_models, tmp_path):
    folder = mistral_file(tiny_models["mistral"], tmp_path / "model")
    assert "norm.weight" in dict(checkpoint_tensors(folder))
    assert fingerprint_of(folder, "hf") == fingerprint_of(tiny_models["mistral"]) != fingerprint_of(folder)
    assert BaseParts.of(folder).lm_head.equal(BaseParts.of(tiny_models["mistral"]).lm_head)
    ramps = build_lens_ramps(tmp_path / "ramps", folder, depth=NUM_LAYERS, confidence_offset=6.0)
    with Engine(folder, {"ramps": str(ramps), "hold_threshold": 0.0}) as engine:
        tokens = engine.tokens(token_prompts(2), greedy())
        counts = engine.counts()
    assert counts["accepted"] == counts["held"] > 0
    with Engine(tiny_models["mistral"]) as plain:
        assert plain.tokens(token_prompts(2), greedy()) == tokens


def test_a_folder_without_readable_weights_is_one_line(tmp_path):
    with pytest.raises(WeightsError, match=r"no \*\.safetensors file in .*: early exits read"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"no \*\.safetensors file in .* \(but pytorch_model\.bin\)"):
        fingerprint_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightsError, match=r"damaged .*model\.safetensors"):
        fingerprint_of(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}))
    with pytest.raises(WeightsError, match=r"names files that are missing: gone\.safetensors"):
        weight_files(tmp_path)
    for text in ("{", "[]", '{"weight_map": []}', "{}"):
        index.write_text(text)
        with pytest.raises(WeightsError, match=r"damaged .*index\.json"):
            weight_files(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"architectures": "LlamaForCausalLM"}', '{"architectures": [3]}', "\ufffe"]
)
def test_a_configuration_that_is_none_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-16") if text == "\ufffe" else text.encode())
    with pytest.raises(UnsupportedModelError):
        architecture_of(tmp_path)
    with pytest.raises(RampError) as error:
        BaseModelInfo.of(tmp_path)
    assert "\n" not in str(error.value)


def test_a_configuration_that_leaves_something_out_is_one_line(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["rms_norm_eps"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RampError, match=r"config\.json does not say rms_norm_eps"):
        BaseModelInfo.of(folder)
