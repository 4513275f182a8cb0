"""`prepare` from end to end on tiny models, and the rows it takes out of vLLM."""

import html
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from apparate_llm.engine.runner import EarlyExitRunner
from apparate_llm.prepare.capture import DRAWN_FROM, Capture
from apparate_llm.prepare.chat import ChatFormat
from apparate_llm.prepare.engine import CACHE_BLOCK, environment, generation_engine, runner_of
from apparate_llm.prepare.needs import disk_bytes
from apparate_llm.prepare.profile import profile
from apparate_llm.prepare.prompts import KINDS, Prompt, PromptSource
from apparate_llm.prepare.rows import TEST, TRAIN, VALIDATION, Rows, rows_of
from apparate_llm.prepare.store import RowStore
from apparate_llm.prepare.synthesise import UNDER_WAY, Answer, Synthesiser, generate_rows
from apparate_llm.prepare.timings import kept_in
from apparate_llm.ramps.checkpoint import read_manifest
from tests.engine.prepare_and_kill import CONVERSATION, COSTS, HEAD, START, TOKENS, USER_PROMPTS, plan_for
from tests.environment import clean_environment
from tests.harness import Engine, greedy, token_prompts
from tests.tiny import MODEL_TYPES, build_fused_ramps


@pytest.fixture(scope="module")
def fast_starts(tmp_path_factory):
    """An environment whose processes import what an earlier one has compiled, where Python may not write beside it."""
    if not sys.dont_write_bytecode:
        return clean_environment()
    folder = tmp_path_factory.mktemp("bytecode")
    return clean_environment() | {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""}


