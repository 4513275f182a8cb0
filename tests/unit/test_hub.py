"""Models by name: what is downloaded, from where, and the one line where it cannot be had."""

import json
import os
import resource
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest

from apparate_llm.config import ConfigError, parse_config
from apparate_llm.hub import Origin, fetch_gguf, fetch_model
from apparate_llm.models.architectures import UnsupportedModelError, architecture_of, early_exit_architecture
from apparate_llm.named_model import folder_here, model_folder, model_of
from apparate_llm.naming import model_name
from apparate_llm.preflight import preflight_config
from apparate_llm.ramps.checkpoint import RampError
from apparate_llm.serve import origin_of
from apparate_llm.vllm_flags import normalised
from tests.fake_hub import TOKEN, Hub

NAME = "org/tiny"


def nothing(folder):
    pass


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    return partial(monkeypatch.setattr, constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def model(tmp_path):
    """A folder with what repositories have."""
    return written(
        tmp_path / "repository",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "model.safetensors",
        "pytorch_model.bin",
        "training_args.bin",
        "onnx/model.onnx",
        "onnx/config.json",
        "original/consolidated.safetensors",
        "flax_model.msgpack",
        "README.md",
    )


def written(folder, *names, **config):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of {folder}")
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 160, "num_attention_heads": 2}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | shape | config))
    return folder


NEEDED = [
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_a_model_is_downloaded_once_with_what_serving_needs(hub, model):
    hub.add(NAME, model)
    folder = fetch_model(NAME, Origin(), nothing)
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == NEEDED
    assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in NEEDED)
    assert hub.downloaded() == NEEDED
    assert fetch_model(NAME, Origin(), nothing) == folder and hub.downloaded() == NEEDED
    assert model_name(folder) == NAME


@pytest.mark.parametrize("how", ["offline", "stopped", "failing"])
def test_what_is_in_the_cache_needs_no_hub(how, hub, model, offline):
    hub.add(NAME, model)
    folder = fetch_model(NAME, Origin(), nothing)
    asked = len(hub.asked)
    if how == "stopped":
        hub.stop()
    elif how == "failing":
        hub.fails_with = 503
    else:
        offline()
    assert fetch_model(NAME, Origin(), nothing) == folder
    if how == "offline":
        assert len(hub.asked) == asked


def test_a_cache_that_plain_vllm_filled_will_do_offline(hub, model, offline):
    """It loads no merges.txt where there is a tokenizer.json."""
    from huggingface_hub import snapshot_download

    hub.add(NAME, model)
    snapshot_download(NAME, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["*/*"])
    offline()
    folder = fetch_model(NAME, Origin(), nothing)
    assert (folder / "model.safetensors").is_file() and not (folder / "merges.txt").exists()


def test_a_download_that_was_interrupted_is_not_taken_for_the_model(hub, model, offline):
    from huggingface_hub import snapshot_download

    hub.add(NAME, model)
    snapshot_download(NAME, allow_patterns=["*.json"])
    offline()
    with pytest.raises(ConfigError, match="not complete in the cache"):
        fetch_model(NAME, Origin(), nothing)


def test_revisions_are_branches_and_commits(hub, model, tmp_path):
    hub.add(NAME, model)
    commit = hub.add(NAME, written(tmp_path / "second", "model.safetensors"), revision="second")
    main, second = (fetch_model(NAME, Origin(revision=revision), nothing) for revision in (None, "second"))
    assert main != second and second.name == commit
    assert fetch_model(NAME, Origin(revision=commit), nothing) == second
    with pytest.raises(ConfigError, match=f"^{NAME} has no revision third$"):
        fetch_model(NAME, Origin(revision="third"), nothing)


def test_another_folder_may_take_the_cache_s_place(hub, model, tmp_path):
    hub.add(NAME, model)
    folder = fetch_model(NAME, Origin(download_dir=str(tmp_path / "mine")), nothing)
    assert tmp_path / "mine" in folder.parents and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("given", "exits", "loaded"),
    [
        ("auto", True, ["consolidated.safetensors"]),
        ("hf", True, ["model-1.safetensors", "model-2.safetensors"]),
        ("mistral", True, ["consolidated.safetensors"]),
        ("npcache", False, ["pytorch_model.bin"]),
        ("dummy", False, []),
    ],
)
def test_weights_are_those_that_vllm_loads(given, exits, loaded, hub, tmp_path):
    """Those of the index, and no others."""
    names = ["model-1.safetensors", "model-2.safetensors", "adapter.safetensors", "consolidated.safetensors"]
    folder = written(tmp_path / "repository", *names, "pytorch_model.bin")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add(NAME, folder)
    fetch_model(NAME, Origin(load_format=given, with_exits=exits), nothing)
    assert [name for name in hub.downloaded() if not name.endswith(".json")] == loaded


