"""In which dtype a model is served: float32 on CPUs without AVX-512, where nobody asks for another one."""

import json
import platform
from types import SimpleNamespace

import pytest

from apparate_llm import serve
from apparate_llm.cli import build_parser, main, spelt_out
from apparate_llm.config import ConfigError
from apparate_llm.eval.systems import ModelChoice, systems_of, tuned
from apparate_llm.host import dtype
from apparate_llm.host.dtype import dtype_flags, dtype_of, element_size
from apparate_llm.host.options import KeptTuning

has_16_bit_kernels = dtype.has_16_bit_kernels  # before the tests' fixture takes its place


@pytest.fixture
def without_avx512(monkeypatch):
    monkeypatch.setattr(dtype, "has_16_bit_kernels", lambda: False)


@pytest.fixture
def model(tmp_path):
    """model(**config): a folder with 2 MB of weights in bfloat16."""

    def made(**config):
        (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **config}))
        (tmp_path / "model.safetensors").write_bytes(bytes(2_000_000))
        return tmp_path

    return made


@pytest.mark.parametrize(
    ("text", "machine", "has"),
    [
        ("flags\t\t: fpu avx avx2 bmi2\n", "x86_64", False),
        ("flags\t\t: fpu avx avx2 avx512f avx512bw\n", "x86_64", True),
        ("Features\t: fp asimd bf16\n", "aarch64", True),
        (None, "x86_64", True),
    ],
)
def test_avx512_is_looked_for_where_linux_says_it(text, machine, has, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert has_16_bit_kernels(tmp_path / "cpuinfo") is has


def test_with_avx512_vllm_chooses(model):
    assert dtype_of(model()) == "auto" and dtype_flags(model(), []) == [] and element_size(model()) == 2


def test_without_avx512_it_is_float32(model, without_avx512):
    for flags in ([], ["--dtype", "auto"], ["--seed", "3"]):
        assert dtype_of(model(), flags) == "float32" and dtype_flags(model(), flags) == ["--dtype", "float32"]
    assert element_size(model()) == 4


@pytest.mark.parametrize(
    ("asked", "name"),
    [("bfloat16", "bfloat16"), ("half", "float16"), ("float", "float32"), ("float32", "float32")],
)
def test_what_is_asked_for_is_taken(model, without_avx512, asked, name):
    assert dtype_of(model(), [f"--dtype={asked}"]) == name and dtype_flags(model(), [f"--dtype={asked}"]) == []


def test_quantised_models_are_left_as_they_are(model, without_avx512):
    assert dtype_of(model(quantization_config={"quant_method": "awq"})) == "auto"
    assert dtype_of(model(quantization_config=None), ["--quantization", "fp8"]) == "auto"
    assert dtype_of(model(text_config={"quantization_config": {"quant_method": "fp8"}})) == "auto"
    assert dtype_of(model()) == "float32", "a config that says null is of a model that is not quantised"
    (model() / "hf_quant_config.json").write_text("{}")
    assert dtype_of(model()) == "auto"


def test_a_folder_without_a_config_is_left_to_vllm(tmp_path, without_avx512):
    assert dtype_of(tmp_path) == "auto"


@pytest.mark.parametrize(("stored", "copies"), [("bfloat16", 4), ("float32", 2)])
def test_what_does_not_fit_in_memory_is_left_as_it_is(model, without_avx512, monkeypatch, stored, copies):
    needed = 2_000_000 * copies / dtype.MOST_FRAC
    for memory, expected in ((needed + 1, "float32"), (needed - 1, "auto")):
        monkeypatch.setattr(dtype, "total_memory_bytes", lambda memory=memory: memory)
        assert dtype_of(model(torch_dtype=stored)) == expected
    assert dtype_of(model(torch_dtype=stored), num_servers=2) == "auto"


def test_mistrals_own_file_beside_the_others_is_not_counted(model, without_avx512, monkeypatch):
    folder = model()
    (folder / "consolidated.safetensors").write_bytes(bytes(2_000_000))
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    monkeypatch.setattr(dtype, "total_memory_bytes", lambda: 2_000_000 * 4 / dtype.MOST_FRAC + 1)
    assert dtype_of(folder) == "float32"


def test_a_long_context_whose_cache_would_be_refused_is_left_as_it_is(model, without_avx512):
    """8 GiB for one request in float32, where 4 GiB are given by default."""
    shapes = {"num_hidden_layers": 16, "num_key_value_heads": 8, "num_attention_heads": 32, "hidden_size": 2048}
    folder = model(**shapes, max_position_embeddings=131_072)
    assert dtype_of(folder) == "auto"
    for enough in ("--max-model-len=4096", "--max-model-len=4K", f"--kv-cache-memory-bytes={8 << 30}"):
        assert dtype_of(folder, [enough]) == "float32"
    for short in ("--max-model-len=128K", "--max-model-len=auto", "--kv-cache-memory-bytes=2G"):
        assert dtype_of(folder, [short]) == "auto"
    assert dtype_of(folder, ["--gpu-memory-utilization", "0.5"]) == "float32"
    assert dtype_of(model(**shapes, max_position_embeddings=65_536)) == "float32"


def test_other_builds_of_vllm_choose_by_themselves(model, without_avx512, monkeypatch):
    monkeypatch.setattr(dtype, "is_cpu_build", lambda: False)
    assert dtype_of(model()) == "auto" and dtype.dtype_line(model(), []) is None


def compressed(*bits, fmt="pack-quantized", own=None):
    """A quantization_config of compressed-tensors, a group for each of `bits`."""
    groups = {f"group_{i}": {"weights": {"num_bits": number}, "format": own} for i, number in enumerate(bits)}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": groups}


@pytest.mark.parametrize(
    ("how", "is_refused"),
    [
        ({"quant_method": "awq", "bits": 4}, True),
        ({"quant_method": "awq", "w_bit": 4}, True),
        ({"quant_method": "gptq", "bits": 8}, False),
        (compressed(8, 4), True),
        (compressed(4, fmt="mixed-precision", own="pack-quantized"), True),
        (compressed(8), False),
        (compressed(4, fmt="int-quantized"), False),  # W4A8, by a kernel of torch's
        ({"quant_method": "compressed-tensors", "config_groups": [4]}, False),
        ({"quant_method": "bitsandbytes", "bits": 4}, False),
        ("damaged", False),
    ],
)
def test_weights_in_4_bits_are_refused_where_there_are_no_kernels(model, without_avx512, monkeypatch, how, is_refused):
    folder = model(quantization_config=how)
    if is_refused:
        with pytest.raises(ConfigError, match=r"4 bits .*no kernels .*without AVX-512 \(allowed: "):
            dtype.check_kernels(folder)
    else:
        dtype.check_kernels(folder)
    monkeypatch.setattr(dtype, "has_16_bit_kernels", lambda: True)
    dtype.check_kernels(folder)


def test_weights_in_4_bits_are_seen_by_the_older_key_too(model, without_avx512):
    group = {"weights": {"num_bits": 4}}
    how = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    with pytest.raises(ConfigError, match=r"4 bits .compressed-tensors"):
        dtype.check_kernels(model(compression_config=how))


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "serve --policy off",
        "prepare --out new",
        "eval quick",
        "eval tpt --out new",
        "tune",
    ],
)
def test_every_command_refuses_them_at_once(model, without_avx512, monkeypatch, tmp_path, capsys, command):
    folder = model(
        architectures=["LlamaForCausalLM"], num_hidden_layers=4, quantization_config={"quant_method": "awq", "bits": 4}
    )
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), str(folder)]) == 2
    error = capsys.readouterr().err
    assert "its weights are in 4 bits (awq)" in error and len(error.splitlines()) == 1