@pytest.fixture(scope="module")
def prepared(tiny_models, fast_starts, tmp_path_factory):
    """Model type -> ramp folder, prepared in spite of kills, two at once; and what the runs reported."""
    out, reports = tmp_path_factory.mktemp("prepared"), []
    command = [sys.executable, "-m", "tests.engine.prepare_and_kill"]
    runs = [
        subprocess.Popen(
            [*command, str(seed), str(out), *(str(tiny_models[model_type]) for model_type in MODEL_TYPES[seed::2])],
            env=fast_starts | environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    try:
        for run in runs:
            output, errors = run.communicate()
            assert run.returncode == 0, errors[-3000:]
            reports += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    finally:
        for run in runs:
            run.kill()
    return {model_type: out / model_type for model_type in MODEL_TYPES}, reports


def test_kills_lose_no_finished_work(prepared):
    _, reports = prepared
    assert len(reports) == len(MODEL_TYPES)
    kills = [tuple(kill) for report in reports for kill in report["killed"]]
    assert {kind for kind, _ in kills} == {START, COSTS, CONVERSATION, HEAD}
    assert all(hit for kind, hit in kills if kind in (COSTS, CONVERSATION)), kills
    assert sum(hit for _, hit in kills) > len(kills) / 2, kills  # the others had finished before
    assert all(report["kept"] > 0 and report["costs"] > 0 for report in reports)
    assert all(set(report["plain"]) == {1} for report in reports), "beside one turn"
    assert all(report["made"] >= 3 and not report["leftovers"] for report in reports)


def test_no_prompt_is_answered_twice_and_the_users_are_among_them(prepared, tiny_models):
    from transformers import AutoTokenizer

    folders, _ = prepared
    for model_type, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(tiny_models[model_type])
        texts = list(RowStore(folder / "work" / "rows").texts())
        assert len({tuple(text.prompt) for text in texts}) == len(texts)
        mine = sorted(text.prompt for text in texts if KINDS[text.kind] == "user")
        expected = [tokenizer(f"<user> {text} <assistant> ")["input_ids"] for text in USER_PROMPTS]
        assert mine == sorted(expected)
        assert {"open", "code"} <= {KINDS[text.kind] for text in texts}


def test_the_three_splits_share_no_conversation_and_no_passage(prepared, tiny_models):
    from transformers import AutoTokenizer

    folders, _ = prepared
    for model_type, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(tiny_models[model_type])
        store = RowStore(folder / "work" / "rows")
        rows, texts = store.rows(depths=()), list(store.texts())
        of_split = {split: set(rows.conversations[rows.split == split].tolist()) for split in (TRAIN, VALIDATION, TEST)}
        assert all(of_split.values()) and sum(map(len, of_split.values())) == len(texts)
        answers = [tokenizer.decode(text.answer, skip_special_tokens=True).strip() for text in texts]
        asked = [(number, text) for number, text in enumerate(texts) if KINDS[text.kind] == "passage"]
        for number, text in asked:
            prompt = tokenizer.decode(text.prompt)
            origins = {texts[i].split for i in range(number) if len(texts[i].answer) >= 96 and answers[i] in prompt}
            assert origins == {text.split}, model_type


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_prepared_ramps_serve_without_changing_a_token(model_type, prepared, tiny_models):
    folders, _ = prepared
    prompts = token_prompts(3)
    with Engine(tiny_models[model_type]) as engine:
        expected = engine.tokens(prompts, greedy(24))
    for depth in (0, 2):
        options = {"ramps": str(folders[model_type]), "depth": depth, "hold_threshold": 0.0}
        with Engine(tiny_models[model_type], options) as engine:
            assert engine.tokens(prompts, greedy(24)) == expected
            assert engine.counts()["held"] > 20


def test_the_report_says_what_the_folder_holds(prepared):
    folders, _ = prepared
    for folder in folders.values():
        manifest, report = read_manifest(folder), json.loads((folder / "report.json").read_text())
        assert manifest.depths == [0, 2] and manifest.aux_layers == [1, 3]
        assert manifest.default_depth == report["advice"]["depth"]
        assert report["answer_tokens"] >= TOKENS
        for item in report["depths"]:
            assert [part["position"] for part in item["positions"]] == [0, 1, 2, 3]
            assert item["positions"][0]["rows"] > 0
            assert set(item["predicted"]) == {"1", "4", "16", *report["profile"]["verify_ms"]}
            for predicted in (part for item in item["predicted"].values() for part in (item, item["users"])):
                low, high = predicted["ci95"]
                assert 0 < low <= predicted["tpt_ratio"] <= high
        assert 1 <= report["profile"]["threads"] < max(2, len(os.sched_getaffinity(0))), "a server keeps a core free"
        page = html.unescape((folder / "report.html").read_text())
        assert report["advice"]["sentence"] in page
        assert "http://" not in page and "https://" not in page


def test_disk_use_is_stated_within_a_fifth(prepared, tiny_models):
    from apparate_llm.ramps.checkpoint import BaseModelInfo

    folders, _ = prepared
    for model_type in MODEL_TYPES:
        work, model = folders[model_type] / "work", tiny_models[model_type]
        # Answers under way are some more, and few where there are many tokens.
        assert not (work / "ramps").exists(), "of heads that have learned nothing"
        files = [path for path in work.rglob("*") if path.is_file()]
        used = sum(path.stat().st_size for path in files if path.name != UNDER_WAY)
        tokens = RowStore(work / "rows").counts["answer_tokens"]
        stated = disk_bytes(plan_for(model, folders[model_type]), BaseModelInfo.of(model), tokens)
        assert stated == pytest.approx(used, rel=0.2), model_type


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}, {"num_gpu_blocks_override": 5}],
    ids=["plain", "chunks", "preemption"],
)
def test_captured_rows_are_what_the_model_computes_for_each_text_alone(settings, tiny_llama):

    prompts = [prompt["prompt_token_ids"] for prompt in token_prompts(4, length=40)]
    with Engine(tiny_llama, **settings) as engine:
        capture = Capture(engine.llm, depths=(2, 3))
        conversations = generate_rows(engine.llm, capture, prompts, temperature=0.0, max_tokens=24)
    assert [conversation.prompt for conversation in conversations] == prompts
    for conversation in conversations:
        assert conversation.top_ids[1:, 0].tolist() == conversation.answer
    check_rows(tiny_llama, rows_of(conversations), [(one.prompt, one.answer) for one in conversations])


@pytest.mark.parametrize("length", [64, 65, 66])
def test_rows_of_a_prompt_that_a_prefix_cache_knows_are_whole(length, tiny_llama, tmp_path):
    """Read by another request before: what is left to compute is one block, the last token only, or two tokens."""
    (prompt,) = (prompt["prompt_token_ids"] for prompt in token_prompts(1, length=length))
    with Engine(tiny_llama, enable_prefix_caching=True, block_size=CACHE_BLOCK) as engine:
        synthesiser = tiny_synthesiser(engine, tmp_path)
        for _ in range(2):
            synthesiser._answer(Answer(Prompt(prompt, 0, TRAIN), 0.0))
            while synthesiser.work:
                for output in engine.llm.llm_engine.step():
                    synthesiser._take(output)
    first, second = synthesiser.finished
    assert first.answer == second.answer
    assert len(first.final) == len(second.final) == len(first.answer) + 1
    check_rows(tiny_llama, rows_of([first, second]), [(one.prompt, one.answer) for one in (first, second)])


