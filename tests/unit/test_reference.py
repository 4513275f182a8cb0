"""docs/reference.md is what the code says."""

import argparse
import json
import re
import shlex
from collections.abc import Iterator

from apparate_llm.cli import build_parser
from apparate_llm.config import EarlyExitConfig, RequestOptions, Tenant, parse_config
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.vllm_flags import given_value
from scripts.make_reference import PAGE, page, table

REFERENCE = PAGE.read_text()


def section(title: str) -> str:
    """From a heading to the next one."""
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", REFERENCE, re.M | re.S).group(1)


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The commands that can be run."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield parser
    for action in inner:
        for choice in action.choices.values():
            yield from leaves(choice)


def test_the_page_is_fresh():
    assert page() == REFERENCE, "python -m scripts.make_reference"


def test_every_flag_of_every_command_is_there():
    names = [parser.prog for parser in leaves(build_parser())]
    assert len(names) == len(set(names)) >= 14
    options = section("Options of early exits")
    for parser in leaves(build_parser()):
        text = section(parser.prog)
        for action in parser._actions:
            if action.help is argparse.SUPPRESS or {"-h", "--help"} & set(action.option_strings):
                continue
            for flag in action.option_strings or [action.metavar or action.dest.upper()]:
                if "_" not in flag:  # of --admin_key, a second spelling
                    assert re.search(rf"`{re.escape(flag)}[` ]", text + options), f"{parser.prog}: {flag}"


def test_an_option_that_a_command_does_not_take_is_named():
    for parser in leaves(build_parser()):
        text = section(parser.prog)
        if "options of early exits" in text:
            left_out = set(re.findall(r"`(--[a-z-]+)`", text.split("#options-of-early-exits)")[1].splitlines()[0]))
            flags = {flag for action in parser._actions for flag in action.option_strings}
            assert left_out == {f"--{name.replace('_', '-')}" for name in EarlyExitConfig.model_fields} - flags


def test_every_field_of_the_schemas_is_there():
    for title, model in (("Request fields", RequestOptions), ("Tenants", Tenant)):
        assert re.findall(r"^\| `(\w+)`", section(title), re.M) == list(model.model_fields)
    flags = re.findall(r"^\| `--([a-z-]+)` \| (\S+) \|", section("Options of early exits"), re.M)
    assert [name.replace("-", "_") for name, _ in flags] == list(EarlyExitConfig.model_fields)
    defaults = {name.replace("-", "_"): shown.strip("`") for name, shown in flags}
    for name, field in EarlyExitConfig.model_fields.items():
        assert defaults[name] == ("none" if field.default in (None, {}) else str(field.default))


def test_the_flags_for_vllms_own_command_are_those_that_ours_uses():
    text = re.search(r"vllm serve MODEL (.*?)```", REFERENCE, re.S).group(1)
    flags = shlex.split(text.replace("\\\n", " "))
    for name, value in vllm_args(parse_config({"accuracy_bound": 0.01}), "LlamaForCausalLM").items():
        given = given_value(flags, name)
        assert given == value or json.loads(given) == value


def test_a_bar_in_a_cell_does_not_end_it():
    assert table(("a", "b"), [("x|y", "z")]) == "| a | b |\n|---|---|\n| x\\|y | z |"
