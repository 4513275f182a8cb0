"""`apparate-llm quantize` and `serve --weights int8`: int8 folders that vLLM and transformers read."""

import io
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from apparate_llm import agreement, serve, w8a8
from apparate_llm.cli import main
from apparate_llm.config import ConfigError
from apparate_llm.progress import Progress
from apparate_llm.ramps.dequantise import dequantised
from apparate_llm.ramps.fingerprint import WeightsError, weight_files
from apparate_llm.sealed import COMPLETE, becoming, is_complete
from tests.quantised import FORMATS, stage
from tests.tiny import CHAT_TEMPLATE, HIDDEN_SIZE, NUM_LAYERS

LINEARS = 7 * NUM_LAYERS


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def layers_of(folder):
    """Names and tensors of all files."""
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def sharded(model, out):
    """The same model in two files with an index."""
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file(
            {name: weights[name] for name in names if places[name] == file}, out / file, metadata={"format": "pt"}
        )
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return out


def test_the_layers_of_the_blocks_become_int8_and_all_else_stays(tiny_llama, tmp_path):
    made = layers_of(FORMATS["W8A8"](tiny_llama, tmp_path / "int8"))
    original = layers_of(tiny_llama)
    scales = {name for name in made if name.endswith(".weight_scale")}
    assert len(scales) == LINEARS and made.keys() - scales == original.keys()
    for name, weight in original.items():
        if w8a8.LINEAR.fullmatch(name):
            scale = made[name + "_scale"]
            assert made[name].dtype == torch.int8 and scale.shape == (len(weight), 1)
            parts = {"weight": made[name], "weight_scale": scale}
            back = dequantised(parts, weight.shape[1], torch.float32)
            assert ((back - weight).abs() <= 0.501 * scale).all(), name
            assert made[name].int().abs().amax(1).min() >= 127, "a row does not use the codes there are"
        else:
            assert made[name].equal(weight), name


