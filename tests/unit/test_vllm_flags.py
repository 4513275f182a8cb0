"""Our settings meet vLLM's flags in every spelling that vLLM's own parser takes."""

import json
from argparse import Namespace

import pytest

from apparate_llm.cli import build_parser, main, spelt_out
from apparate_llm.config import ConfigError, parse_config
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.flags import options_from
from apparate_llm.serve import (
    as_flags,
    check_set_up,
    check_understood,
    memory_flags,
    merge_settings,
    name_model,
    own_options,
)
from apparate_llm.vllm_flags import OTHER_NAMES, SHORTEST, WITHOUT_NO, given_value, normalised, value_of

SETTINGS = vllm_args(parse_config({"accuracy_bound": 0.0}), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def vllm_parser():
    """vLLM's parser of `serve`, as (whole, the subcommand's)."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message):
            raise ValueError(message)

    parser = Parser(prog="vllm")
    return parser, ServeSubcommand().subparser_init(parser.add_subparsers())


@pytest.fixture
def understood(vllm_parser):
    return lambda flags: vars(vllm_parser[0].parse_args(["serve", *flags]))


def test_the_tables_are_those_of_vllms_parser(vllm_parser):
    options = vllm_parser[1]._option_string_actions
    for name, least in SHORTEST.items():
        whole = f"--{name}"
        assert whole in options
        assert [o for o in options if o.startswith(f"--{least}")] == [whole] or least == name
        if least != name:
            assert len([o for o in options if o.startswith(f"--{least[:-1]}")]) > 1, f"{name} has a shorter beginning"
    for other, name in OTHER_NAMES.items():
        assert options[other].dest == options[name].dest
    switches = {
        a.option_strings[0] for a in vllm_parser[1]._actions if a.nargs == 0 and "--help" not in a.option_strings
    }
    without = {name for name in switches if f"--no-{name[2:]}" not in options}
    assert without == {f"--{name}" for name in WITHOUT_NO}


SPELLINGS = [
    ["--served-model-name", "mine"],
    ["--served-model-name=mine"],
    ["--served_model_name=mine", "--seed=3"],
    ["--served-model-name", "one", "two", "--seed", "3"],
    ["--served-model", "mine"],
    ["--additional-config", '{"x": 1}'],
    ["--additional_config", '{"x": 1}', "--additional-config", '{"y": 2}'],
    ["--additional-config.x", "1", "--additional_config.y_z.w=[1, 2]"],
    ["--additional-config.x", "-1"],
    ["--additional-config.x", "--text"],
    [
        "--hf-overrides.rope_scaling.factor",
        "2",
        "--hf-overrides.a=1k",
        "--hf_overrides.b=25.6k",
        "--hf-overrides.c",
        "1K",
    ],
    ["--hf-overrides.architectures+", "X", "--hf-overrides.architectures+=Y,Z"],
    ["-sc.method", "ngram", "-sc.num_speculative_tokens=3"],
    ["-sc", '{"method": "ngram"}'],
    ["--speculative-config.method", "ngram"],
    ["--worker-cls=a.b", "--scheduler_cls", "c.d"],
    ["-tp", "2", "-O3", "-cc.mode", "3", "--no-enable-prefix-caching"],
    ["--compilation_config.mode", "3", "--kv_cache_memory_bytes", "1G", "--dtype=float32"],
    ["--device-memory-utilization", "0.5", "--generation-config=vllm"],
    ["--por", "8001", "--hos=127.0.0.1", "--uds", "/x"],
    ["--api-key", "one", "two", "--max-model-len", "-1"],
    ["--data-parallel-rpc-port", "1", "--no-enable-chunked-prefill", "--enforce_eager"],
]


@pytest.mark.parametrize("flags", SPELLINGS, ids=" ".join)
def test_vllm_reads_the_one_spelling_as_it_reads_the_users(understood, flags):
    assert understood(["/m", *normalised(flags)]) == understood(["/m", *flags])


FILES = [
    "served-model-name: mine\nport: 8001\nhost: 127.0.0.1",
    "additional-config:\n  x: {y: 1}\nseed: 3",
    "served_model_name: [one, two]\nmax-model-len: -1\nenforce-eager: true\nheadless: false",
    "worker-cls: a.b\nspeculative-config: {method: ngram, num_speculative_tokens: 3}\nhf-overrides: {a: [1, null]}",
    "dtype: float32\nlora-modules: []",
]


@pytest.mark.parametrize("text", FILES)
def test_a_configuration_file_is_read_as_vllm_reads_it(understood, tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    theirs = understood(["/m", "--config", str(file), "--seed", "5"])
    ours = normalised(["--config", str(file), "--seed", "5"])
    assert "--config" not in ours
    assert understood(["/m", *ours]) == theirs


def test_a_switch_turned_off_in_a_configuration_file_is_off(understood, tmp_path):
    """vLLM's `serve` loses it."""
    file = tmp_path / "config.yaml"
    file.write_text("enable_prefix_caching: false\nheadless: false")
    assert understood(["/m", *normalised([f"--config={file}"])])["enable_prefix_caching"] is False


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config"], "--config: expected one argument"),
        (["--config", "x.json"], "must be a .yaml or .yml file"),
        (["--config", "/nowhere.yaml"], "cannot read /nowhere.yaml"),
        (["--additional-config.x"], "--additional-config.x: expected one argument"),
        (["-cc.mode"], "-cc.mode: expected one argument"),
        (["--additional-config", "--seed", "3"], "--additional-config: expected one argument"),
        (["--hf-overrides", "{", "--hf-overrides.x", "1"], "--hf-overrides is not valid JSON"),
        (["/a", "--model", "/b"], "two models are named: /a and --model /b"),
    ],
)
def test_vllm_flags_that_cannot_be_read_are_one_line(flags, says):
    with pytest.raises(ConfigError, match=says) as error:
        normalised(flags)
    assert "\n" not in str(error.value)


