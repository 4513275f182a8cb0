import argparse

import pytest

from apparate_llm.config import ConfigError, EarlyExitConfig, config_from_vllm, parse_config, parse_request_options
from apparate_llm.flags import OneLineParser, add_options, options_from


def from_flags(*flags: str) -> EarlyExitConfig:
    parser = OneLineParser(prog="x")
    add_options(parser)
    return options_from(parser.parse_args(flags))


def test_every_option_is_a_flag_and_flags_give_what_json_gives():
    raw = {
        "policy": "static",
        "accuracy_bound": 0.05,
        "bound_kind": "regret",
        "tpt_target_ms": 20.5,
        "allow_looser_requests": True,
        "threshold": 0.8,
        "hold_threshold": 0.2,
        "max_exits": 2,
        "max_batch_tokens": 8,
        "depth": 0,
        "ttft_weight": 0.5,
        "ramps": "somewhere",
        "huge_pages": False,
        "screened_head": False,
        "batch_invariant": False,
        "feedback_log": "log.jsonl",
        "tenant_metrics": False,
        "controller_state": "none",
    }
    assert {*raw, "tenants"} == set(EarlyExitConfig.model_fields)  # its flag is a file: test_tenants.py
    flags = [part for name, value in raw.items() for part in ("--" + name.replace("_", "-"), str(value))]
    assert from_flags(*flags) == parse_config(raw)


def test_no_flags_means_the_defaults():
    assert from_flags() == EarlyExitConfig() == parse_config({})


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("policy", "sometimes", "must be adaptive, apparate, static or off"),
        ("bound_kind", "taste", "must be agreement or regret"),
        ("tpt_target_ms", "0", "must be a number, above 0"),
        ("accuracy_bound", "1", "must be a number, at least 0 and below 1"),
        ("accuracy_bound", "-0.1", "must be a number, at least 0 and below 1"),
        ("accuracy_bound", "nan", "must be a number, at least 0 and below 1"),
        ("threshold", "0", "must be a number, above 0 and at most 1"),
        ("hold_threshold", "1.5", "must be a number, at least 0 and at most 1"),
        ("ttft_weight", "-1", "must be a number, at least 0"),
        ("max_exits", "0", "must be a whole number, at least 1 and at most 16"),
        ("max_exits", "two", "must be a whole number, at least 1 and at most 16"),
        ("huge_pages", "maybe", "must be true or false"),
        ("depth", "-1", "must be auto or a whole number, at least 0"),
    ],
)
def test_a_bad_value_is_one_line_with_what_was_got_and_what_is_allowed(option, value, says):
    with pytest.raises(ConfigError) as error:
        from_flags("--" + option.replace("_", "-"), value)
    message = str(error.value)
    assert message.startswith(f"--{option.replace('_', '-')}: ") and says in message and f"got '{value}'" in message
    assert "\n" not in message


def test_an_unknown_option_is_named_with_the_allowed_ones():
    with pytest.raises(ConfigError, match=r"trheshold: unknown option \(allowed: policy, accuracy_bound"):
        parse_config({"trheshold": 0.9})


@pytest.mark.parametrize("raw", [None, 3, "off", [1]])
def test_options_must_be_an_object(raw):
    with pytest.raises(ConfigError, match="must be an object"):
        parse_config(raw)


def test_vllms_additional_config_may_hold_other_things():
    class Stub(argparse.Namespace):
        pass

    assert config_from_vllm(Stub(additional_config={"other": 1})) == EarlyExitConfig()
    stub = Stub(additional_config={"other": 1, "early_exit": {"policy": "off"}})
    assert config_from_vllm(stub).policy == "off"


def test_parser_errors_are_one_line_and_exit_code_2(capsys):
    parser = OneLineParser(prog="x")
    parser.add_argument("--number", type=int)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--number", "many"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "x: error: argument --number: invalid int value: 'many'\n"


def test_the_depth_is_a_number_or_auto():
    assert from_flags("--depth", "auto").depth == "auto" and from_flags("--depth", "2").depth == 2
    with pytest.raises(ConfigError, match="--depth: must be auto or a whole number, at least 0, got 'deep'"):
        from_flags("--depth", "deep")


def test_a_request_may_be_stricter_than_the_server_and_looser_only_where_that_is_allowed():
    server = EarlyExitConfig(accuracy_bound=0.05)
    given = {"accuracy_bound": 0.01, "early_exit": 0, "tpt_target_ms": 15, "other": "plugin"}
    options = parse_request_options(given, server)
    assert (options.accuracy_bound, options.early_exit, options.tpt_target_ms) == (0.01, 0, 15.0)
    assert parse_request_options(None, server).early_exit == 1
    with pytest.raises(ConfigError, match=r"at most the server's 0.05, got 0.2"):
        parse_request_options({"accuracy_bound": 0.2}, server)
    looser = EarlyExitConfig(accuracy_bound=0.05, allow_looser_requests=True)
    assert parse_request_options({"accuracy_bound": 0.2}, looser).accuracy_bound == 0.2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"early_exit": 2}, "early_exit: Input should be 0 or 1, got 2"),
        ({"accuracy_bound": 1.5}, "accuracy_bound: Input should be less than 1, got 1.5"),
        ({"tpt_target_ms": "soon"}, "tpt_target_ms: .*number.*got 'soon'"),
        ({"early_exits": 1}, "early_exits: unknown option .allowed: early_exit, accuracy_bound, tpt_target_ms"),
    ],
)
def test_a_bad_request_option_is_one_line(given, says):
    with pytest.raises(ConfigError, match=says):
        parse_request_options(given, EarlyExitConfig())
