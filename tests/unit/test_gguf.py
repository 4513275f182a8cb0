"""GGUF files: converted once to what they were made of, or refused in one line."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from apparate_llm import gguf_model
from apparate_llm.config import ConfigError
from apparate_llm.gguf_model import GgufError, convert, gguf_folder
from apparate_llm.models.architectures import architecture_of
from apparate_llm.named_model import model_folder
from apparate_llm.sealed import COMPLETE
from tests.tiny_gguf import build_tiny_gguf


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / gguf_model.FOLDER


@pytest.fixture
def gguf(tiny_llama, tmp_path):
    return build_tiny_gguf(tmp_path / "tiny-F32.gguf", tiny_llama)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_file_becomes_the_model_that_it_was_made_of(model_type, tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_models[model_type]
    folder = model_folder(build_tiny_gguf(tmp_path / "tiny.gguf", source, architecture=model_type))
    assert architecture_of(folder) == architecture_of(source)
    made, given = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert made.keys() == given.keys()
    assert all(torch.equal(made[name], given[name].bfloat16()) for name in given)
    tokens = torch.arange(3, 40)[None]
    scores = [AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32)(tokens).logits for at in (folder, source)]
    assert torch.equal(scores[0].argmax(-1)[0, :8], scores[1].argmax(-1)[0, :8])  # RoPE's base and the shape, too
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Say w1 w23!")["input_ids"], skip_special_tokens=True) == "Say w1 w23!"
    assert tokenizer.convert_ids_to_tokens(tokenizer("bad")["input_ids"])[-2:] == ["b", "ad"]  # which merges first
    asked = [{"role": "user", "content": "w1"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "<user> w1 <assistant> "


def test_a_file_is_converted_once_by_its_content_and_that_is_said(gguf, cache, tmp_path, capsys):
    folder = gguf_folder(gguf)
    begins, ends = capsys.readouterr().err.splitlines()
    assert begins.endswith(f"tiny-F32.gguf  converting once to {folder}") and ", took " in ends
    assert folder.parent == cache and folder.name.startswith("tiny-F32-")
    assert gguf_folder(gguf) == folder and capsys.readouterr().err == ""
    gguf.rename(tmp_path / "moved.gguf")
    (tmp_path / "tiny-F32.gguf").symlink_to(tmp_path / "moved.gguf")
    assert gguf_folder(gguf) == folder and capsys.readouterr().err == ""


def test_another_content_under_the_same_name_is_another_model(gguf, tiny_models, tmp_path):
    first = gguf_folder(gguf)
    assert gguf_folder(build_tiny_gguf(gguf, tiny_models["qwen2"], architecture="qwen2")) != first


def test_a_damaged_copy_is_made_again(gguf):
    folder = gguf_folder(gguf)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert gguf_folder(gguf) == folder and (folder / "model.safetensors").read_bytes() == whole


def cut(file):
    file.write_bytes(file.read_bytes()[:-40_000])


def cut_early(file):
    file.write_bytes(file.read_bytes()[:100])


def no_magic(file):
    file.write_bytes(b"PK\x03\x04" + file.read_bytes()[4:])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "damaged GGUF file FILE: "),
        (cut_early, "damaged GGUF file FILE: "),
        (no_magic, "neither a model folder nor a GGUF file, which begins with b'GGUF': FILE"),
    ],
)
def test_a_damaged_file_is_one_line_and_leaves_nothing(damage, says, gguf, cache):
    damage(gguf)
    with pytest.raises(GgufError) as raised:
        model_folder(str(gguf))
    assert str(raised.value).startswith(says.replace("FILE", str(gguf))) and "\n" not in str(raised.value)
    assert not cache.exists() or [path for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "rwkv7"}, "transformers converts no GGUF files of architecture rwkv7 .it does: .*llama"),
        ({"rope_scaling": "yarn"}, "it scales positions"),
        ({"extra": {"rope_freqs.weight": np.ones(16)}}, "it scales positions"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64)}}, "makes a model of 168,512 weights of it, and it has 168,576"),
        ({"without": "blk.1.ffn_up.weight"}, "transformers makes a model of"),
    ],
    ids=["architecture", "yarn", "rope_freqs", "bias", "missing"],
)
def test_what_would_be_left_out_is_refused(changes, says, tiny_llama, tmp_path):
    file = build_tiny_gguf(tmp_path / "tiny.gguf", tiny_llama, **changes)
    (tmp_path / "out").mkdir()
    with pytest.raises(GgufError, match=says):
        convert(file, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_one_of_several_files_is_refused(gguf, tmp_path):
    part = gguf.rename(tmp_path / "tiny-00001-of-00002.gguf")
    with pytest.raises(GgufError, match="is one of several files"):
        model_folder(part)


@pytest.mark.parametrize(
    ("name", "says"),
    [("disk_usage", "GiB free on the disk of .*, and there are 0.0 GiB"), ("memory", "GiB of free memory, and there")],
)
def test_room_is_asked_for_first(name, says, gguf, monkeypatch, cache):
    if name == "memory":
        monkeypatch.setattr(gguf_model, "available_memory_bytes", lambda: 1000)
    else:
        monkeypatch.setattr(gguf_model.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(ConfigError, match=says):
        gguf_folder(gguf)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_stopped_leaves_nothing_that_counts(number, gguf, cache):
    """Stopped when the first file is there, by a writer that takes its time."""
    code = """
import sys, time
from pathlib import Path
from apparate_llm import gguf_model
whole = gguf_model.convert
def slow(gguf, out): whole(gguf, out); print("written", flush=True); time.sleep(60)
gguf_model.convert = slow
gguf_model.gguf_folder(Path(sys.argv[1]))
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(gguf)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(number)
    assert process.wait(20) == -number
    assert not [path for path in cache.iterdir() if not path.name.startswith(".")]
    folder = gguf_folder(gguf)
    assert (folder / COMPLETE).is_file() and [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_serve_refuses_a_damaged_file_at_once(gguf):
    no_magic(gguf)
    command = [sys.executable, "-m", "apparate_llm.cli", "serve", str(gguf)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "neither a model folder nor a GGUF file" in done.stderr
