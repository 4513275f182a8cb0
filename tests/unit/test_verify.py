"""What a report says of predictions and of what was measured afterwards."""

import html
import io
import json
import os
import tempfile

import pytest
from rich.console import Console

from apparate_llm import machine
from apparate_llm.engine import vllm_settings
from apparate_llm.eval.client import Chunk, Completion
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.store import Block, BlockKey
from apparate_llm.prepare import verify as verify_module
from apparate_llm.prepare.profile import TURNS, profile
from apparate_llm.prepare.report import advice, write_pages
from apparate_llm.prepare.timings import Measurements, kept_in
from apparate_llm.prepare.verify import (
    SYSTEM,
    YOURS,
    chosen,
    compared,
    digest_of,
    measure,
    measured_from,
    store_in,
    systems_with,
    verify,
    verify_folder,
)
from apparate_llm.progress import Progress
from apparate_llm.ramps.checkpoint import read_manifest
from tests.tiny import build_fused_ramps


def ratio(value, low, high):
    return {"tpt_ratio": value, "ci95": [low, high]}


def depth(number, own=(0.5, 0.8, 0.9), users=(0.6, 0.95, 1.0)):
    names = ("1", "4", "16")
    predicted = {
        name: {
            **ratio(mine, mine - 0.1, mine + 0.1),
            "by_kind": {"open": ratio(mine, mine - 0.1, mine + 0.1)},
            "users": ratio(theirs, round(theirs - 0.05, 2), round(theirs + 0.05, 2)),
        }
        for name, mine, theirs in zip(names, own, users, strict=True)
    }
    return {
        "depth": number,
        "positions": [{"position": i, "acceptance_rate": 0.7, "rows": 10} for i in range(4)],
        "accepted_per_step": 1.8,
        "calibration_error": 0.01,
        "reliability": [(0.5, 0.5, 10)],
        "coverage": [(0.5, 0.01)],
        "by_kind": {"open": 0.6, "code": 0.7},
        "vocabulary_coverage": 0.9,
        "predicted": predicted,
    }


def report():
    depths = [depth(0), depth(2, users=(0.7, 0.99, 1.0))]
    costs = {"1": 10.0, "4": 12.0, "16": 20.0}
    profiled = {"verify_ms": costs, "draft_step_ms": {"0": costs, "2": costs}, "machine": {"cpu": "cpu", "cores": 2}}
    names = ("p_over_0.5_frac", "p_over_0.7_frac", "p_over_0.9_frac", "p_over_0.99_frac", "lookup_agreement")
    return {
        "model": "model",
        "base_model": {"architecture": "LlamaForCausalLM", "num_hidden_layers": 12},
        "answer_tokens": 1000,
        "ceiling": dict.fromkeys(names, 0.5),
        "profile": profiled,
        "predicted_for": {"own": "its own prompts", "users": "users' prompts"},
        "depths": depths,
        "advice": advice(depths),
    }


def test_the_advice_is_of_users_prompts_with_intervals_and_names_the_models_own_beside():
    recommendation = advice([depth(0), depth(2, users=(0.7, 0.99, 1.0))])
    assert recommendation["depth"] == 0
    assert recommendation["sentence"] == (
        "Use depth 0; on users' prompts expect about 40 % (35 to 45) lower TPT with 1 client, 5 % (0 to 10) with 4, "
        "0 % (-5 to 5) with 16; on prompts like its own 50 % (40 to 60) with 1 client. "
        "The gain is largest for code, smallest for open chat."
    )


def test_the_advice_speaks_of_the_prompts_that_were_given():
    assert "; on prompts like yours expect about 40 %" in advice([depth(0)], whose="prompts like yours")["sentence"]


def test_ramps_that_pay_on_the_models_own_prompts_only_do_not_pay():
    assert "do not pay" in advice([depth(0, users=(0.99, 1.0, 1.0))])["sentence"]


def test_a_measurement_outside_the_predicted_interval_is_said_plainly():
    measured = {"1": ratio(0.62, 0.5, 0.7), "4": ratio(1.1, 1.0, 1.2), "16": ratio(None, None, None)}
    predicted = {number: ratio(0.6, 0.55, 0.65) for number in measured}
    comparison = compared(predicted, measured, num_prompts=24, whose=YOURS, max_tokens=64)
    assert [item["within"] for item in comparison["clients"].values()] == [True, False, None]
    assert comparison["clients"]["1"]["off_frac"] == pytest.approx(0.62 / 0.6 - 1, abs=1e-4)
    assert comparison["clients"]["1"]["measured"] == measured["1"]
    assert comparison["sentence"] == (
        "Measured TPT with exits / plain vLLM on 24 of your prompts: 1 client: 0.62 (predicted 0.60, 0.55 to 0.65); "
        "4 clients: 1.10 (predicted 0.60, 0.55 to 0.65); 16 clients: nothing measured. "
        "Outside the predicted interval with 4 clients."
    )


