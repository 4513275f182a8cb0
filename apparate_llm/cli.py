"""The `apparate-llm` command."""

import argparse
import atexit
import os
import sys
import traceback

from pydantic import ValidationError

from apparate_llm import __version__
from apparate_llm.flags import OneLineParser
from apparate_llm.lifeline import STDERR, Terminated
from apparate_llm.redact import without_secrets

EXIT_CODES = {
    0: "done",
    1: "something failed, or `doctor` found a problem, or `eval steady --limit` was exceeded",
    2: "bad input: one line says what was wrong, what was got and what is allowed",
    130: "stopped by Ctrl-C (SIGINT); a server that is up ends with 0",
    143: "stopped by SIGTERM; a server that is up ends with 0",
}


FIRST_STEPS = f"""\
apparate-llm {__version__}: LLM serving with early exits, on vLLM. To begin:
  apparate-llm demo                        one prompt with exits off and on, side by side
  apparate-llm serve                       serve a small model on port 8000, by OpenAI's API
  apparate-llm chat                        talk to that server
  apparate-llm prepare MODEL --out RAMPS   make exits for your own model
  apparate-llm eval quick                  measure against plain vLLM
  apparate-llm doctor                      what is wrong with this installation, and the fix
All commands: apparate-llm --help. Their options: apparate-llm COMMAND --help"""


def build_parser() -> OneLineParser:
    from apparate_llm.chat import add_chat
    from apparate_llm.demo.command import add_demo
    from apparate_llm.doctor import add_doctor
    from apparate_llm.eval.command import add_eval
    from apparate_llm.prepare.command import add_prepare, add_ramps
    from apparate_llm.quantize import add_quantize
    from apparate_llm.replay import add_replay
    from apparate_llm.serve import add_serve
    from apparate_llm.tune.command import add_tune

    parser = OneLineParser(
        prog="apparate-llm",
        description="LLM serving with early exits, on vLLM. To begin: apparate-llm demo",
    )
    parser.add_argument("--version", action="version", version=f"apparate-llm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=OneLineParser)
    add_demo(subparsers)
    add_serve(subparsers)
    add_chat(subparsers)
    add_doctor(subparsers)
    add_eval(subparsers)
    add_prepare(subparsers)
    add_ramps(subparsers)
    add_quantize(subparsers)
    add_replay(subparsers)
    add_tune(subparsers)
    return parser


def spelt_out(argv: list[str]) -> list[str]:
    """The flags of `serve` in one spelling, as vLLM takes many; those of the other commands as they are, but for a
    flag that is another one's value, which argparse takes behind = only."""
    from apparate_llm.vllm_flags import normalised

    if argv[:1] == ["serve"]:
        return ["serve", *normalised(argv[1:])]
    spelt: list[str] = []
    for token in argv:
        if spelt and spelt[-1] == "--vllm-flag":
            token = f"{spelt.pop()}={token}"
        spelt.append(token)
    return spelt


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValidationError):  # of vLLM's own settings
        return "; ".join(item["msg"] for item in error.errors(include_url=False))
    return " ".join(str(error).split()) or type(error).__name__


def hush() -> None:
    """The last that is called of what is registered so: later only libraries speak, and one of vLLM's then tells at
    length of all that was never given back."""
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except BrokenPipeError:
        pass
    except OSError as error:  # Python's own words on it come too late
        print(f"apparate-llm: error: cannot write: {error.strerror}", file=sys.stderr)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, STDERR)
    os.close(nothing)


def main(argv: list[str] | None = None) -> int:
    """Exit code, one of EXIT_CODES."""
    if argv is None:  # this process is the command's
        atexit.register(hush)
        argv = sys.argv[1:]
    if not argv:
        print(FIRST_STEPS, file=sys.stderr)
        return 2
    args = argparse.Namespace()
    try:
        args, rest = parsed(argv)
        code: int = args.run(args, rest) if args.command == "serve" else args.run(args)
        return code
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so at its end
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            traceback.print_exc()
        print(f"apparate-llm: error: {without_secrets(one_line(error), argv)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"apparate-llm: error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stop:
        name, code = ("SIGTERM", 143) if isinstance(stop, Terminated) else ("SIGINT", 130)
        again = "; the same command goes on where it stopped" if getattr(args, "goes_on", False) else ""
        print(f"apparate-llm: stopped by {name}{again}", file=sys.stderr)
        return code


def parsed(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = build_parser()
    args, rest = parser.parse_known_args(spelt_out(argv))
    if args.command is None and rest in ([], ["--"]):
        parser.error("no command was given; `apparate-llm --help` lists them")
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


if __name__ == "__main__":
    sys.exit(main())
