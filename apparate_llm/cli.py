"""The `apparate-llm` command."""

import sys

from apparate_llm import __version__
from apparate_llm.knobs import OneLineParser


def build_parser() -> OneLineParser:
    from apparate_llm.chat import add_chat
    from apparate_llm.doctor import add_doctor
    from apparate_llm.eval.command import add_eval
    from apparate_llm.ramps.prepare.command import add_prepare, add_ramps
    from apparate_llm.replay import add_replay
    from apparate_llm.serve import add_serve

    parser = OneLineParser(prog="apparate-llm", description="LLM serving with early exits, on vLLM.")
    parser.add_argument("--version", action="version", version=f"apparate-llm {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    add_serve(subparsers)
    add_doctor(subparsers)
    add_chat(subparsers)
    add_eval(subparsers)
    add_prepare(subparsers)
    add_ramps(subparsers)
    add_replay(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 fine, 1 something failed, 2 bad input (one line says what)."""
    from apparate_llm.serve import name_model

    parser = build_parser()
    args, rest = parser.parse_known_args(name_model(sys.argv[1:] if argv is None else argv))
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args, rest) if args.command == "serve" else args.run(args)
    except ValueError as error:
        print(f"apparate-llm: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"apparate-llm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
