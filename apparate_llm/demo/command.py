"""`apparate-llm demo`: one prompt with exits off and on, side by side, and how much faster that is."""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from apparate_llm.address import add_api_key, server_url
from apparate_llm.demo.sides import FEWEST_TOKENS
from apparate_llm.flags import Commands, OneLineParser, positive
from apparate_llm.lifeline import exit_on_sigterm
from apparate_llm.named_model import HELP

if TYPE_CHECKING:
    from rich.console import Console

    from apparate_llm.chat import ChatClient
    from apparate_llm.eval.systems import System

CHAT_PROMPT = "Explain to a child why the sky is blue."
CODE_PROMPT = "Write a Python function that merges two sorted lists into one, with a docstring and three tests."
START_TIMEOUT_S = 900.0
OWN_SERVER = ("ramps", "vllm_flag")  # flags that are about the server that is started here


def add_demo(subparsers: Commands) -> None:
    parser: OneLineParser = subparsers.add_parser(
        "demo",
        help="one prompt with exits off and on, side by side, and how much faster that is",
        description="Starts a server, asks it one prompt without exits and with them in turns, shows both answers side "
        "by side, and says how much faster the exits made it. The first start compiles the model, which takes minutes.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "prompt", nargs="?", help="what to ask (default: one about code for code models, else a chat's)"
    )
    parser.add_argument("--model", help=f"{HELP}; with --url the name of a model of that server")
    parser.add_argument("--ramps", help="ramp folder (default: the shipped ramps that fit the model)")
    parser.add_argument("--url", help="ask this running server instead of starting one, with or without /v1")
    parser.add_argument(
        "--accuracy-bound", type=share, default=0.0, help="of the answers with exits; 0 is lossless (default: 0)"
    )
    parser.add_argument("--max-tokens", type=answer_length, default=128, help="longest answer (default: 128)")
    parser.add_argument(
        "--repeat", type=repeat, default=4, help="how often each side answers; more are more exact (default: 4)"
    )
    parser.add_argument(
        "--vllm-flag", action="append", metavar='"--FLAG VALUE"', help="vLLM flag for the server; repeatable"
    )
    add_api_key(parser)
    parser.set_defaults(run=run_demo)


def share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, got {text!r}")
    return number


def answer_length(text: str) -> int:
    if (number := positive(text)) < FEWEST_TOKENS:
        raise argparse.ArgumentTypeError(f"must be at least {FEWEST_TOKENS}, to be timed, got {text!r}")
    return number


def repeat(text: str) -> int:
    if (number := positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, to know how exact the figures are, got {text!r}")
    return number


def run_demo(args: argparse.Namespace) -> int:
    """Raises ValueError for bad input, RuntimeError where a server does not start or answer."""
    from rich.console import Console

    check(args)
    exit_on_sigterm()
    console = Console(highlight=False)
    with server_to_ask(args, console) as client:
        compare(args, client, console)
    return 0


def check(args: argparse.Namespace) -> None:
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError(f"the prompt must have some text, got {args.prompt!r}")
    if args.url is not None:
        args.url = server_url(args.url, "--url")
        for name in OWN_SERVER:
            if getattr(args, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is for a server that is started here; leave it out with --url"
                )


@contextmanager
def server_to_ask(args: argparse.Namespace, console: "Console") -> Iterator["ChatClient"]:
    """A client of the running server, or of one that lives as long as the block."""
    if args.url is not None:
        yield client_of(args, args.url, args.api_key, args.model)
        return

    from rich.console import Console

    from apparate_llm.eval.servers import Server
    from apparate_llm.progress import Progress
    from apparate_llm.quiet_log import temporary_log

    system = own_system(args)
    with temporary_log() as log, Server(system, log=log, start_timeout_s=START_TIMEOUT_S) as server:
        facts = f"of {system.command[4]}; log {log}"
        with Progress(Console(stderr=True)) as progress, progress.stage("server starts", total=math.inf, facts=facts):
            server.wait_ready()
        yield client_of(args, server.base_url, system.api_key, server.model_name())


def own_system(args: argparse.Namespace) -> "System":
    from apparate_llm.eval.systems import ModelChoice, early_exits
    from apparate_llm.host.dtype import check_kernels
    from apparate_llm.launch import check_build
    from apparate_llm.named_model import model_folder
    from apparate_llm.vllm_flags import split_flag

    check_build()
    flags = tuple(part for text in args.vllm_flag or () for part in split_flag(text))
    options = () if args.ramps is None else ("--ramps", args.ramps)
    choice = ModelChoice(
        model_folder(args.model, check=check_kernels), vllm_flags=flags, options=options, api_key=args.api_key
    )
    system = early_exits("the server", choice, "--accuracy-bound", f"{args.accuracy_bound:g}")
    if system.problem is not None:
        raise ValueError(system.problem)
    return system


def client_of(args: argparse.Namespace, url: str, api_key: str | None, model: str | None) -> "ChatClient":
    from apparate_llm.chat import ChatClient

    asked = {"url": url, "api_key": api_key, "model": model, "max_tokens": args.max_tokens}
    return ChatClient(argparse.Namespace(**asked, temperature=0.0, no_exits=False))


def compare(args: argparse.Namespace, client: "ChatClient", console: "Console") -> None:
    """Warm up, ask in turns, show, and say what was found."""
    from rich.console import Console

    from apparate_llm.demo.sides import Sides
    from apparate_llm.demo.verdict import verdict
    from apparate_llm.progress import Progress

    prompt = args.prompt or default_prompt(client.body["model"])
    sides = Sides(client, prompt, bound=args.accuracy_bound)
    with Progress(Console(stderr=True)) as progress, progress.stage("warms up", total=math.inf):
        sides.warm_up()
    console.print(f"Model: {Path(client.body['model']).name}")
    console.print(f"Prompt: {prompt}", markup=False)
    sides.show_first(console)
    with (
        Progress(Console(stderr=True)) as progress,
        progress.stage("asks again", total=args.repeat - 1, unit="answers") as stage,
    ):
        for number in range(1, args.repeat):
            sides.ask_again()
            stage.update(number)
    console.print(verdict(sides.off, sides.on), style="bold", soft_wrap=True)


def default_prompt(model: str) -> str:
    """Text of the kind that the model was made for, by its name."""
    return CODE_PROMPT if "code" in Path(model).name.lower() else CHAT_PROMPT
