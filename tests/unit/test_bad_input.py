"""Wrong input of every command ends it with one line that says what is wrong, and exit code 2."""

import json

import pytest

from apparate_llm.cli import main
from apparate_llm.eval.store import Store
from apparate_llm.sealed import COMPLETE, is_complete
from tests.eval_results import full_result
from tests.unit.test_replay import log_file


def refused(argv, capsys):
    """The one line that a command ends with."""
    try:
        code = main(list(map(str, argv)))
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, f"{code}: {error}"
    assert "error: " in error and "Traceback" not in error
    return error


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
