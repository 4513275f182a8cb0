"""Wrong input of every command ends it with one line that says what is wrong, and exit code 2."""

import json
import re
import shutil

import pytest
from safetensors import SafetensorError

from apparate_llm import launch
from apparate_llm.cli import main
from apparate_llm.eval.store import Store
from apparate_llm.host.choice import OWN_PROCESS
from apparate_llm.ramps.checkpoint import MANIFEST, WEIGHTS
from apparate_llm.sealed import COMPLETE, is_complete
from tests.eval_results import full_result
from tests.unit.test_replay import log_file

TIME = re.compile(r"\d\d:\d\d:\d\d  ")  # begins a line on progress


def refused(argv, capsys):
    """The one line that a command ends with."""
    try:
        code = main(list(map(str, argv)))
    except SystemExit as ended:
        code = ended.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not TIME.match(line)]
    assert code == 2 and len(lines) == 1 and "error: " in lines[0], f"{code}: {lines}"
    return lines[0]


@pytest.fixture
def log(tmp_path):
    return log_file(tmp_path / "log.jsonl", 8)


# ---- files that are written at the end

WRITING = {
    "quick": "eval quick {model} --json {out}",
    "evaluate": "ramps evaluate {ramps} --model {model} --prompts quick --json {out}",
    "verify": "ramps verify {ramps} --model {model} --json {out}",
    "tune": "tune {model} --json {out}",
    "replay": "replay {log} --json {out}",
    "figure": "replay {log} --figure {out}",
    "quantize": "quantize {model} --out {new} --json {out}",
}


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere/out.png", "folder not found: "),
        ("folder.png", "must be a file, "),
        ("/dev/null", "must be a file, /dev/null is none"),
        ("/proc/out.png", "cannot write to /proc"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_before_the_work(
    name, place, says, tiny_llama, lens_ramps, log, tmp_path, capsys
):
    (tmp_path / "folder.png").mkdir()
    places = {"model": tiny_llama, "ramps": lens_ramps(), "log": log, "out": tmp_path / place, "new": tmp_path / "new"}
    error = refused(WRITING[name].format(**places).split(), capsys)
    assert f"--{'figure' if name == 'figure' else 'json'}: {says}" in error
    assert not (tmp_path / "new").exists()


def test_a_figure_of_an_unknown_kind_is_refused_before_the_work(log, tmp_path, capsys):
    for name in ("figure", "figure.txt"):
        assert "--figure: must end in .png, .svg, .pdf, got" in refused(
            ["replay", log, "--figure", tmp_path / name], capsys
        )


# ---- numbers

NUMBERS = {
    "prepare --out x --tokens": "0 -1 1.5 9999999999999 \u00b2",
    "prepare --out x --time-budget": "0m -5m 45 9999999999h",
    "prepare --out x --seed": "-1 4294967296 1.5",
    "prepare --out x --ramp-vocab": "0",
    "ramps evaluate x --prompts quick --max-tokens": "0 -1",
    "ramps calibrate x --prompts quick --max-tokens": "0 many",
    "ramps verify x --max-tokens": "0",
    "ramps verify x --concurrency": "0 1,-4 ,",
    "quantize x --out y --measure-s": "-1 nan inf",
    "tune --seconds": "0 -1 nan",
    "tune --clients": "0 1,",
    "tune --start-timeout-s": "0",
    "demo --repeat": "1 -2",
    "demo --max-tokens": "0 15",
    "demo --accuracy-bound": "1 -0.1 nan",
    "eval quick --concurrency": "0",
    "eval quick --num-prompts": "0 -3",
    "eval quick --accuracy-bound": "1 -1 nan",
    "eval tpt --out x --rate": "0 -1 nan inf 1,0 1e-320 1e300",
    "eval tpt --out x --slice-s": "0 1e-320",
    "eval tpt --out x --trace-scale": "-1 1e308",
    "eval tpt --out x --num-requests": "0",
    "eval tpt --out x --seed": "-1",
    "eval tpt --out x --sampling-seed": "-1",
    "eval tpt --out x --temperature": "-1 3 nan",
    "eval tpt --out x --prompt-tokens": "0",
    "eval tpt --out x --hf-layer": "0",
    "eval tpt --out x --slo": "tpt=-1 tpt=0 tpt",
    "eval tpt --out x --accuracy-bounds": "1 , 0.1,-1",
    "eval tpt --out x --max-exits": "0 17 -1",
    "eval tpt --out x --depth": "-1",
    "eval drift --out x --clients": "0",
    "eval steady --out x --turns": "0",
    "eval steady --out x --turn-s": "0 -1 nan",
    "eval steady --out x --learn-s": "-1",
    "eval steady --out x --limit": "0",
    "replay --accuracy-bound": "1 -1",
    "replay --max-exits": "0",
}


@pytest.mark.parametrize(
    ("command", "value"), [(command, value) for command, values in NUMBERS.items() for value in values.split()]
)
def test_a_number_that_is_not_allowed_is_refused_with_its_flag(command, value, capsys):
    argv = [*command.split(), value]
    assert argv[-2] in refused(argv, capsys)


# ---- what an evaluation left


@pytest.fixture
def evaluated(tmp_path):
    """The folder of an evaluation, with no block in it."""
    folder = tmp_path / "evaluated"
    Store(folder).open({"loads": [["1 client", False]]}, fresh=False)
    (folder / "results.json").write_text(full_result().model_dump_json())
    return folder


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("results.json", "{", "results must be JSON"),
        ("results.json", "[]", "results must be an object, got list"),
        ("plan.json", "{", "damaged "),
        ("plan.json", "[]", "an object is expected, got list"),
        ("plan.json", '{"loads": 3}', "`loads` must be a list of pairs"),
        ("plan.json", "{}", "`loads` must be a list of pairs"),
        ("blocks/00.json", "", "damaged "),
        ("blocks/00.json", "[1]", "an object is expected, got list"),
        ("blocks/00.json", '{"key": 3}', "damaged "),
        ("blocks/00.json", '{"key": {"load": "0", "repeat": 0, "block": 0, "system": "vllm"}}', "a key of "),
        ("blocks/00.json", '{"key": {"load": 0, "repeat": 0, "block": 0, "system": "vllm"}}', "KeyError: 'counts'"),
    ],
)
def test_a_damaged_file_of_an_evaluation_is_named(name, text, says, evaluated, capsys):
    (evaluated / name).write_text(text)
    error = refused(["eval", "report", evaluated], capsys)
    assert str(evaluated / name) in error and says in error