def test_the_report_shows_the_measurement_beside_the_prediction(tmp_path, monkeypatch):
    """With the users' figures of the depth that is advised, in both files."""
    asked = {}

    def measure(model, ramps, prompts, clients, *, progress, max_tokens, keep):
        asked.update(ramps=ramps, prompts=prompts, threads=os.environ.get("OMP_NUM_THREADS"))
        return {str(number): ratio(0.61, 0.5, 0.7) for number in clients}

    monkeypatch.setattr(verify_module, "measure", measure)
    write_pages(tmp_path, report())
    assert "measured" not in (tmp_path / "report.html").read_text()
    document = verify(tmp_path, tmp_path, report(), progress=None, clients=(1, 4))
    assert asked["ramps"] == tmp_path and len(asked["prompts"]) == 16  # eval's own
    written = json.loads((tmp_path / "report.json").read_text())["verified"]
    assert written == json.loads(json.dumps(document["verified"]))
    assert written["clients"]["1"]["predicted"] == ratio(0.6, 0.55, 0.65) and written["clients"]["1"]["within"]
    assert not written["clients"]["4"]["within"]
    assert written["prompts_of"] == "eval's" and "on 16 of eval's prompts" in written["sentence"]
    page = (tmp_path / "report.html").read_text()
    assert written["sentence"] in html.unescape(page) and "0.61 (0.50 to 0.70)" in page
    assert "users&#39; prompts" in page or "users' prompts" in page


def test_blocks_of_a_verification_that_was_killed_count_for_the_same_ramps_and_prompts(
    tiny_llama, tmp_path, monkeypatch
):
    ramps = build_fused_ramps(tmp_path / "ramps", tiny_llama, depth=2)
    keep, asked = tmp_path / "work" / "verify", [Prompt([{"role": "user", "content": text}]) for text in ("a", "b")]
    done = Completion(prompt_index=0, started_s=0.0, text="an answer")
    block = Block(BlockKey(0, 0, 0, SYSTEM), [done], 1.0, None, None, None, None, 1.0, 0.0)

    def blocks_of(prompts, add=False):
        with store_in(keep, {"loads": [["1 client", False]], "asked": digest_of(ramps, prompts)}) as store:
            if add:
                store.add(block)
            return len(list(store.blocks()))

    assert blocks_of(asked, add=True) == 1 == blocks_of(asked)
    assert blocks_of(asked[:1]) == 0 == blocks_of(asked), "of others they were thrown away"
    assert digest_of(ramps, asked) != digest_of(build_fused_ramps(tmp_path / "b", tiny_llama, depth=2, seed=1), asked)
    (keep / "plan.json").unlink()
    assert blocks_of(asked) == 0, "of a start that ended before it had a plan"
    assert "content" not in (keep / "plan.json").read_text() and (keep / "blocks").stat().st_mode & 0o777 == 0o700
    with store_in(None, {}) as store:
        folder = store.folder
    assert not folder.exists()
    monkeypatch.setattr(tempfile, "TemporaryDirectory", None)
    assert blocks_of(asked) == 0, "a folder that is kept needs no other"


def test_blocks_count_for_one_machine_and_one_way_to_start_servers(tiny_llama, tmp_path, monkeypatch):
    ramps = build_fused_ramps(tmp_path / "ramps", tiny_llama, depth=2)

    def made_of():
        return measured_from([], 64, systems_with(tiny_llama, ramps))

    monkeypatch.setattr(vllm_settings, "is_cpu_build", lambda: True)
    known = made_of()
    assert [name.split()[0] for name in known["systems"]] == ["python", "python"] and "--ramps" in known["systems"][1]
    with monkeypatch.context() as changed:
        changed.setattr(vllm_settings, "available_memory_bytes", lambda: 3 << 30)
        assert made_of() == known, "what is free just then decides on the cache only"
        changed.setattr(verify_module, "context_length", lambda model: 99)
        assert made_of() != known
    assert made_of() == known
    for name, value in (("cpu_name", "another"), ("version", "9.9")):
        with monkeypatch.context() as changed:
            changed.setattr(machine, name, lambda *args, value=value: value)
            assert made_of() != known


def test_blocks_of_an_earlier_start_are_said_and_count_on_the_same_machine_only(tiny_llama, tmp_path, monkeypatch):
    ramps, there = build_fused_ramps(tmp_path / "ramps", tiny_llama, depth=2), []
    chunks = [Chunk(0.1, 1, 1), Chunk(0.2, 2, 2)]
    done = Completion(prompt_index=0, started_s=0.0, chunks=chunks, text="ab", output_tokens=2)

    def evaluate(evaluation, progress):
        there.append(sum(1 for _ in evaluation.store.blocks()))
        for system in evaluation.systems:
            evaluation.store.add(Block(BlockKey(0, 0, 0, system.name), [done], 1.0, None, None, None, None, 1.0, 0.0))

    monkeypatch.setattr("apparate_llm.eval.evaluate.evaluate", evaluate)

    def lines():
        log, asked = io.StringIO(), [Prompt([{"role": "user", "content": "a"}])]
        with Progress(Console(file=log, width=200)) as progress:
            ratios = measure(tiny_llama, ramps, asked, (1,), progress=progress, max_tokens=8, keep=tmp_path / "verify")
        assert ratios["1"]["tpt_ratio"] == 1.0
        return [line[10:] for line in log.getvalue().splitlines()]

    assert lines() == []
    assert lines() == ["verify: 2 blocks of requests count that an earlier start measured"]
    monkeypatch.setattr(machine, "cpu_name", lambda: "another")
    assert lines() == []
    assert there == [0, 2, 0]


