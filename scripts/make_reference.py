#!/usr/bin/env python3
"""Writes docs/reference.md out of the code: python -m scripts.make_reference"""

import argparse
import ast
import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from apparate_llm.api import metric_names
from apparate_llm.cli import EXIT_CODES, build_parser
from apparate_llm.config import LIVE_OPTIONS, EarlyExitConfig, RequestOptions, Tenant, parse_config
from apparate_llm.core import Outcome
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.models.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference.md"
PLUGIN = ROOT / "api" / "plugin.py"  # read, not imported: it needs vLLM
BOUNDS = {
    "minimum": "\N{GREATER-THAN OR EQUAL TO}",
    "exclusiveMinimum": ">",
    "maximum": "\N{LESS-THAN OR EQUAL TO}",
    "exclusiveMaximum": "<",
}
TYPES = {
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "array": "list of texts",
    "object": "TOML file",
}
OPTION_FLAGS = tuple("--" + name.replace("_", "-") for name in EarlyExitConfig.model_fields)
HEAD = """# Reference

Made from the code by `python -m scripts.make_reference`. Words are explained in [concepts.md](concepts.md), tasks in
[serving.md](serving.md).
"""
OPTIONS = """
## Options of early exits

Flags of `apparate-llm serve`. In a `--config` file they have the same names. Options marked *live* may change while the
server runs: `PATCH /early_exit/config` takes them, with `_` for `-`.
"""
COMMANDS = """
## Commands

`serve` also takes every flag of `vllm serve`.
"""
REQUESTS = """
## Request fields

A request sets these in `vllm_xargs`. A name or value that is not allowed is answered with HTTP 400.
"""
TENANTS = """
## Tenants

A table for each tenant, in the TOML file of `--tenants`. Instead of digests it may hold `api_keys`, a list of keys in
clear text.
"""
ROUTES = """
## HTTP routes

Beside those of vLLM. [serving.md](serving.md) says who may read and who may change.
"""
METRICS = f"""
## Metrics

On `/metrics`, beside those of vLLM, with the prefix `{metric_names.PREFIX}`.
"""
CODES = """
## Exit codes
"""
PLAIN = """
## With `vllm serve`

The same server, by flags of vLLM's own command. `VLLM_PLUGINS=apparate` adds the routes. Threads, processes, dtype and
preloaded libraries are as vLLM has them.
"""


def page() -> str:
    """The whole of docs/reference.md."""
    options = table(("flag", "default", "allowed", "live", "meaning"), option_rows())
    requests = table(("field", "default", "allowed", "meaning"), field_rows(RequestOptions))
    tenants = table(("field", "default", "allowed", "meaning"), field_rows(Tenant))
    routes = table(("route", "may be asked by", "answer"), route_rows(PLUGIN.read_text()))
    metrics = table(("metric", "type", "labels", "meaning"), metric_rows())
    codes = table(("code", "meaning"), ((str(code), text) for code, text in EXIT_CODES.items()))
    parts = [HEAD, OPTIONS, options, COMMANDS, *command_parts(), REQUESTS, requests, TENANTS, tenants]
    parts += [ROUTES, routes, METRICS, metrics, CODES, codes, PLAIN, *plain_parts()]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(columns)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)])


def option_rows() -> Iterator[tuple[str, ...]]:
    for name, (default, values, meaning) in fields_of(EarlyExitConfig).items():
        live = "yes" if name in LIVE_OPTIONS else ""
        yield f"`--{name.replace('_', '-')}`", default, values, live, meaning