def test_tokens_are_drawn_with_their_probabilities_among_the_best(tiny_llama):
    """The first token of one prompt, asked a thousand times at temperature 1."""
    (prompt,) = (prompt["prompt_token_ids"] for prompt in token_prompts(1, length=12))
    torch.manual_seed(0)
    times = 1000
    with Engine(tiny_llama, max_num_seqs=50) as engine:
        capture = Capture(engine.llm, depths=(2,))
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        for number in range(times):
            capture.draw(f"{number}", 1.0)
            engine.llm.llm_engine.add_request(f"{number}", {"prompt_token_ids": prompt}, params)
        drawn = []
        while engine.llm.llm_engine.has_unfinished_requests():
            drawn += [output.outputs[0].token_ids[0] for output in engine.llm.llm_engine.step()]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        probability, tokens = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).topk(DRAWN_FROM)
    assert set(drawn) <= set(tokens.tolist())
    counts = torch.bincount(torch.tensor(drawn), minlength=model.config.vocab_size)[tokens]
    expected = times * probability / probability.sum()
    off = ((counts - expected).abs() / expected.sqrt())[expected >= 5]
    assert len(off) > 10 and off.max() < 4.5, "some token comes too often or too seldom"


def check_rows(folder: Path, rows: Rows, texts: list[tuple[list[int], list[int]]]) -> None:
    """Against what the model computes for each text alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number, (prompt, answer) in enumerate(texts):
        text = prompt + answer
        with torch.inference_mode():
            out = model.model(torch.tensor([text[:-1]]), output_hidden_states=True)
            logits = model.lm_head(out.last_hidden_state[0]).log_softmax(-1)
        keep = slice(len(prompt) - 2, None)
        mine = rows.conversations == number
        assert rows.tokens[mine].tolist() == text[keep][:-1]
        for got, expected in (
            (rows.final[mine], out.last_hidden_state[0, keep]),
            (rows.states[2][mine], out.hidden_states[2][0, keep]),
            (rows.states[3][mine], out.hidden_states[3][0, keep]),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        best = logits[keep][1:].topk(16)
        torch.testing.assert_close(rows.top_logprobs[mine][1:].float(), best.values, rtol=2e-2, atol=2e-2)


def test_costs_of_a_model_with_a_short_context_are_measured_and_what_was_is_not_again(
    fast_starts, tiny_llama, tmp_path, monkeypatch
):
    """Whose requests end before all was measured that a longer one leaves room for."""
    for name, value in fast_starts.items():
        monkeypatch.setenv(name, value)
    model, keep, log = (tmp_path / name for name in ("model", "turns.json", "log"))
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    ramps = build_fused_ramps(tmp_path / "ramps", model, depth=2)
    measured = []
    for limit_s in (1.0, 0.0):
        costs = profile(model, ramps, (2,), enforce_eager=True, limit_s=limit_s, log=log, keep=keep)
        assert {"1", "4"} <= costs["verify_ms"].keys() == costs["draft_step_ms"]["2"].keys()
        assert costs["prompt_ms"].keys() <= {"32"} and costs["pass_ms"]["1"]
        measured.append(kept_in(keep).turns)
    assert measured[0] == measured[1]
    assert log.stat().st_mode & 0o777 == 0o600


def test_answers_under_way_go_on_after_a_kill_with_the_rows_they_have(tiny_llama, tmp_path):
    """Kept in the middle of answers, as a kill finds them, and gone on with by another engine."""
    kept = []
    for steps in (12, 30, None):
        with Engine(tiny_llama, enable_prefix_caching=True, block_size=CACHE_BLOCK) as engine:
            synthesiser = tiny_synthesiser(engine, tmp_path)
            under_way = [work for work in synthesiser.work.values() if isinstance(work, Answer)]
            assert [len(work.tokens) for work in under_way] == kept
            left = iter(range(steps or 10_000))
            synthesiser.run(tokens=600, most_tokens=600, enough=lambda left=left: next(left, None) is None)
            kept = [len(work.tokens) for work in synthesiser.work.values() if isinstance(work, Answer)]
        if steps:
            assert kept and max(kept) > 2
    store = RowStore(tmp_path)
    texts = list(store.texts())
    assert sum(len(text.answer) for text in texts) >= 600
    check_rows(tiny_llama, store.rows(depths=(2, 3)), [(text.prompt, text.answer) for text in texts])


def test_an_engine_that_writes_keeps_no_int8_copy_of_the_head(tiny_llama):
    """As its stated memory says: it is vLLM's own."""
    with generation_engine(tiny_llama, max_num_seqs=8, kv_cache_memory_bytes=16 << 20) as llm:
        assert not isinstance(runner_of(llm), EarlyExitRunner)