def test_pickled_weights_are_for_plain_vllm(hub, tmp_path):
    hub.add(NAME, written(tmp_path / "repository", "pytorch_model.bin", "training_args.bin"))
    with pytest.raises(ConfigError, match=f"^{NAME} has no weights to load .early exits read weights as safetensors.$"):
        fetch_model(NAME, Origin(), nothing)
    assert "pytorch_model.bin" not in hub.downloaded()
    fetch_model(NAME, Origin(with_exits=False), nothing)
    assert hub.downloaded() == ["config.json", "pytorch_model.bin"]


def test_a_model_that_exits_cannot_serve_is_refused_before_its_weights(hub, tmp_path):
    hub.add(NAME, written(tmp_path / "repository", "model.safetensors", architectures=["GemmaForCausalLM"]))
    with pytest.raises(UnsupportedModelError, match="do not support architecture GemmaForCausalLM"):
        fetch_model(NAME, Origin(), lambda folder: void(early_exit_architecture(architecture_of(folder))))
    assert hub.downloaded() == ["config.json"]


def test_a_model_that_no_ramps_are_for_is_refused_before_its_weights(hub, tmp_path):
    hub.add(NAME, written(tmp_path / "repository", "model.safetensors"))
    check = partial(preflight_config, parse_config({}))
    with pytest.raises(
        RampError, match=f"^no shipped ramps fit {NAME} .it is no sibling of .*: its num_hidden_layers is 4, not"
    ):
        fetch_model(NAME, Origin(), check)
    assert hub.downloaded() == ["config.json"]
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}  # SmolLM2-135M's
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    hub.add(NAME, written(tmp_path / "other", "model.safetensors", **shape), revision="other")
    fetch_model(NAME, Origin(revision="other"), check)
    assert "model.safetensors" in hub.downloaded()


def void(value):
    """Nothing, of a check that says something."""


def fails(hub, how, offline):
    if how == "offline":
        offline()
    elif how == "stopped":
        hub.stop()
    elif isinstance(how, int):
        hub.fails_with = how


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("org/none", None, "org/none: no such folder, and no such model on URL, or a private one"),
        ("org/gated", None, "org/gated is gated: ask for access at URL/org/gated, then set HF_TOKEN"),
        (NAME, 500, f"{NAME}: URL answers HTTP 500"),
        (NAME, 403, f"{NAME}: URL answers HTTP 403: is the token right"),
        (NAME, "stopped", f"{NAME}: no such folder, not complete in the cache CACHE, and URL cannot be reached"),
        (NAME, "offline", f"{NAME}: no such folder, not complete in the cache CACHE, and HF_HUB_OFFLINE"),
        ("org/a--b", None, "Cannot have -- or .. in repo_id"),
        ("org/empty", None, "org/empty has no config.json; if it has GGUF files, name one: org/empty:Q4_K_M"),
    ],
)
def test_one_line_says_why_a_model_cannot_be_had(name, how, says, hub, model, offline, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    hub.add("org/empty", tmp_path / "empty")
    hub.add(NAME, model)
    hub.add("org/gated", model)
    hub.gated.add("org/gated")
    fails(hub, how, offline)
    with pytest.raises(ConfigError) as raised:
        fetch_model(name, Origin(), nothing)
    expected = says.replace("URL", hub.url).replace("CACHE", str(tmp_path / "cache"))
    assert expected in str(raised.value) and "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("given", ["flag", "environment", "file"])
def test_the_token_opens_a_gated_model(given, hub, model, monkeypatch, tmp_path):
    hub.add(NAME, model)
    hub.gated.add(NAME)
    if given == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    elif given == "file":
        (tmp_path / "token").write_text(TOKEN)
    fetch_model(NAME, Origin(hf_token=TOKEN if given == "flag" else None), nothing)
    assert hub.tokens == {TOKEN}


def test_a_wrong_token_is_not_repeated(hub, model):
    hub.add(NAME, model)
    hub.gated.add(NAME)
    with pytest.raises(ConfigError, match="is gated") as raised:
        fetch_model(NAME, Origin(hf_token="hf_wrong"), nothing)
    assert "hf_wrong" not in str(raised.value)


def test_one_gguf_file_is_chosen_by_its_kind(hub, tmp_path):
    folder = tmp_path / "repository"
    written(folder, "tiny-q4_k_m.gguf", "tiny-Q4_K_S.gguf", "tiny.F16.gguf", "other.F16.gguf", "UD-Q4_K_M.txt")
    hub.add(NAME, folder)
    assert fetch_gguf(NAME, "Q4_K_M", Origin()).name == "tiny-q4_k_m.gguf"
    assert hub.downloaded() == ["tiny-q4_k_m.gguf"]
    for kind, files in (("Q8_0", "none"), ("Q4_K", "none"), ("F16", "other.F16.gguf, tiny.F16.gguf")):
        with pytest.raises(ConfigError, match=f"^{NAME}:{kind}: one GGUF file named so is wanted, got {files}$"):
            fetch_gguf(NAME, kind, Origin())


def test_a_folder_here_goes_before_a_name_on_the_hub(hub, model, tmp_path, monkeypatch):
    hub.add(NAME, model)
    monkeypatch.chdir(tmp_path)
    assert model_name(model_folder(NAME)) == model_name(model_folder(NAME + "/")) == NAME
    (tmp_path / NAME).mkdir(parents=True)
    assert model_folder(NAME) == model_folder(f"./{NAME}/") == Path(NAME)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_folder(f"~/{NAME}") == tmp_path / NAME


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/nowhere/at/all", "model folder not found: /nowhere/at/all"),
        ("./org/model", "model folder not found: ./org/model"),
        ("~/org/model", "model folder not found: ~/org/model"),
        ("a/b/c", "model folder not found: a/b/c"),
        ("", "model folder not found: "),
        ("org/model.gguf", "model file not found: org/model.gguf"),
    ],
)
def test_what_is_no_name_is_not_asked_for(name, says, hub):
    for find in (model_folder, folder_here):
        with pytest.raises(ConfigError) as raised:
            find(name)
        assert str(raised.value) == says
    assert hub.asked == []