# ---- who asks


@pytest.fixture
def started(monkeypatch):
    starts = []
    monkeypatch.setattr(serve, "start_vllm", lambda flags, wanted: starts.append(" ".join(flags)) or 0)
    monkeypatch.setattr(serve, "reexec_with_libraries", lambda: None)
    monkeypatch.setattr(serve, "hides_log", lambda **how: False)
    return starts


def test_serve_says_which_dtype_it_takes(tiny_llama, without_avx512, started, capsys):
    assert main(["serve", str(tiny_llama), "--policy", "off", "--port", "0"]) == 0
    assert "--dtype float32" in started[0]
    assert "Dtype: float32, in which prompts and several clients are faster" in capsys.readouterr().err


def test_serve_takes_the_one_that_is_asked_for(tiny_llama, without_avx512, started, capsys):
    assert main(["serve", str(tiny_llama), "--policy", "off", "--port", "0", "--dtype", "bfloat16"]) == 0
    assert "--dtype bfloat16" in started[0] and "float32" not in started[0] + capsys.readouterr().err


def test_serve_says_what_is_slow(tiny_llama, without_avx512, started, monkeypatch, capsys):
    monkeypatch.setattr(dtype, "total_memory_bytes", lambda: 1)
    assert main(["serve", str(tiny_llama), "--policy", "off", "--port", "0"]) == 0
    assert "--dtype" not in started[0] and "Note: without AVX-512" in capsys.readouterr().err