def field_rows(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, texts in fields_of(model).items():
        yield f"`{name}`", *texts


def fields_of(model: type[BaseModel]) -> dict[str, tuple[str, str, str]]:
    """Name -> (default, what is allowed, meaning)."""
    fields = {}
    for name, field in model.model_json_schema()["properties"].items():
        default = field.get("default")
        kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
        shown = "none" if default in (None, {}, []) else f"`{default}`"
        fields[name] = shown, ", ".join(map(allowed, kinds)), field["description"]
    return fields


def allowed(kind: dict[str, Any]) -> str:
    """What a JSON schema takes, in a few words."""
    if values := kind.get("enum", [kind["const"]] if "const" in kind else []):
        return ", ".join(f"`{value}`" for value in values)
    bounds = [f"{sign} {kind[limit]:g}" for limit, sign in BOUNDS.items() if limit in kind]
    return " ".join([TYPES[kind["type"]], " and ".join(bounds)]).strip()


def command_parts() -> Iterator[str]:
    """A heading, what it does and a table for each command."""
    for name, summary, parser in commands(build_parser()):
        shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
        rows = [row for action in shown if (row := flag_row(parser, action)) is not None]
        ours = [flag for action in shown for flag in action.option_strings if flag in OPTION_FLAGS]
        yield f"\n### {name}\n\n{sentence(summary)}"
        yield "" if not rows else table(("argument", "meaning"), rows)
        if ours:
            others = ", ".join(f"`{flag}`" for flag in OPTION_FLAGS if flag not in ours)
            yield f"And all [options of early exits](#options-of-early-exits){' but ' if others else ''}{others}."
        if parser.epilog:
            yield f"```text\n{parser.epilog.strip()}\n```"


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """(name, help, parser) of each command that can be run."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                subcommands = list(commands(inner))
                yield from subcommands or [(inner.prog, summaries[name], inner)]


def flag_row(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str] | None:
    """None for an option of the schema, which has a table of its own, and for --help."""
    if isinstance(action, argparse._HelpAction) or any(flag in OPTION_FLAGS for flag in action.option_strings):
        return None
    choices = "{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper()
    takes = action.metavar or ("" if action.nargs == 0 else choices)
    flags = [flag for flag in action.option_strings if "_" not in flag]  # a second spelling
    shown = [f"`{flag} {takes}`".replace(" `", "`") for flag in flags] or [f"`{takes}`"]
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    return ", ".join(shown), text + (" (required)" if action.required and action.option_strings else "")


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def route_rows(source: str) -> Iterator[tuple[str, str, str]]:
    """(method and path, who, what) of each route that the plugin's decorators declare."""
    prefixes = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and is_router(node.value):
            prefix = [ast.literal_eval(item.value) for item in node.value.keywords if item.arg == "prefix"]
            prefixes[ast.unparse(node.targets[0])] = "".join(prefix)
        if isinstance(node, ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call):
                    yield from route_row(decorator, node, prefixes)


def is_router(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "APIRouter"


def route_row(call: ast.Call, node: ast.AsyncFunctionDef, prefixes: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """One row; none for a route that the API's schema leaves out."""
    router, _, method = ast.unparse(call.func).partition(".")
    named = {item.arg: ast.unparse(item.value) for item in call.keywords}
    if router not in prefixes or "include_in_schema" in named:
        return
    path = prefixes[router] + ast.literal_eval(call.args[0])
    changes = "may_change" in named.get("dependencies", "")
    reads = "who may read" if prefixes[router] else "anybody; without any key this machine"
    who = "who may change" if changes else reads
    yield f"`{method.upper()} {path}`", who, " ".join((ast.get_docstring(node) or "").split())


def metric_rows() -> Iterator[tuple[str, str, str, str]]:
    outcomes = ", ".join(f"`{outcome}`" for outcome in Outcome)
    yield f"`{metric_names.EXITS[0]}_total`", "counter", "depth, outcome", f"{metric_names.EXITS[1]}: {outcomes}"
    for name, text in [*metric_names.COUNTERS.items(), metric_names.STATUS_ERRORS]:
        yield f"`{name}_total`", "counter", "", text
    for name, text in metric_names.TENANT_COUNTERS.items():
        yield f"`tenant_{name}_total`", "counter", "tenant", text
    for name, text in [*metric_names.GAUGES.items(), metric_names.STATUS_AGE]:
        yield f"`{name}`", "gauge", "", text
    for name, text, _ in metric_names.HISTOGRAMS.values():
        yield f"`{name}`", "histogram", "", text


def plain_parts() -> Iterator[str]:
    """The flags, and the names of the other architectures."""
    first, *others = ARCHITECTURES
    flags = []
    for name, value in vllm_args(parse_config({"accuracy_bound": 0.01}), first).items():
        shown = json.dumps(value) if isinstance(value, dict) else str(value)
        flags.append(f"--{name.replace('_', '-')} {shlex.quote(shown)}")
    yield "```bash\nvllm serve MODEL \\\n  " + " \\\n  ".join(flags) + "\n```"
    named = ", ".join(f"`{ARCHITECTURES[name][0]}`" for name in others)
    yield f"\nThat is for models of the architecture `{first}`. The other names are {named}."


if __name__ == "__main__":
    PAGE.write_text(page())