def test_a_revision_of_a_folder_is_refused(hub, model):
    hub.add(NAME, model)
    assert model_name(model_of(Namespace(model=NAME, revision="main"))) == NAME
    for given in (str(model), None):
        with pytest.raises(ConfigError, match=r"^--revision is of a model on the hub, and "):
            model_of(Namespace(model=given, revision="main"))


def test_a_hub_s_model_has_its_name_and_any_other_its_folder_s():
    assert model_name(Path("/c/models--org--a-b/snapshots/0123")) == "org/a-b"
    assert model_name(Path("/c/models--gpt2/snapshots/0123")) == "gpt2"
    assert model_name(Path("/srv/snapshots/mine")) == "mine"


@pytest.mark.parametrize(
    ("flags", "origin"),
    [
        ([], Origin()),
        (
            ["--rev", "v1", "--download_dir=/d", "--hf-token", "hf_x", "--load-format=hf"],
            Origin(revision="v1", download_dir="/d", hf_token="hf_x", load_format="hf"),
        ),
        (["--hf-token", "--seed", "3"], Origin(hf_token=True)),
        (["--hf-token"], Origin(hf_token=True)),
    ],
)
def test_serve_takes_vllms_own_flags(flags, origin):
    assert origin_of(parse_config({}), normalised(flags)) == origin
    assert not origin_of(parse_config({"policy": "off"}), []).with_exits
    assert origin_of(parse_config({"policy": "off"}), [], "int8") == Origin(load_format="hf")


def run(*arguments: str, hub: Hub, home: Path, offline="0", **kwargs):
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline}
    command = [sys.executable, "-m", "apparate_llm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, **kwargs)


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "org/none", "--policy", "off", "--port", "0"],
        ["prepare", "org/none", "--out", "OUT"],
        ["ramps", "evaluate", "RAMPS", "--model", "org/none", "--prompts", "PROMPTS"],
        ["ramps", "calibrate", "RAMPS", "--model", "org/none", "--prompts", "PROMPTS"],
        ["ramps", "verify", "RAMPS", "--model", "org/none", "--prompts", "PROMPTS"],
        ["eval", "quick", "org/none"],
        ["eval", "tpt", "org/none", "--out", "OUT"],
        ["eval", "drift", "org/none", "--out", "OUT"],
        ["eval", "steady", "org/none", "--out", "OUT"],
        ["tune", "org/none"],
        ["quantize", "org/none", "--out", "OUT"],
        ["serve", "org/none", "--weights", "int8", "--policy", "off", "--port", "0"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_looks_a_name_up_and_says_one_line(command, hub, tmp_path, lens_ramps):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n')
    places = {"OUT": tmp_path / "out", "RAMPS": lens_ramps(), "PROMPTS": tmp_path / "prompts.jsonl"}
    done = run(*(str(places.get(part, part)) for part in command), hub=hub, home=tmp_path / "home")
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Note: ")]  # of this machine's CPU
    assert len(lines) == 1 and f"org/none: no such folder, and no such model on {hub.url}" in lines[0]
    assert done.stdout == "" and ("GET", "/api/models/org/none/revision/main") in hub.asked


def test_a_disk_that_is_full_is_one_line(hub, model, tmp_path):
    """Here no file may become longer than this."""
    (model / "model.safetensors").write_bytes(b"x" * 100_000)
    hub.add(NAME, model)
    done = run(
        *("prepare", NAME, "--out", str(tmp_path / "out")),
        hub=hub,
        home=tmp_path / "home",
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"apparate-llm: error: cannot write {NAME} to {tmp_path / 'home' / 'hub'}: File too large\n"
