"""Models and prompts that do not fit together: what is left out is said, and the rest is answered."""

import json
import shutil
import subprocess
import sys

import pytest

from apparate_llm.prepare.calibrate import recalibrate
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


def test_a_model_without_a_template_is_evaluated_and_what_is_left_out_is_said(tiny_llama, ramps, tmp_path):
    model = with_template(tiny_llama, tmp_path / "model", None)
    prompts = tmp_path / "prompts.jsonl"
    asked = ["w1 w2 w3", "w4 w5", "w6 " * 500]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    command = [sys.executable, "-m", "apparate_llm.cli", "ramps", "evaluate", str(ramps), "--model", str(model)]
    command += ["--prompts", str(prompts), "--max-tokens", "20", "--json", str(tmp_path / "e.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the model has no chat template: prompts are plain text" in done.stderr
    assert "1 of 3 prompts left out: 1 longer than 492 tokens\n" in done.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["prompts"] == 2 and result["left_out"] == {"longer than 492 tokens": 1}
    assert result["answer_tokens"] > 0


def test_if_no_prompt_is_left_the_reason_is_one_line(tiny_llama, ramps, tmp_path):
    refusing = "{% if messages | length > 1 %}{{ raise_exception('One turn only') }}{% endif %}" + CHAT_TEMPLATE
    model = with_template(tiny_llama, tmp_path / "model", refusing)
    prompts = [[{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]] * 2
    with pytest.raises(ValueError, match=r"^no prompt is left: 2 of 2 .*: 2 the chat template refuses \(One turn only"):
        recalibrate(ramps, read_manifest(ramps), model, prompts, max_tokens=20, say=print)