def test_a_configuration_file_that_is_none_is_one_line(tmp_path):
    for text in ("- a\n- b", "a: [", "\x00"):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match="--config: ") as error:
            normalised(["--config", str(file)])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["1", "1.5", "true", "null", "1k", "1K", "2.5M", "2.5G", "007", "word", "", "[1]", "1x"]
)
def test_values_of_keys_are_read_as_vllm_reads_them(understood, text):
    read = understood(["/m", "--additional-config.x", text])["additional_config"]["x"]
    assert value_of(text) == read and type(value_of(text)) is type(read)


def parsed(argv: list[str]) -> tuple[Namespace, list[str]]:
    args, rest = build_parser().parse_known_args(spelt_out(["serve", *argv]))
    name_model(args, rest)
    return args, rest


def test_our_own_flags_are_ours_in_every_spelling(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: /m\nport: 8001\nhost: 127.0.0.1\naccuracy_bound: 0\nseed: 3\nserved-model-name: mine")
    args, rest = parsed(["--config", str(file)])
    assert (args.model, args.port, args.host, args.accuracy_bound) == ("/m", 8001, "127.0.0.1", "0")
    assert rest == ["--seed=3", "--served-model-name=mine"]
    args, rest = parsed(["--config", str(file), "--por", "8002", "--accuracy_bound=0.05", "--served_model_name", "its"])
    assert (args.model, args.port, args.accuracy_bound) == ("/m", 8002, "0.05")
    assert rest == ["--seed=3", "--served-model-name", "its"]
    assert parsed(["/n", "--config", str(file)])[0].model == "/n"
    assert parsed(["--accuracy-bound", "0", "/n", "--seed", "3"])[0].model == "/n"
    with pytest.raises(ConfigError, match="two models are named"):
        parsed(["/n", "--accuracy-bound", "0", "/o"])


def test_settings_join_the_users_own_in_every_spelling(understood):
    for theirs in (
        ["--additional-config", '{"x": 1}'],
        ["--additional-config.x", "1"],
        ["--additional_config.x=1"],
        ["--additional.x", "1"],
    ):
        merged, rest = merge_settings(SETTINGS, normalised([*theirs, "--hf-overrides.rope_theta", "5", "--seed", "3"]))
        assert merged["additional_config"] == {"x": 1, "early_exit": {"accuracy_bound": 0.0}}
        assert merged["hf_overrides"] == {"rope_theta": 5, "architectures": ["EarlyExitLlamaForCausalLM"]}
        assert rest == ["--seed", "3"]
        args = understood(["/m", *as_flags(merged), *rest])
        check_understood(Namespace(**args), merged)


def test_parts_of_an_object_given_whole_and_by_keys_are_all_kept():
    flags = normalised(["--additional-config.b", "2", "--additional-config", '{"a": 1, "c": {"d": 1}}'])
    flags = normalised([*flags, "--additional-config.c.e=2"])
    assert json.loads(given_value(flags, "additional_config")) == {"a": 1, "b": 2, "c": {"d": 1, "e": 2}}


@pytest.mark.parametrize(
    "flags",
    [
        ["--speculative-config.method", "ngram"],
        ["--speculative_config", '{"method": "ngram"}'],
        ["-sc.method=ngram"],
        ["--spec-method", "ngram"],
        ["--worker-cls=mine.Worker"],
        ["--worker_c", "mine.Worker"],
        ["--scheduler-cls", "mine.Scheduler"],
        ["--hf-overrides.architectures+", "Other"],
        ["--hf-overrides", '{"architectures": ["Other"]}'],
    ],
    ids=" ".join,
)
def test_vllm_flags_that_contradict_early_exits_are_refused_in_every_spelling(flags, tmp_path):
    with pytest.raises(ConfigError, match="contradicts early exits") as error:
        merge_settings(SETTINGS, normalised(flags))
    assert "\n" not in str(error.value)
    assert memory_flags(flags)
    off = vllm_args(parse_config({"policy": "off"}), "LlamaForCausalLM")
    if not given_value(normalised(flags), "worker-cls"):  # `serve` leaves our worker out where there is another
        assert merge_settings(off, normalised(flags)) == (off, normalised(flags))


def test_vllm_flags_that_say_what_early_exits_say_are_no_contradiction():
    flags = ["--worker-cls=auto", "--scheduler-cls", SETTINGS["scheduler_cls"], "--speculative-config", ""]
    flags += ["--hf-overrides.architectures+", "EarlyExitLlamaForCausalLM"]
    assert merge_settings(SETTINGS, normalised(flags)) == (SETTINGS, [])


def test_options_in_the_additional_settings_count_and_must_not_contradict_flags():
    args, rest = parsed(["/m", "--additional-config.early_exit.accuracy_bound", "0", "--max-exits", "3"])
    config = options_from(args, own_options(rest))
    assert (config.accuracy_bound, config.max_exits) == (0.0, 3)
    args, rest = parsed(["/m", "--additional-config.early_exit.accuracy_bound", "0", "--accuracy-bound", "0.0"])
    assert options_from(args, own_options(rest)).accuracy_bound == 0.0
    args, rest = parsed(["/m", "--additional-config.early_exit.accuracy_bound", "0.5", "--accuracy-bound", "0"])
    with pytest.raises(ConfigError, match=r"--accuracy-bound 0.0 and accuracy_bound 0.5 .* contradict each other"):
        options_from(args, own_options(rest))
    with pytest.raises(ConfigError, match="early_exit must be an object of options, got 3"):
        own_options(normalised(["--additional-config.early_exit", "3"]))


@pytest.mark.parametrize(
    "flags",
    [["--kv_cache_memory_bytes=1G"], ["--kv-cache-mem", "1G"], ["--gpu-memory-utilization", "0.5"], ["--device-m=0.5"]],
)
def test_memory_the_user_has_set_is_left_alone_in_every_spelling(flags, tmp_path):
    assert memory_flags(flags) == []
    file = tmp_path / "config.yaml"
    file.write_text("kv-cache-memory-bytes: 1G")
    assert memory_flags(["--config", str(file)]) == []


def test_set_ups_that_exits_cannot_serve_are_refused_in_every_spelling(understood):
    for flags in (["-pp", "2"], ["--enable_lora"], ["--model-impl=transformers"], ["--runn", "pooling"]):
        with pytest.raises(ConfigError, match="contradicts early exits; with --policy off it is yours"):
            check_set_up(Namespace(**understood(["/m", *flags])))
    check_set_up(Namespace(**understood(["/m", "-tp", "2", "--runner", "generate"])))


def test_what_vllm_would_read_otherwise_is_refused():
    with pytest.raises(ConfigError, match="--worker-cls: vLLM reads 'theirs' where 'ours' is meant"):
        check_understood(Namespace(worker_cls="theirs"), {"worker_cls": "ours"})


def test_the_command_refuses_a_contradiction_in_one_line(tiny_llama, lens_ramps, capsys):
    ramps = ["--ramps", str(lens_ramps(depth=3))]
    assert main(["serve", str(tiny_llama), *ramps, "--speculative-config.method", "ngram"]) == 2
    err = capsys.readouterr().err
    assert "--speculative-config contradicts early exits; with --policy off it is yours" in err
    assert err.count("\n") == 1