def test_a_folder_in_shards_becomes_one(tiny_llama, tmp_path):
    one, parts = tmp_path / "one", tmp_path / "parts"
    FORMATS["W8A8"](tiny_llama, one)
    FORMATS["W8A8"](sharded(tiny_llama, tmp_path / "sharded"), parts)
    assert len(weight_files(parts)) == 2
    expected, actual = layers_of(one), layers_of(parts)
    assert actual.keys() == expected.keys() and all(actual[name].equal(tensor) for name, tensor in expected.items())
    index = json.loads((parts / w8a8.INDEX).read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_transformers_computes_with_it_as_with_the_original(tiny_llama, tmp_path):
    made = FORMATS["W8A8"](tiny_llama, tmp_path / "int8")
    ids = torch.tensor([[1, 9, 30, 77, 12]])
    scores = [agreement.scores_of(agreement.loaded(folder), ids, 4) for folder in (tiny_llama, made)]
    same, kl = agreement.compared(*scores)
    assert not scores[0].equal(scores[1])  # inputs are rounded, too
    assert same >= 3 and 0 < kl / 4 < 0.1


def test_agreement_counts_tokens_and_nats():
    scores = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert agreement.compared(scores, scores) == (2, pytest.approx(0.0, abs=1e-6))
    same, kl = agreement.compared(scores, scores.flip(1))
    p = torch.tensor([1.0, 2.0]).sigmoid()
    assert same == 0 and kl == pytest.approx(float(((2 * p - 1) * torch.tensor([1.0, 2.0])).sum()), rel=1e-4)


def test_agreement_is_over_the_prompts_that_there_is_time_for(tiny_llama, tmp_path):
    from rich.console import Console

    prompts = [[{"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(3)]
    with Progress(Console(quiet=True)) as progress:
        whole = agreement.agreement_of(tiny_llama, tiny_llama, prompts, limit_s=1000.0, progress=progress)
        hasty = agreement.agreement_of(tiny_llama, tiny_llama, prompts, limit_s=1e-6, progress=progress)
    assert whole.num_prompts == 3 and hasty.num_prompts == 1 and 0 < hasty.num_tokens <= agreement.MAX_TOKENS
    assert whole.same_frac == 1.0 and whole.kl_nats == pytest.approx(0.0, abs=1e-6)
    assert "100.0% of" in str(whole)


def refusing(condition):
    return f"{{% if {condition} %}}{{{{ raise_exception('not so') }}}}{{% endif %}}" + CHAT_TEMPLATE


def with_template(model, folder, template):
    """The model with another chat template, None for without."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("template", "asked", "says"),
    [
        (refusing("messages[0].role == 'system'"), 2, "1 of 3 prompts left out: 1 the chat template refuses (not so)"),
        (refusing("messages | length > 1"), 1, "2 of 3 prompts left out: 2 the chat template refuses (not so)"),
        ("{{ '<user>' + messages[0].content + messages[2].role }}", 3, "a chat template that takes no user's words"),
        (None, 3, "the model has no chat template: prompts are plain text"),
    ],
)
def test_prompts_that_the_template_refuses_are_left_out_and_without_a_template_they_are_text(
    template, asked, says, tiny_llama, tmp_path
):
    from rich.console import Console

    model, file = with_template(tiny_llama, tmp_path / "model", template), io.StringIO()
    turns = [[("system", "w1"), ("user", "w2")], [("user", "w3"), ("user", "w4")], [("user", "w5 w6")]]
    prompts = [[{"role": role, "content": text} for role, text in chat] for chat in turns]
    with Progress(Console(file=file)) as progress:
        agreed = agreement.agreement_of(model, model, prompts, limit_s=1000.0, progress=progress)
    assert agreed.num_prompts == asked and agreed.same_frac == 1.0
    assert sum(agreed.left_out.values()) == 3 - asked and says in file.getvalue()


def test_a_model_that_can_be_asked_nothing_is_quantised_and_not_compared(tiny_llama, tmp_path, capsys):
    refusing_all = refusing("messages[0].content not in ['apple', 'bird']")  # but what a template is tried with
    mute = with_template(tiny_llama, tmp_path / "model", refusing_all)
    damaged = shutil.copytree(tiny_llama, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{}")
    for model, says in ((mute, "no prompt is left: 16 of 16 prompts left out"), (damaged, "no tokenizer can be")):
        out, file = tmp_path / f"{model.name}-int8", tmp_path / f"{model.name}.json"
        assert main(["quantize", str(model), "--out", str(out), "--json", str(file)]) == 0
        written, against, after = capsys.readouterr().out.splitlines()
        assert against.startswith(f"not compared with {model.name}: {says}"), against
        assert written.startswith(f"written: {out}") and after.startswith("next: ")
        assert json.loads(file.read_text())["agreement"] is None and weight_files(out)


def test_the_command_says_what_it_made_what_that_costs_and_what_is_next(tiny_llama, tmp_path, capsys):
    out = tmp_path / "int8"
    command = ["quantize", str(tiny_llama), "--out", str(out), "--measure-s", "20", "--json", str(tmp_path / "json")]
    assert main(command) == 0
    written, against, after = capsys.readouterr().out.splitlines()
    assert written.startswith(f"written: {out} (")
    assert against.startswith("against llama: ") and "greedy tokens are the same, mean KL" in against
    assert after == f"next: apparate-llm serve {out}"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized" and config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["weights"]["strategy"] == "channel" and group["weights"]["symmetric"]
    assert (
        group["input_activations"] | {"strategy": "token", "dynamic": True, "symmetric": True, "num_bits": 8}
        == (group["input_activations"])
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", "json"]
    document = json.loads((tmp_path / "json").read_text())
    assert document["model"] == "llama" and 0 < document["made_mb"] < document["original_mb"]
    same = document["agreement"]["same_frac"]
    assert 0.5 < same <= 1.0 and f"{same:.1%} of {document['agreement']['num_tokens']} greedy tokens" in against


def test_it_refuses_what_is_there_or_cannot_be_taken(tiny_llama, tmp_path, capsys):
    def refused(*arguments):
        assert main(["quantize", *map(str, arguments), "--measure-s", "0"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "is there already: name a new folder" in refused(tiny_llama, "--out", tmp_path)
    assert "--out: folder not found" in refused(tiny_llama, "--out", tmp_path / "no" / "such")
    no_json = tmp_path / "no" / "json"
    assert "--json: folder not found" in refused(tiny_llama, "--out", tmp_path / "new", "--json", no_json)
    assert "model folder not found" in refused(tmp_path / "none", "--out", tmp_path / "new")
    made = FORMATS["AWQ"](tiny_llama, tmp_path / "awq")
    assert "is quantised already (awq)" in refused(made, "--out", tmp_path / "new")
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert "architecture GPT2LMHeadModel (allowed: Llama" in refused(other, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        main(["quantize", str(tiny_llama), "--out", str(tmp_path / "new"), "--measure-s", "nan"])
    assert "must be seconds, at least 0, got 'nan'" in capsys.readouterr().err


def other_config(model, folder, **changes):
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_model_is_quantised_already_wherever_it_says_so(tiny_llama, tmp_path):
    """vLLM reads all of these."""
    how = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    ways = {
        "an older key": ({"compression_config": how}, "compressed-tensors"),
        "the text's own": ({"text_config": {"quantization_config": how}}, "compressed-tensors"),
        "no more than that": ({"quantization_config": True}, "in an unknown way"),
    }
    for name, (changes, says) in ways.items():
        with pytest.raises(ConfigError, match=f"it is quantised already .{says}"):
            w8a8.check_quantisable(other_config(tiny_llama, tmp_path / name, **changes))
    of_its_own = shutil.copytree(tiny_llama, tmp_path / "file")
    (of_its_own / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(ConfigError, match=r"it is quantised already .in an unknown way"):
        w8a8.check_quantisable(of_its_own)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda name, tensor: (name, tensor.to(torch.float8_e4m3fn)), r"no numbers of a layer \(torch.float8_e4m3fn\)"),
        (lambda name, tensor: (name, tensor.to(torch.int8)), r"no numbers of a layer \(torch.int8\)"),
        (lambda name, tensor: (name.replace("weight", "weight_packed"), tensor), "no tensor of its weights is called"),
    ],
    ids=["float8", "int8", "packed"],
)
def test_codes_that_nothing_is_said_of_are_not_quantised_again(change, says, tiny_llama, tmp_path, capsys):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    changed = dict(change(*one) if w8a8.LINEAR.fullmatch(one[0]) else one for one in weights.items())
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["quantize", str(model), "--out", str(tmp_path / "new"), "--measure-s", "0"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(says, error) and sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_weights_that_are_no_numbers_leave_no_folder(tiny_llama, tmp_path, capsys):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["quantize", str(model), "--out", str(tmp_path / "new"), "--measure-s", "0"]) == 2
    assert "model.layers.1.mlp.up_proj.weight holds values that are not finite" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    with pytest.raises(WeightsError, match="not finite"), becoming(tmp_path / "new") as work:
        w8a8.write_w8a8(model, work, stage())


def test_a_zero_row_stays_zero():
    stored = w8a8.quantised("x.weight", torch.zeros(2, HIDDEN_SIZE))
    assert not stored["x.weight"].any() and stored["x.weight_scale"].gt(0).all()


def test_int8_weights_are_made_once_for_each_model(tiny_llama, tmp_path, cache, capsys):
    folder = w8a8.int8_model(tiny_llama)
    assert folder.parent == cache / "int8" and folder.name.startswith("llama-W8A8-") and is_complete(folder)
    assert f"quantising {tiny_llama} once to {folder}" in capsys.readouterr().err
    assert w8a8.int8_model(tiny_llama) == folder and capsys.readouterr().err == ""
    (folder / COMPLETE).unlink()
    assert w8a8.int8_model(tiny_llama) == folder and is_complete(folder)
    model = shutil.copytree(tiny_llama, tmp_path / "llama")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert w8a8.int8_model(model) != folder  # another model of the same name


def test_int8_weights_are_made_anew_where_a_file_of_the_model_has_changed(tiny_llama, tmp_path, cache):
    """In a folder of the same name."""
    model = shutil.copytree(tiny_llama, tmp_path / "llama")
    before = w8a8.int8_model(model)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with_template = w8a8.int8_model(model)
    assert (with_template / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][[100, 101]] = weights["model.embed_tokens.weight"][[101, 100]]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with_rows = w8a8.int8_model(model)
    assert layers_of(with_rows)["model.embed_tokens.weight"].equal(weights["model.embed_tokens.weight"])
    assert len({before, with_template, with_rows}) == 3 and w8a8.int8_model(model) == with_rows


@pytest.fixture
def started(monkeypatch):
    """The flags that vLLM would be started with."""
    starts = []
    monkeypatch.setattr(serve, "start_vllm", lambda flags, wanted: starts.append(flags) or 0)
    monkeypatch.setattr(serve, "reexec_with_libraries", lambda: None)
    monkeypatch.setattr(serve, "port_problem", lambda *args: None)
    return starts


def test_serve_with_int8_weights_serves_the_copy_with_the_models_ramps(
    tiny_llama, lens_ramps, cache, started, capsys, monkeypatch
):
    ramps = ["--ramps", str(lens_ramps("llama", 3)), "--controller-state", "none"]
    assert main(["serve", str(tiny_llama), "--weights", "int8", *ramps]) == 0
    (flags,) = started
    folder = w8a8.int8_model(tiny_llama)
    assert flags[0] == str(folder) and flags[flags.index("--served-model-name") + 1] == str(tiny_llama)
    err = capsys.readouterr().err
    assert f"Int8 weights: using {folder}" in err
    assert err.count("Ramps of llama for a sibling: compressed-tensors weights") == 1
    assert main(["serve", str(tiny_llama), *ramps]) == 0
    assert started[1][0] == str(tiny_llama) and "sibling" not in capsys.readouterr().err
    assert main(["serve", str(folder), "--weights", "int8", *ramps]) == 2
    assert "is quantised already (compressed-tensors)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="quantised already"):
        w8a8.check_quantisable(folder)
