"""`scripts.keep_result` and the tables that are made of what it keeps."""

import json
from pathlib import Path

import pytest

from apparate_llm.eval.schema import Results, SteadyLevel, SteadyRatio, SteadyResults, SteadyRun
from apparate_llm.eval.tables import DASH
from scripts import keep_result, kept, other_tables, results_table
from scripts.keep_result import kept_form, without_folders
from scripts.results_table import made
from tests.eval_results import a_ratio, a_result, a_run, with_exits

HERE = Path("results")


def cells(line: str) -> list[str]:
    return line.strip("|").replace(DASH, "-").split("|")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for module in (keep_result, kept, other_tables, results_table):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    kept.measured.cache_clear()
    yield tmp_path
    kept.measured.cache_clear()


def keep(folder: Path, name: str, results: Results | SteadyResults) -> None:
    (folder / name).write_text(results.model_dump_json())


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("apparate-llm eval tpt /home/me/models/qwen --out /tmp/out/", "apparate-llm eval tpt qwen --out out"),
        ("'llama.cpp bf16=/tmp/a/b-bf16.gguf --spec-type x'", "'llama.cpp bf16=b-bf16.gguf --spec-type x'"),
        ("VAR=/usr/lib/x.so python -m a", "VAR=x.so python -m a"),
        ("http://127.0.0.1:8000/v1/models", "http://127.0.0.1:8000/v1/models"),
        ("2 requests/s, TPT / plain, prompts/code.jsonl", "2 requests/s, TPT / plain, prompts/code.jsonl"),
    ],
)
def test_a_kept_result_names_no_folder(text, left):
    assert without_folders({"command": [text], "n": 1.5}) == {"command": [left], "n": 1.5}


def test_a_result_that_failed_or_hides_its_command_is_not_kept():
    good = {"command": "apparate-llm eval tpt", "runs": [{"system": "a", "failed": 0}], "skipped": {}}
    assert kept_form(good) == good
    with pytest.raises(ValueError, match=r"requests failed: \{'a': 2\}"):
        kept_form(good | {"runs": [{"system": "a", "failed": 2}]})
    with pytest.raises(ValueError, match=r"requests failed: \{'b': 1\}"):
        kept_form({"command": "apparate-llm eval steady", "levels": [{"runs": [{"system": "b", "failed": 1}]}]})
    with pytest.raises(ValueError, match=r"systems were skipped: \{'suffix': 'not installed'\}"):
        kept_form(good | {"skipped": {"suffix": "not installed"}})
    with pytest.raises(ValueError, match="must hold its command"):
        kept_form([good])


def test_a_result_is_kept_under_its_name(folder, monkeypatch, capsys):
    out = folder / "out"
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"command": "apparate-llm eval tpt /a/b/model", "runs": []}))
    monkeypatch.setattr("sys.argv", ["keep_result", str(out), "new"])
    assert keep_result.main() == 0
    assert json.loads((folder / "new.json").read_text())["command"] == "apparate-llm eval tpt model"
    monkeypatch.setattr("sys.argv", ["keep_result", str(folder / "gone"), "new"])
    assert keep_result.main() == 2 and "cannot keep" in capsys.readouterr().err


def test_a_cell_is_over_the_baseline_that_its_column_names(folder):
    runs = [a_run(system, n) for n in (1, 4) for system in ("vllm-tuned", "llama.cpp bf16")]
    runs += [with_exits(system, n, tpt=20.0 + n) for n in (1, 4) for system in ("lossless", "early-exit-0.05")]
    ratios = [
        a_ratio(system, n, tpt=tpt, baseline=baseline)
        for n in (1, 4)
        for system, baseline, tpt in (
            ("lossless", "vllm-tuned", 0.5),
            ("lossless", "llama.cpp bf16", 0.7),
            ("early-exit-0.05", "lossless", 0.9),
            ("early-exit-0.05", "vllm-tuned", 0.45),
            ("llama.cpp bf16", "vllm-tuned", 0.8),
        )
    ]
    keep(folder, "tpt-smollm2-spec-bench.json", a_result(runs, ratios))
    head, _, one, four = [cells(line) for line in made("tpt", HERE).splitlines()]
    assert head[2:] == ["lossless, ms", "/ plain vLLM", "/ llama.cpp, same precision", "/ llama.cpp Q4_0, n-gram",
                        "bound 0.05 / lossless"]  # fmt: skip
    assert one[:3] == ["[SmolLM2-135M, Spec-Bench](results/tpt-smollm2-spec-bench.json)", "1 client", "21.0"]
    assert four[1:3] == ["4 clients", "24.0"]
    assert [cell.split()[0] for cell in one[3:]] == ["0.50", "0.70", "-", "0.90"]
    (row,) = [line for line in made("readme", HERE).splitlines() if "1 client" in line]
    assert [cell.split()[0] for cell in cells(row)[2:]] == ["0.50", "0.45", "-", "0.80"]