def test_a_block_of_a_load_that_the_plan_does_not_have_is_told(evaluated, capsys):
    key = {"load": 3, "repeat": 0, "block": 0, "system": "vllm"}
    figures = dict.fromkeys(("wall_s", "cpu_s", "energy_j", "peak_memory_gib", "probe_ms", "stolen_frac"), 1.0)
    (evaluated / "blocks" / "00.json").write_text(
        json.dumps({"key": key, "completions": [], "counts": None, **figures})
    )
    assert "a block is of load 3, and plan.json has 1" in refused(["eval", "report", evaluated], capsys)


def test_a_report_is_of_a_folder(evaluated, capsys):
    assert "no folder of an evaluation" in refused(["eval", "report", evaluated / "results.json"], capsys)


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_going_on_with_a_damaged_plan_names_it(text, evaluated, tiny_llama, capsys):
    (evaluated / "plan.json").write_text(text)
    argv = ["eval", "tpt", tiny_llama, "--out", evaluated, "--systems", "vllm", "--prompts", "quick"]
    assert f"damaged {evaluated / 'plan.json'}" in refused(argv, capsys)


@pytest.mark.parametrize("text", ["{", "[1]", "3", '{"a": {}}'])
def test_a_folder_with_a_damaged_list_of_its_files_is_not_complete(text, tmp_path):
    (tmp_path / COMPLETE).write_text(text)
    assert not is_complete(tmp_path)