def test_servers_do_not_get_the_threads_of_a_preparation(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with verify_module.servers_environment():
        assert "OMP_NUM_THREADS" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_servers_are_asked_what_the_model_could_be_asked(lens_ramps, tiny_llama, monkeypatch):
    ramps, asked = lens_ramps(), []

    def measure(model, ramps, prompts, clients, *, progress, max_tokens):
        asked.extend(prompts)
        return {}

    monkeypatch.setattr(verify_module, "_answered", lambda *args, **settings: ([], [0.5], prompts[::2]))
    monkeypatch.setattr(verify_module, "profile", lambda *args, **settings: {})
    monkeypatch.setattr(verify_module, "predict", lambda *args, **settings: {})
    monkeypatch.setattr(verify_module, "measure", measure)
    prompts = [Prompt([{"role": "user", "content": text}]) for text in ("a", "refused", "b")]
    with Progress(Console(quiet=True)) as progress:
        result = verify_folder(ramps, read_manifest(ramps), tiny_llama, prompts, whose=YOURS, progress=progress)
    assert asked == [prompts[0], prompts[2]] and result["num_prompts"] == 2 and result["prompts_of"] == YOURS


def test_few_prompts_stand_for_all():
    assert chosen(list(range(100))) == [n * 100 // 24 for n in range(24)]
    assert chosen(list(range(5))) == list(range(5))


def test_a_profile_says_how_far_its_medians_may_be_off():
    measured = Measurements(0.0)
    for turn in range(TURNS):
        for size in (1, 4):
            measured.add(("verify", size), [10.0 * size] * 5)
            measured.add(("draft_step", 0, size), [1.0 + turn] * 5)
            measured.add(("pass", size, 2 * size), [11.0 * size] * 5)
    costs = measured.result([0])
    assert costs["verify_ms"] == {"1": 10.0, "4": 40.0}
    assert costs["pass_ms"] == {"1": {"2": 11.0}, "4": {"8": 44.0}}
    assert costs["draft_step_ms"] == {"0": {"1": 1.0, "4": 1.0}}  # of the quietest turn
    assert costs["error_frac"]["verify"] == 0.0 and costs["error_frac"]["draft_step"] == 1.0
    assert costs["plain_frac"] == 1.0
    measured.add(("plain", 1), [11.5] * 5)
    assert measured.result([0])["plain_frac"] == 1.15
    assert costs["prompt_ms"] == {} and costs["error_frac"]["prompt"] > 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        "[3]",
        "{}",
        '{"turns": []}',
        '{"turns": [["verify", 1]], "spent_s": 1}',
        '{"turns": [[["verify", 1], [["x"]]]], "spent_s": 1}',
        '{"turns": [], "spent_s": "x"}',
    ],
)
def test_a_damaged_file_of_costs_is_named_before_anything_starts(text, tmp_path):
    keep = tmp_path / "turns.json"
    keep.write_text(text)
    with pytest.raises(ValueError, match=r"^damaged .*turns\.json: .*; delete it, and costs are measured anew$"):
        profile(tmp_path / "model", tmp_path / "ramps", (0,), enforce_eager=True, limit_s=1.0, keep=keep)


def test_what_was_measured_before_a_kill_is_not_measured_again(tmp_path):
    keep = tmp_path / "turns.json"
    measured = Measurements(0.0, keep=keep)
    measured.add(("verify", 1), [10.0] * 5)
    measured.add(("draft_step", 0, 1), [1.0] * 5)
    measured.keep()
    measured.add(("verify", 4), [20.0] * 5)  # of a size that was not finished
    assert keep.stat().st_mode & 0o777 == 0o600
    again = Measurements(0.0, keep=keep)
    assert again.has(0, "verify", 1) and not again.has(1, "verify", 1) and not again.has(0, "verify", 4)
    assert again.left_s < 0 < again.spent_s >= kept_in(keep).spent_s > 0
    again.add(("verify", 1), [9.0] * 5)
    assert again.has(1, "verify", 1)
    assert again.result([0])["verify_ms"] == {"1": 9.0} and again.result([0])["draft_step_ms"] == {"0": {"1": 1.0}}
    nowhere = Measurements(0.0)
    nowhere.keep()
    assert nowhere.turns == {}
