"""`eval tpt --prompt-tokens`: prompts of given lengths, and loads that ask each length's own."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from apparate_llm.cli import build_parser
from apparate_llm.eval.notes import saturation_notes
from apparate_llm.eval.plan import tpt_plan
from apparate_llm.eval.prompt_lengths import prompts_of_lengths
from apparate_llm.eval.prompts import NUM_HELD_OUT, Prompt
from tests.eval_results import a_run

ASKED = [Prompt([{"role": "user", "content": text}]) for text in ("w1 w2 w3", "w4 w5", "w6")]


def plan_of(model: Path, folder: Path, *flags: str):
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompt.asked for prompt in ASKED))
    argv = ["eval", "tpt", str(model), "--out", str(folder / "out"), "--systems", "vllm", "--prompts", str(file)]
    return tpt_plan(build_parser().parse_args([*argv, *flags]))


def test_prompts_have_the_tokens_asked_for_and_begin_each_in_its_own_way(tiny_llama):
    made = prompts_of_lengths(tiny_llama, ASKED, [2, 20])
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    assert [len(tokenizer.encode(prompt.asked).ids) for prompt in made] == [2, 2, 2, 20, 20, 20]
    assert [prompt.asked.split()[:2] for prompt in made[3:]] == [["w1", "w2"], ["w4", "w5"], ["w6", "w1"]]


def test_prompts_without_tokens_and_a_damaged_tokenizer_are_told(tiny_llama, tmp_path):
    empty = [Prompt([{"role": "user", "content": [{"type": "image_url"}]}])]
    with pytest.raises(ValueError, match=r"--prompt-tokens: the prompts have no tokens by .*tokenizer\.json"):
        prompts_of_lengths(tiny_llama, empty, [2])
    for text in ("", "{", "{}", "[]"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"^damaged .*tokenizer\.json: ") as error:
            prompts_of_lengths(tmp_path, ASKED, [2])
        assert "\n" not in str(error.value)


def test_each_load_asks_for_prompts_of_one_length_and_warms_up_with_others(tiny_llama, tmp_path):
    plan = plan_of(tiny_llama, tmp_path, "--prompt-tokens", "2,20", "--concurrency", "1,2")
    assert [load.name for load in plan.loads] == [
        f"{clients}, {tokens}-token prompts" for tokens in (2, 20) for clients in ("1 client", "2 clients")
    ]
    asked = [sorted(ask.prompt_index for block in load.blocks for ask in block) for load in plan.loads]
    assert asked == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]] and len(plan.prompts) == 6
    held_out = range(6, 6 + NUM_HELD_OUT)
    for load, own in zip(plan.loads, asked, strict=True):
        first, *later = load.uncounted
        assert all(ask.prompt_index in held_out for ask in first.lead_in)
        assert all(ask.prompt_index in own for around in later for ask in around.lead_in)
        assert all(ask.prompt_index in own for around in load.uncounted for ask in around.run_out)
    assert plan.loads[1].uncounted[0].lead_in, "with two clients one is held back"


def test_where_a_system_is_saturated_is_said_of_each_length():
    loads = [f"{name}, {tokens}-token prompts" for tokens in (2, 20) for name in ("1 client", "4 clients")]
    runs = [
        a_run("vllm", clients, load=load, output_tokens_per_s=rate)
        for load, clients, rate in zip(loads, (1, 4, 1, 4), (30.0, 90.0, 10.0, 10.5), strict=True)
    ]
    assert saturation_notes(runs) == [
        "vllm: at most 90.0 output tokens/s, with 4 clients, 2-token prompts (still rising there).",
        "vllm: at most 10.5 output tokens/s, with 4 clients, 20-token prompts (saturated).",
    ]
    assert saturation_notes(runs[::2]) == []


def test_lengths_that_cannot_be_had_are_refused(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="--prompt-tokens: each length once, got 5,5"):
        plan_of(tiny_llama, tmp_path, "--prompt-tokens", "5,5")
    with pytest.raises(ValueError, match=r"--prompt-tokens: .* has no tokenizer\.json"):
        prompts_of_lengths(tmp_path, ASKED, [5])
