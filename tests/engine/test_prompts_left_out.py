"""Models and prompts that do not fit together: what is left out is said, and the rest is answered."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from apparate_llm.prepare.calibrate import recalibrate
from apparate_llm.progress import Progress
from apparate_llm.ramps.checkpoint import read_manifest
from tests.tiny import CHAT_TEMPLATE, build_fused_ramps

TEMPLATE = "chat_template.jinja"


@pytest.fixture(scope="module")
def ramps(tiny_llama, tmp_path_factory):
    return build_fused_ramps(tmp_path_factory.mktemp("fused"), tiny_llama, depth=2)


def with_template(model, folder, template):
    """The model with another chat template, None for without."""
    shutil.copytree(model, folder)
    (folder / TEMPLATE).unlink()
    if template is not None:
        (folder / TEMPLATE).write_text(template)
    return folder


@pytest.fixture(scope="module")
def evaluated(tiny_llama, ramps, tmp_path_factory):
    """`ramps evaluate` of a model without a template, into pipes: the ended process, and what it wrote with --json."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = with_template(tiny_llama, folder / "model", None)
    prompts = folder / "prompts.jsonl"
    asked = ["w1 w2 w3", "w4 w5", "w6 " * 500]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    command = [sys.executable, "-m", "apparate_llm.cli", "ramps", "evaluate", str(ramps), "--model", str(model)]
    command += ["--prompts", str(prompts), "--max-tokens", "20", "--json", str(folder / "e.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done, json.loads((folder / "e.json").read_text())


def test_a_model_without_a_template_is_evaluated_and_what_is_left_out_is_said(evaluated):
    done, result = evaluated
    assert "the model has no chat template: prompts are plain text" in done.stderr
    assert "1 of 3 prompts left out: 1 longer than 492 tokens\n" in done.stderr
    assert result["prompts"] == 2 and result["left_out"] == {"longer than 492 tokens": 1}
    assert result["answer_tokens"] > 0


def test_the_user_reads_stages_and_results_and_nothing_of_vllms(evaluated):
    done, _ = evaluated
    first, *lines, last = done.stderr.splitlines()
    assert first.startswith("vLLM's log: ") and last.startswith("written: ")
    assert len(lines) < 12 and all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines), done.stderr
    messages = [line[10:] for line in lines]
    assert messages[0] == "answer  0/3 prompts (0 %), loading the model"
    assert any(line.startswith("answer  2/2 prompts (100 %)") for line in messages)
    assert any(line.startswith("measure  1/1 depths (100 %)") for line in messages)
    assert done.stdout.lstrip().startswith("Acceptance rate") and "vllm" not in done.stdout.lower()


def test_if_no_prompt_is_left_the_reason_is_one_line(tiny_llama, ramps, tmp_path):
    refusing = "{% if messages | length > 1 %}{{ raise_exception('One turn only') }}{% endif %}" + CHAT_TEMPLATE
    model = with_template(tiny_llama, tmp_path / "model", refusing)
    prompts = [[{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]] * 2
    with pytest.raises(ValueError, match=r"^no prompt is left: 2 of 2 .*: 2 the chat template refuses \(One turn only"):
        recalibrate(ramps, read_manifest(ramps), model, prompts, max_tokens=20, progress=Progress(Console()))
