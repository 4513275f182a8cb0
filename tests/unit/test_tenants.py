"""Tenants: what a file may say, whose a request is, and that none spends what another has earned."""

import json

import pytest

from apparate_llm.cli import build_parser
from apparate_llm.config import ConfigError, RequestOptions, parse_config, parse_request_options, public_config
from apparate_llm.controller.budget import AccuracyBudget, Bucket
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.exits.tenants import UNNAMED, shares_of
from apparate_llm.flags import options_from, read_tenants

TENANTS = {"interactive": {"tpt_target_ms": 20, "accuracy_bound": 0.02}, "batch": {"early_exit": 0}}


def config(**options):
    return parse_config({"accuracy_bound": 0.05, "tenants": TENANTS, **options})


def flags(*argv: str):
    return options_from(build_parser().parse_args(["serve", *argv]))


def test_a_file_names_tenants_and_only_digests_of_its_keys_go_on(tmp_path):
    file = tmp_path / "tenants.toml"
    file.write_text(
        '[interactive]\ntpt_target_ms = 20\naccuracy_bound = 0.005\napi_keys = ["sk-1"]\n[batch]\nearly_exit = 0\n'
    )
    config = flags("--tenants", str(file))
    assert config.tenants["interactive"].tpt_target_ms == 20.0 and config.tenants["batch"].early_exit == 0
    settings = vllm_args(config, "LlamaForCausalLM")
    assert "sk-1" not in str(settings)
    assert json.loads(json.dumps(settings)) == settings  # as vLLM reads its flags, which must be what is meant
    assert len(config.tenants["interactive"].api_keys_sha256) == 1
    assert "api_keys_sha256" not in str(public_config(config))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a]\ntpt_target = 20\n", r"tenants: a: tpt_target: unknown option \(allowed: early_exit, accuracy_bound"),
        ("[a]\naccuracy_bound = 2\n", "tenants: a: accuracy_bound: Input should be less than 1, got 2"),
        (
            "[a]\naccuracy_bound = 0.5\n",
            "a: accuracy_bound: at most the server's 0.01 without allow_looser_requests, got 0.5",
        ),
        ('["a b"]\n', "tenants: a b: String should match"),
        ("a = 1\n", "a must be a table"),
        ("[a\n", "cannot read"),
        ("[a]\napi_keys = 'k'\n", "api_keys must be a list"),
        ("[a]\napi_keys = ['k']\napi_keys_sha256 = 5\n", "a: api_keys_sha256: Input should be a valid tuple, got 5"),
        ("[a]\napi_keys = ['k']\n[b]\napi_keys = ['k']\n", "a and b have an API key in common"),
    ],
)
def test_a_file_that_says_something_wrong_is_refused(tmp_path, text, says):
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        flags("--tenants", str(file))


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="--tenants: cannot read /nowhere"):
        read_tenants("/nowhere")


def test_a_request_has_its_tenant_s_options_and_its_own_where_stricter():
    options = parse_request_options({"early_exit_tenant": "interactive"}, config())
    assert (options.accuracy_bound, options.tpt_target_ms, options.early_exit) == (0.02, 20.0, 1)
    own = parse_request_options(
        {"early_exit_tenant": "interactive", "accuracy_bound": 0.001, "tpt_target_ms": 30}, config()
    )
    assert (own.accuracy_bound, own.tpt_target_ms) == (0.001, 30.0)
    assert parse_request_options({"early_exit_tenant": "batch"}, config()).early_exit == 0
    assert parse_request_options(None, config()) == RequestOptions.model_validate(
        {"early_exit_tenant": None, "early_exit": 1, "tpt_target_ms": None}
    )
    again = parse_request_options(
        options.model_dump(exclude_unset=True), config()
    )  # the engine completes what the API did
    assert again.model_dump() == options.model_dump()


def test_an_own_tenant_called_default_has_all_that_name_none():
    options = parse_request_options({}, config(tenants={"default": {"tpt_target_ms": 40}}))
    assert (options.early_exit_tenant, options.tpt_target_ms) == ("default", 40.0)


def test_the_tenant_of_an_api_key_decides():
    assert parse_request_options({}, config(), key_tenant="batch").early_exit_tenant == "batch"
    with pytest.raises(ConfigError, match="requests with this API key are batch, got interactive"):
        parse_request_options({"early_exit_tenant": "interactive"}, config(), key_tenant="batch")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"early_exit_tenant": "slow"}, r"unknown tenant slow \(allowed: interactive, batch\)"),
        ({"early_exit_tenant": "interactive", "accuracy_bound": 0.03}, "at most tenant interactive's 0.02, got 0.03"),
        ({"early_exit_tenant": "batch", "early_exit": 1}, "requests of tenant batch take no exits"),
    ],
)
def test_a_request_cannot_ask_for_more_than_its_tenant_allows(asked, says):
    with pytest.raises(ConfigError, match=says):
        parse_request_options(asked, config())


def test_without_tenants_none_can_be_named():
    with pytest.raises(ConfigError, match="the server has no tenants"):
        parse_request_options({"early_exit_tenant": "x"}, parse_config({}))


def test_a_bound_lowered_while_serving_holds_for_tenants_as_well():
    assert (
        parse_request_options({"early_exit_tenant": "interactive"}, config(accuracy_bound=0.01)).accuracy_bound == 0.01
    )


@pytest.mark.parametrize("with_tenants", [True, False])
def test_many_short_requests_of_one_tenant_leave_another_its_budget(with_tenants):
    """Each short request may differ once before it has earned that: enough of them take all that a server without
    tenants has saved up."""
    shares = shares_of(parse_config({"accuracy_bound": 0.05, "tenants": {"greedy": {}, "steady": {}}}))
    assert UNNAMED in shares
    budget = AccuracyBudget(0.05)

    def request(name):
        bucket = Bucket.of_request(0.05)
        bucket.of_tenant = shares[name].bucket if with_tenants else None
        return bucket

    steady, allowed = request("steady"), {"greedy": 0, "steady": 0}

    def spend(name, bucket):
        if budget.verify_divergence(bucket, 1.0):
            budget.accept(bucket, 1.0)
            allowed[name] += 1

    for step in range(4000):  # both send a token each step; "greedy" in requests of 8 tokens, always the first to spend
        if step % 8 == 0:
            greedy = request("greedy")
        budget.emit(greedy, 1)
        budget.emit(steady, 1)
        spend("greedy", greedy)
        spend("steady", steady)
    earned = 0.05 * 4000
    assert allowed["greedy"] + allowed["steady"] <= 2 * earned
    if with_tenants:
        assert allowed["steady"] >= 0.95 * earned and allowed["greedy"] <= earned
    else:
        assert allowed["steady"] < 0.95 * earned  # what tenants are for
    budget.server.check_integrity()
