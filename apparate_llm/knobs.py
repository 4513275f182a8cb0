"""argparse flags derived from the knob schema."""

import argparse
from typing import Any, Literal, NoReturn, get_args, get_origin

from apparate_llm.config import ConfigError, EarlyExitConfig, parse_config


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_knobs(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    group = parser.add_argument_group("early exits")
    for name, field in EarlyExitConfig.model_fields.items():
        if name in leave_out:
            continue
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
        default = "" if field.default is None else f" (default: {field.default})"
        group.add_argument(
            "--" + name.replace("_", "-"),
            default=None,
            metavar="{" + ",".join(choices) + "}" if choices else name.upper(),
            help=f"{field.description}{default}".replace("%", "%%"),
        )


def knobs_from(args: argparse.Namespace) -> EarlyExitConfig:
    """The knobs the user gave; ConfigError names the flag, what was got and what is allowed."""
    given: dict[str, Any] = {}
    for name in EarlyExitConfig.model_fields:
        if (value := getattr(args, name, None)) is not None:
            given[name] = value
    try:
        return parse_config(given)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("early_exit: ")) from None


def positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number
