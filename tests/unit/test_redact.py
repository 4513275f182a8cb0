"""No secret is shown: not in what a command prints, not in what it keeps, not in logs."""

import hashlib
import logging
import os

import pytest

from apparate_llm import preflight, serve
from apparate_llm.admin import DIGESTS_VARIABLE, KEY_VARIABLE, admin_digests, check_admin_keys, digest_of
from apparate_llm.cli import main
from apparate_llm.config import ConfigError, parse_config
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.redact import VLLM_ARGUMENTS_LOGGER, hide_digests_in_vllm_log, redacted, without_secrets

DIGEST = hashlib.sha256(b"sk-1").hexdigest()
TENANTS = {"tenants": {"mine": {"api_keys_sha256": [DIGEST]}}}


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key", "SECRET"],
        ["--api-key=SECRET"],
        ["--api_key", "SECRET"],
        ["--api_key=SECRET"],
        ["--api-key", "SECRET", "SECRET-2", "--port", "1"],
        ["--api-k", "SECRET"],
        ["--api-key=SECRET=x"],
        ["--hf-token", "SECRET"],
        ["--hf_tok=SECRET"],
        ["--watermark-config.key", "SECRET"],
        ["--admin-key", "SECRET", "--admin-key", "SECRET"],
        ["--some-password", "SECRET"],
        ["--kv-transfer-config", '{"auth_token": "SECRET"}'],
        ["--otlp-traces-endpoint", "https://me:SECRET@host/x"],
        ["--vllm-flag", "--api-key SECRET"],
        ["--vllm-flag=--api-key=SECRET"],
        ["--vllm-flag=--api-key", "--vllm-flag=SECRET"],
    ],
)
def test_a_secret_is_hidden_in_every_spelling(argv):
    shown = redacted(["serve", "model", *argv, "--seed", "3"])
    assert "SECRET" not in " ".join(shown) and "***" in " ".join(shown)
    assert shown[:2] == ["serve", "model"] and shown[-2:] == ["--seed", "3"]


def test_all_else_is_shown_as_it_was_given():
    argv = ["model", "--max-num-batched-tokens", "5", "--ssl-keyfile", "f", "--hf-overrides", '{"a": 1}', "-tp", "2"]
    assert redacted(argv) == argv
    assert without_secrets("no --port SECRET", ["--port", "1"]) == "no --port SECRET"


def test_what_serve_prints_and_its_process_keeps_has_no_key(monkeypatch, capsys, tmp_path):
    """The whole way: flags, a tenants file, the environment."""
    started = {}
    monkeypatch.setattr(serve, "start_vllm", lambda flags, wanted: started.update(flags=flags) or 0)
    monkeypatch.setattr(serve, "reexec_with_libraries", lambda: None)
    monkeypatch.setattr(preflight, "architecture_of", lambda model: "LlamaForCausalLM")
    monkeypatch.setattr(preflight, "preflight_ramps", lambda *args: None)
    monkeypatch.setenv(KEY_VARIABLE, "SECRET-of-the-environment")
    monkeypatch.setenv(DIGESTS_VARIABLE, "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "tenants.toml"
    file.write_text('[mine]\napi_keys = ["sk-1"]\n')
    argv = ["serve", str(tmp_path), "--tenants", str(file), "--api-key", "SECRET-1", "SECRET-2", "--dtype", "float32"]
    assert main([*argv, "--uds", "/none", "--admin-key", "SECRET-3", "--admin-key=SECRET-4"]) == 0
    printed = capsys.readouterr()
    assert "Starting: vllm serve" in printed.err and "--api-key" in printed.err
    assert "SECRET" not in printed.err + printed.out and DIGEST not in printed.err
    assert {"SECRET-1", "SECRET-2"} <= set(started["flags"])  # vLLM has them
    assert DIGEST in " ".join(started["flags"]) and "--admin-key" not in " ".join(started["flags"])
    assert admin_digests(os.environ) == [digest_of("SECRET-3"), digest_of("SECRET-4")]
    assert "SECRET" not in " ".join(f"{key}={value}" for key, value in os.environ.items())
    monkeypatch.setenv(KEY_VARIABLE, "SECRET-of-the-environment")
    monkeypatch.setenv(DIGESTS_VARIABLE, "")
    assert main([*argv, "--uds", "/none"]) == 0
    assert admin_digests(os.environ) == [digest_of("SECRET-of-the-environment")] and KEY_VARIABLE not in os.environ


def test_a_message_does_not_repeat_a_key(capsys):
    argv = ["serve", "/nowhere/SECRET", "--api-key", "SECRET"]
    assert main(argv) == 2
    assert "SECRET" not in capsys.readouterr().err
    assert without_secrets("ambiguous option: --api=SECRET", ["serve", "--api=SECRET"]) == "ambiguous option: --api=***"


@pytest.mark.parametrize("key", ["", " ", "SECRET ", "SECRET\n", "SECRETä"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(key):
    with pytest.raises(ConfigError, match="--admin-key: must be printable ASCII") as error:
        check_admin_keys(["right", key])
    assert "SECRET" not in str(error.value)


def test_the_environment_alone_is_enough():
    """As with plain `vllm serve`."""
    assert admin_digests({KEY_VARIABLE: "boss"}) == [digest_of("boss")]
    assert admin_digests({}) == admin_digests({KEY_VARIABLE: ""}) == []


def test_a_configuration_is_logged_without_digests():
    config = parse_config(TENANTS)
    assert DIGEST not in f"{config} {config!r}" and config.tenants["mine"].api_keys_sha256 == (DIGEST,)
    assert DIGEST in str(vllm_args(config, "LlamaForCausalLM"))  # what the filter below is for


def test_vllm_logs_its_arguments_without_digests():
    from vllm.entrypoints.serve.utils import api_utils

    hide_digests_in_vllm_log()
    hide_digests_in_vllm_log()
    assert api_utils.logger.name == VLLM_ARGUMENTS_LOGGER
    assert hasattr(api_utils, "log_non_default_args") and {"api_key", "hf_token"} <= api_utils._SENSITIVE_ARG_FIELDS
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger(VLLM_ARGUMENTS_LOGGER)
    level = logger.level
    logger.setLevel(logging.INFO)  # which forgets what was found disabled before
    logger.addHandler(handler)
    try:
        logger.info("non-default args: %s", {"seed": 3, "additional_config": {"early_exit": TENANTS}})
        logger.info("100 %")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert "'seed': 3" in heard[0] and "***" in heard[0] and DIGEST not in heard[0] and heard[1] == "100 %"


@pytest.mark.parametrize(
    "tenants",
    [
        {"mine": {"api_keys_sha256": ["SECRET"]}},
        {"mine": {"api_keys_sha256": "SECRET"}},
        {"mine": ["SECRET"]},
        [{"SECRET": 1}],
    ],
)
def test_a_bad_tenant_does_not_repeat_its_keys(tenants):
    with pytest.raises(ConfigError, match="tenants") as error:
        parse_config({"tenants": tenants})
    assert "SECRET" not in str(error.value)


def test_a_list_of_keys_in_the_wrong_place_is_not_repeated(tmp_path):
    from apparate_llm.flags import read_tenants

    file = tmp_path / "tenants.toml"
    file.write_text('api_keys = ["SECRET"]\n')
    with pytest.raises(ConfigError, match="api_keys must be a table") as error:
        read_tenants(str(file))
    assert "SECRET" not in str(error.value)