def tiny_synthesiser(engine: Engine, folder: Path) -> Synthesiser:
    chat = ChatFormat(engine.llm.get_tokenizer(), max_model_len=128, max_answer_tokens=48)
    return Synthesiser(
        engine.llm,
        RowStore(folder),
        PromptSource(chat, user_prompts=[], seed=0),
        depths=(2, 3),
        max_prompt_tokens=8,
        max_answer_tokens=48,
        slots=8,
        seed=0,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere"], "model folder not found: /nowhere"),
        (["MODEL", "--time-budget", "0m"], "must be a time such as"),
        (["MODEL", "--tokens", "-3"], "whole number of at least 1"),
        (["MODEL", "--depths", "9"], "--depths must be auto or different numbers from 0 to 3, got '9'"),
        (["MODEL", "--prompts", "/nowhere.jsonl"], "cannot read prompts /nowhere.jsonl"),
        (["MODEL", "--tokens", "10", "--time-budget", "1m"], "not allowed with"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, says, tiny_llama, tmp_path):
    out = tmp_path / "out"
    command = [str(tiny_llama) if part == "MODEL" else part for part in arguments]
    result = subprocess.run(
        [sys.executable, "-m", "apparate_llm.cli", "prepare", *command, "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert says in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_other_settings_in_the_same_folder_are_refused(prepared, tiny_llama):
    folders, _ = prepared
    from dataclasses import replace

    from apparate_llm.prepare.pipeline import prepare

    with pytest.raises(ValueError, match=r"holds a preparation with other settings \(seed\)"):
        prepare(replace(plan_for(tiny_llama, folders["llama"]), seed=7))


def test_ramps_commands(prepared, fast_starts, tiny_llama, tmp_path):
    folders, _ = prepared
    folder: Path = folders["llama"]
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"category": f"kind{i % 2}", "prompt": " ".join(f"w{(7 * i + j) % 150}" for j in range(8))} for i in range(6)
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    cli = [sys.executable, "-m", "apparate_llm.cli", "ramps"]
    shown = subprocess.run([*cli, "show", str(folder)], env=fast_starts, capture_output=True, text=True)
    assert shown.returncode == 0 and "fused ramps for LlamaForCausalLM" in shown.stdout
    assert "position 0" in shown.stdout and "position 3" in shown.stdout
    answering = ["--model", str(tiny_llama), "--prompts", str(prompts), "--max-tokens", "20"]
    command = [*cli, "evaluate", str(folder), *answering, "--json", str(tmp_path / "e.json")]
    done = subprocess.run(command, env=fast_starts, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["schema_version"] == 3 and [item["depth"] for item in result["depths"]] == [0, 2]
    for item in result["depths"]:
        assert set(item["by_category"]) == {"kind0", "kind1"}
        first = item["positions"][0]
        assert first["rows"] == result["answer_tokens"]
        assert first["acceptance_rate"] == pytest.approx(sum(part["0"] for part in item["by_category"].values()) / 2)
    assert 0 <= result["ceiling"]["p_over_0.9_frac"] <= 1 and 0 <= result["calibration_error"] <= 1

    copy = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("work")))
    done = subprocess.run([*cli, "calibrate", str(copy), *answering], env=fast_starts, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("calibration error on these prompts") == 2
    before, after = read_manifest(folder), read_manifest(copy)
    assert after.training["recalibrated"] == [{"prompts": 6, "answer_tokens": result["answer_tokens"]}]
    assert after.calibration.keys() == before.calibration.keys()
    assert after.weights_sha256 == before.weights_sha256
    assert after.sha256() != before.sha256()  # what was learned with the old calibration is not taken up
    assert all(after.calibration[depth] != before.calibration[depth] for depth in before.depths)