def test_many_clients_have_their_throughput_and_p99_over_both_peers(folder):
    systems = ("vllm-tuned", "lossless", "llama.cpp bf16")
    runs = [SteadyRun(system=name, failed=0, output_tokens_per_s=9.0, tpt_by_turn_ms=[1.0]) for name in systems]
    ratios = [
        SteadyRatio(system="lossless", baseline=name, tpt=0.9, tpt_ci95=None, throughput=rate, throughput_ci95=(1, 2),
                    tpt_mean=0.91, tpt_mean_ci95=(0.9, 0.92), tpt_p99=0.8)
        for name, rate in (("vllm-tuned", 1.1), ("llama.cpp bf16", 1.4))
    ]  # fmt: skip
    keep(folder, "steady-qwen-code.json", SteadyResults(
        command="apparate-llm eval steady", commit=None, started="2026-01-01", machine={}, settings={}, systems={},
        levels=[SteadyLevel(clients=16, runs=runs, ratios=ratios)],
    ))  # fmt: skip
    *_, row = made("many-clients", HERE).splitlines()
    assert cells(row)[1:] == [
        "16 clients", "1.10 (1.00-2.00)", "0.91 (0.90-0.92)", "0.80 (-)", "1.40 (1.00-2.00)", "0.91 (0.90-0.92)",
        "0.80 (-)",
    ]  # fmt: skip


def test_texts_targets_and_shares_have_a_row_for_each_system(folder):
    same = {"same_as_off_frac": 1.0}
    keep(folder, "texts-qwen.json", a_result([a_run("off"), a_run("off", 4), with_exits("lossless", 1, **same),
                                              with_exits("lossless", 4, **same)]))  # fmt: skip
    rows = made("texts", HERE).splitlines()
    assert [cells(row)[1:] for row in rows[2:]] == [["lossless", "100.0", "100.0"]]
    keep(
        folder, "targets-smollm2.json", a_result([a_run(), with_exits("target 7 ms", tpt=6.9, within_target_frac=0.8)])
    )
    assert made("targets", HERE).splitlines()[2:] == [
        "|[SmolLM2-135M](results/targets-smollm2.json)|target 7 ms|6.9|80.0|0.0|"
    ]
    steps = [a_ratio("+threads", tpt=0.5, baseline="vllm"), a_ratio("+exits", tpt=0.5, baseline="+threads")]
    keep(folder, "shares-qwen.json", a_result([a_run()], steps=steps))
    assert [cells(row)[-1] for row in made("shares", HERE).splitlines()[2:]] == ["50.0"] * 2


def test_a_pass_stands_beside_the_time_that_its_weights_take_to_be_read(folder):
    line, read = {"ms": 6.0, "calls": 1.0}, {"worker: blocks": 30e6, "worker: lm_head": 10e6}
    results = [
        {"batch": rows, "lines": {"worker: blocks": line, "worker: lm_head": {"ms": 2.0, "calls": 1.0}},
         "bytes_per_call": read, "bytes_per_ms": 10e6}
        for rows in (1, 2, 4, 8)
    ]  # fmt: skip
    (folder / "passes-qwen.json").write_text(json.dumps({"results": results}))
    assert made("passes", HERE).splitlines()[2].endswith("|8.0 (2.00)|8.0 (2.00)|8.0 (2.00)|8.0 (2.00)|")


def test_an_int8_model_has_its_agreement(folder):
    agreement = {"num_prompts": 9, "num_tokens": 900, "same_frac": 0.97, "kl_nats": 0.0123}
    (folder / "int8-qwen.json").write_text(json.dumps({"agreement": agreement}))
    assert made("int8", HERE).splitlines()[2].endswith("|900|97.0|0.0123|")


def test_a_replay_has_each_policys_fastest_setting_and_the_oracle_beside_lossless(folder):
    rows = [
        {"policy": policy, "accuracy_bound": bound, "tpt_ratio": ratio, "regret_nats_per_token": nats}
        for policy, bound, ratio, nats in (
            ("adaptive", 0.0, 0.63, 0.0), ("oracle", 0.0, 0.56, 0.0), ("adaptive", 0.05, 0.594, 0.0328),
            ("static", 0.05, 0.7, 0.5), ("static", 0.05, 0.612, 0.132), ("static", 0.05, 0.9, 0.01),
            ("apparate", 0.05, 0.859, 0.1426),
        )
    ]  # fmt: skip
    (folder / "replay-smollm2.json").write_text(json.dumps({"rows": rows}))
    head, _, lossless, bound = [cells(line) for line in made("replay", HERE).splitlines()]
    assert len(head) == len(lossless) == len(bound)
    assert lossless[1:] == ["0", "0.630", "-", "-", "0.560", "0.0000", "-", "-"]
    assert bound[1:] == ["0.05", "0.594", "0.612", "0.859", "-", "0.0328", "0.1320", "0.1426"]


def test_a_table_without_a_kept_result_has_no_rows(folder):
    assert {made(name, HERE) for name in (*results_table.TABLES, *other_tables.OTHERS)} == {""}