# ---- ramps


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training": {"answer_tokens": "many"}}, "training: "),
        ({"training": {"depths": [1]}}, "training: "),
        ({"training": {"depths": {"3": [1]}}}, "training: "),
        ({"training": {"depths": {"3": {"held_out_acceptance_rates": 3}}}}, "training: "),
        ({"training": {"depths": {"3": {"held_out_calibration_error": "x"}}}}, "training: "),
        ({"training": 3}, "training: "),
        ({"depths": [3, 99], "calibration": {"3": [[1, 0]], "99": [[1, 0]]}}, "a ramp at depth 99 (allowed: 0 to 4)"),
        ({"depths": [-1], "default_depth": -1, "calibration": {"-1": [[1, 0]]}}, "a ramp at depth -1"),
        ({"depths": []}, "depths: "),
        ({"default_depth": 2}, "default depth 2 not in [3]"),
        ({"kind": "other"}, "kind: "),
        ({"more": 1}, "more: "),
    ],
)
def test_a_damaged_manifest_is_named(changes, says, lens_ramps, tmp_path, capsys):
    ramps = shutil.copytree(lens_ramps("llama", 3), tmp_path / "ramps")
    manifest = json.loads((ramps / MANIFEST).read_text())
    (ramps / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    error = refused(["ramps", "show", ramps], capsys)
    assert f"damaged {ramps / MANIFEST}: {says}" in error


def test_what_ramps_were_trained_on_may_be_unknown(lens_ramps, tmp_path, capsys):
    ramps = shutil.copytree(lens_ramps("llama", 3), tmp_path / "ramps")
    manifest = json.loads((ramps / MANIFEST).read_text())
    (ramps / MANIFEST).write_text(json.dumps({**manifest, "training": {"answer_tokens": 1234}}))
    assert main(["ramps", "show", str(ramps)]) == 0
    assert "trained on 1,234 answer tokens; unknown data" in capsys.readouterr().out


ON_RAMPS = {
    "show": "ramps show {ramps}",
    "evaluate": "ramps evaluate {ramps} --model {model} --prompts {prompts}",
    "calibrate": "ramps calibrate {ramps} --model {model} --prompts {prompts}",
    "verify": "ramps verify {ramps} --model {model} --prompts {prompts}",
}


@pytest.mark.parametrize("name", ON_RAMPS)
@pytest.mark.parametrize("what", ["missing", "a file", "empty", "no JSON", "weights cut off"])
def test_a_folder_without_sound_ramps_is_told(name, what, lens_ramps, tiny_llama, tmp_path, capsys):
    ramps = tmp_path / "ramps"
    if what == "a file":
        ramps.write_text("x")
    elif what == "empty":
        ramps.mkdir()
    elif what != "missing":
        shutil.copytree(lens_ramps(), ramps)
        if what == "no JSON":
            (ramps / MANIFEST).write_text("{")
        else:
            (ramps / WEIGHTS).write_bytes((ramps / WEIGHTS).read_bytes()[:-8])
    argv = ON_RAMPS[name].format(ramps=ramps, model=tiny_llama, prompts="quick").split()
    assert str(ramps) in refused(argv, capsys)


# ---- prompts


@pytest.mark.parametrize("name", ["evaluate", "calibrate", "verify"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read prompts "),
        ("", "no prompts in "),
        ('{"prompt": "a"}\n{"prompt": 3}\n', ":2: the prompt must be a text"),
        ('{"prompt": "a"}\n{"messages": [{"role": "user", "content": 3}]}\n', ":2: a content must be a text"),
        ('{"prompt": "a"}\n{', ":2: not JSON"),
        ("\xff", "cannot read prompts "),
    ],
)
def test_prompts_that_are_none_are_told_by_the_commands_on_ramps(
    name, text, says, lens_ramps, tiny_llama, tmp_path, capsys
):
    prompts = tmp_path / "prompts.jsonl"
    if text is not None:
        prompts.write_bytes(text.encode("latin-1"))
    argv = ON_RAMPS[name].format(ramps=lens_ramps(), model=tiny_llama, prompts=prompts).split()
    error = refused(argv, capsys)
    assert str(prompts) in error and says in error


@pytest.mark.parametrize(
    "command",
    [
        "prepare {model} --out {out} --prompts {prompts}",
        "eval quick {model} --prompts {prompts}",
        "eval tpt {model} --out {out} --prompts {prompts}",
        "eval drift {model} --out {out} --workloads chat,{prompts}",
        "eval steady {model} --out {out} --prompts {prompts}",
        "tune {model} --policy off --prompts {prompts}",
    ],
)
def test_prompts_of_a_wrong_type_are_told_by_every_other_command(
    command, tiny_llama, zentorch, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(OWN_PROCESS)  # of tests: by hand, `tune` refuses it
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": ["b"]}\n')
    argv = command.format(model=tiny_llama, out=tmp_path / "out", prompts=prompts).split()
    assert f"{prompts}:2: the prompt must be a text" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()


# ---- models and folders

ON_MODELS = {
    "prepare": "prepare {model} --out {out}",
    "quantize": "quantize {model} --out {out}",
    "tune": "tune {model}",
    "demo": "demo --model {model}",
    "quick": "eval quick {model}",
    "tpt": "eval tpt {model} --out {out} --systems vllm,lossless",
    "steady": "eval steady {model} --out {out}",
    "evaluate": "ramps evaluate {ramps} --model {model} --prompts quick",
    "verify": "ramps verify {ramps} --model {model}",
}


@pytest.fixture
def no_restart(monkeypatch):
    """Commands that start themselves anew, with libraries preloaded, go on in this process."""
    monkeypatch.setattr(launch, "reexec_with_libraries", lambda extra=None: None)


@pytest.mark.parametrize("name", ON_MODELS)
@pytest.mark.parametrize("what", ["missing", "a file", "empty", "no JSON", "a list", "no architecture", "cut off"])
def test_a_folder_without_a_sound_model_is_told(name, what, lens_ramps, tiny_llama, no_restart, tmp_path, capsys):
    if what == "cut off" and name in ("tpt", "steady", "tune"):
        pytest.skip("plain vLLM is to tell")
    model, out = tmp_path / "a" / "b" / "model", tmp_path / "out"
    if what == "a file":
        model.parent.mkdir(parents=True)
        model.write_text("no model")
    elif what == "empty":
        model.mkdir(parents=True)
    elif what != "missing":
        shutil.copytree(tiny_llama, model)
        texts = {"no JSON": "{", "a list": "[1]", "no architecture": "{}"}
        if what in texts:
            (model / "config.json").write_text(texts[what])
        else:
            weights = model / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
    argv = ON_MODELS[name].format(model=model, out=out, ramps=lens_ramps()).split()
    assert str(model) in refused(argv, capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    "command",
    [
        "prepare {model} --out {out}",
        "eval tpt {model} --out {out} --systems vllm",
        "eval drift {model} --out {out}",
        "eval steady {model} --out {out}",
        "eval quick {model} --policy off --logs {out}",
        "tune {model} --policy off --logs {out}",
    ],
)
@pytest.mark.parametrize("place", ["file", "file/out", "file/a/b"])
def test_a_file_in_the_place_of_a_folder_is_told(command, place, tiny_llama, no_restart, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    error = refused(command.format(model=tiny_llama, out=tmp_path / place).split(), capsys)
    assert f" must be a folder, {tmp_path / 'file'} is a file" in error
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("command", ["prepare {model} --out {out}", "eval tpt {model} --out {out} --systems vllm"])
def test_an_out_that_cannot_be_written_is_told(command, tiny_llama, no_restart, capsys):
    assert "/proc/nowhere" in refused(command.format(model=tiny_llama, out="/proc/nowhere").split(), capsys)


def test_depths_that_the_model_does_not_have_are_told(tiny_llama, no_restart, tmp_path, capsys):
    for depths in ("4", "-1", "0,0", "0,00", "1.5", "", "all"):
        argv = ["prepare", tiny_llama, "--out", tmp_path / "out", f"--depths={depths}"]
        assert "--depths must be auto or different numbers from 0 to 3" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()


def test_layers_of_another_shape_cannot_be_quantised(tiny_llama, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][0].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    error = refused(["quantize", model, "--out", tmp_path / "new"], capsys)
    assert "model.layers.1.mlp.up_proj.weight has shape (64,), rows and columns" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_weights_that_cannot_be_written_are_told(tiny_llama, tmp_path, monkeypatch, capsys):
    import safetensors.torch

    def full(*args, **settings):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    error = refused(["quantize", tiny_llama, "--out", tmp_path / "new"], capsys)
    assert "cannot write " in error and "No space left on device" in error
    assert list(tmp_path.iterdir()) == []