def test_an_evaluation_says_so_and_goes_on_in_the_same_dtype_only(model, monkeypatch):
    from apparate_llm.eval import plan
    from apparate_llm.eval.notes import dtype_notes

    folder, settings = model(num_hidden_layers=4), []
    for has_kernels in (True, False):
        monkeypatch.setattr(dtype, "has_16_bit_kernels", lambda has_kernels=has_kernels: has_kernels)
        args = build_parser().parse_args(spelt_out(["eval", "quick", str(folder)]))
        settings.append(plan._dtype_settings(args, tuned(ModelChoice(folder), KeptTuning(tuning="off"))))
    assert settings == [{}, {"dtype": "float32"}]
    assert dtype_notes({}) == [] and "compute in float32" in dtype_notes(settings[1])[0]


@pytest.mark.parametrize("given", [[], ["--dtype", "auto"]])
def test_auto_is_the_same_as_nothing(tiny_llama, without_avx512, started, given):
    assert main(["serve", str(tiny_llama), "--policy", "off", "--port", "0", *given]) == 0
    assert started[0].endswith("--dtype float32") or "--dtype float32 " in started[0]


def test_hugging_faces_server_knows_the_short_names(model):
    choice = ModelChoice(model(num_hidden_layers=4), vllm_flags=("--dtype", "half"))
    (system,) = systems_of(["hf"], [], choice)
    assert system.command[-2:] == ("--dtype", "float16")


def test_engines_of_a_preparation_have_it(model, without_avx512, monkeypatch):
    import vllm

    from apparate_llm.prepare.engine import generation_engine

    started = []

    def engine(folder, **settings):
        started.append(settings["dtype"])
        raise InterruptedError

    monkeypatch.setattr(vllm, "LLM", engine)
    with pytest.raises(InterruptedError), generation_engine(model(max_position_embeddings=64)):
        pass
    assert started == ["float32"]


def test_all_servers_of_an_evaluation_have_one_dtype(model, without_avx512):
    choice = tuned(ModelChoice(model(num_hidden_layers=4)), KeptTuning(tuning="off"))
    for system in systems_of(["vllm", "vllm-tuned", "off", "ngram", "hf"], [], choice):
        assert "--dtype float32" in " ".join(system.command), system.name


def test_a_preparation_measures_servers_as_they_start(model, without_avx512, monkeypatch):
    from apparate_llm.prepare import servers

    chosen = SimpleNamespace()
    monkeypatch.setattr(servers, "choose", lambda tuning, model, flags, **given: vars(chosen).update(flags=flags))
    servers.used_by_servers(model())
    assert chosen.flags == ["--dtype", "float32"]


def test_a_preparation_counts_memory_and_rows_in_the_dtype_of_its_engine(tiny_llama, without_avx512, monkeypatch):
    from apparate_llm.prepare.engine import kv_bytes_per_token
    from apparate_llm.prepare.needs import Sizes
    from apparate_llm.ramps.checkpoint import BaseModelInfo

    in_float32, kv = Sizes.of(tiny_llama, BaseModelInfo.of(tiny_llama)), kv_bytes_per_token(tiny_llama)
    monkeypatch.setattr(dtype, "has_16_bit_kernels", lambda: True)
    in_16_bits = Sizes.of(tiny_llama, BaseModelInfo.of(tiny_llama))
    assert (in_float32.layers, in_float32.table, in_float32.value) == (2 * in_16_bits.layers, 2 * in_16_bits.table, 4)
    assert kv == 2 * kv_bytes_per_token(tiny_llama)


def test_a_column_of_rows_keeps_its_dtype(tmp_path):
    """Of a preparation that goes on on another machine, or by a newer version."""
    import torch

    from apparate_llm.prepare.store import RowStore
    from tests.made_rows import base_parts, made_conversations

    store, given = RowStore(tmp_path), made_conversations(base_parts())
    store.append([given[0]._replace(final=given[0].final.bfloat16())])
    store.append([given[1]._replace(final=given[1].final.float())])
    assert store.rows(depths=()).final.dtype == torch.bfloat16
