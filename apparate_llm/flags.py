"""argparse flags derived from the option schema."""

import argparse
import hashlib
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, get_args, get_origin

from pydantic import BaseModel

from apparate_llm.config import ConfigError, EarlyExitConfig, check_tenants, new_options, parse_config
from apparate_llm.redact import without_secrets
from apparate_llm.renamed import OPTIONS


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {without_secrets(message, sys.argv[1:])}\n")


Commands: TypeAlias = "argparse._SubParsersAction[OneLineParser]"  # what commands are added to


MOST_DIGITS = 12  # of a number that counts anything
MOST_SEED = 2**32 - 1  # that every generator of random numbers takes
KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


class Paragraphs(argparse.HelpFormatter):
    """Text with lines of its own stays as it is; other text is filled."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_options(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    add_fields(parser.add_argument_group("early exits"), EarlyExitConfig, leave_out=leave_out)
    for old, name in OPTIONS.items():
        if name not in leave_out:
            parser.add_argument("--" + old.replace("_", "-"), default=None, help=argparse.SUPPRESS)


def add_fields(group: "argparse._ArgumentGroup", schema: type[BaseModel], *, leave_out: tuple[str, ...] = ()) -> None:
    """A flag for each field of a schema; what was not given is None."""
    for name, field in schema.model_fields.items():
        if name in leave_out:
            continue
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
        shown = field.default
        if field.annotation is bool:
            choices, shown = ("true", "false"), str(shown).lower()
        default = "" if shown in (None, {}) else f" (default: {shown})"
        group.add_argument(
            "--" + name.replace("_", "-"),
            default=None,
            metavar="{" + ",".join(choices) + "}" if choices else name.upper(),
            help=f"{field.description}{default}".replace("%", "%%"),
        )


def config_of(flags: Sequence[str]) -> EarlyExitConfig:
    """Of options as flags, each with its value behind it; a later one wins. Raises ConfigError."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return parse_config({flag.removeprefix("--").replace("-", "_"): value for flag, value in pairs})


def options_from(args: argparse.Namespace, others: Mapping[str, object] | None = None) -> EarlyExitConfig:
    """The options the user gave; ConfigError names the flag, what was got and what is allowed. others: options that
    came another way, which flags may add to and must not contradict."""
    named = {name: getattr(args, name, None) for name in (*EarlyExitConfig.model_fields, *OPTIONS)}
    try:
        given = new_options({name: value for name, value in named.items() if value is not None})
        if "tenants" in given:
            given["tenants"] = read_tenants(given["tenants"])
        check_each(given)
        others = new_options(others or {})
        check_agreement(given, others)
        config = parse_config({**others, **given})
        check_tenants(config)
        return config
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("early_exit: ")) from None


def check_each(given: Mapping[str, object]) -> None:
    """Raises ConfigError that names the flag, what is allowed and what was got. Tenants are a file's."""
    for name, value in given.items():
        try:
            parse_config({name: value})
        except ConfigError:
            if name == "tenants":
                raise
            raise ConfigError(f"--{name.replace('_', '-')}: must be {allowed(name)}, got {value!r}") from None


def allowed(name: str) -> str:
    """What an option takes, in words: `a number, at least 0 and below 1`."""
    field = EarlyExitConfig.model_json_schema()["properties"][name]
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    return " or ".join(map(_in_words, kinds))


def _in_words(kind: dict[str, Any]) -> str:
    """Of one kind of value in a JSON schema."""
    if values := kind.get("enum", [kind["const"]] if "const" in kind else []):
        *others, last = values
        return f"{', '.join(others)} or {last}" if others else str(last)
    bounds = [f"{text} {kind[limit]:g}" for limit, text in LIMITS.items() if limit in kind]
    return ", ".join([KINDS[kind["type"]], " and ".join(bounds)]).removesuffix(", ")


def check_agreement(given: Mapping[str, object], others: Mapping[str, object]) -> None:
    for name in given.keys() & others.keys():
        mine, theirs = (getattr(parse_config({name: value}), name) for value in (given[name], others[name]))
        if mine != theirs:
            raise ConfigError(
                f"--{name.replace('_', '-')} {mine} and {name} {theirs} of --additional-config contradict each other"
            )


def read_tenants(name: str) -> dict[str, object]:
    """Tenants out of a TOML file, one table each; of their `api_keys` only digests are kept. Raises
    ConfigError."""
    if "{" in name or "\n" in name:  # it may hold keys: not repeated
        raise ConfigError("--tenants: must be the name of a TOML file")
    try:
        tables = tomllib.loads(Path(name).expanduser().read_text())
    except (OSError, ValueError) as error:  # no UTF-8, no TOML, a number of too many digits
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--tenants: cannot read {name}: {why}") from None
    except RecursionError:
        raise ConfigError(f"--tenants: cannot read {name}: nested too deeply") from None
    for title, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"--tenants: {name}: {title} must be a table, [{title}], got {type(table).__name__}")
        keys = table.pop("api_keys", [])
        if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
            raise ConfigError(f"--tenants: {name}: {title}: api_keys must be a list of strings")
        if keys:
            digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
            given = table.get("api_keys_sha256", [])
            table["api_keys_sha256"] = [*given, *digests] if isinstance(given, list) else given  # refused with the rest
    return tables


def check_new_file(flag: str, path: Path | None) -> None:
    """Raises ConfigError where a file that comes at the end of the work could not be written. None: none is wanted."""
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"{flag}: folder not found: {folder}")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{flag}: must be a file, {path} is {'a folder' if path.is_dir() else 'none'}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"{flag}: cannot write to {folder}: {error.strerror}") from None


def check_new_folder(flag: str, folder: Path | None) -> None:
    """Raises ConfigError where one can neither be nor be made, as something else is there. None: none is wanted."""
    if folder is None:
        return
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{flag} must be a folder, {there} is a file")


def positive(text: str) -> int:
    if text.isdecimal() and len(text) > MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"must have {MOST_DIGITS} digits at most, got {text}")
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def seed(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else -1
    if not 0 <= number <= MOST_SEED:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {MOST_SEED}, got {text!r}")
    return number
