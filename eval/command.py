"""The `eval` part of the command line."""

import argparse
import signal
from pathlib import Path
from typing import Any

from apparate_llm.knobs import OneLineParser, add_knobs, positive


def add_eval(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", help="measure what early exits bring")
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=OneLineParser)
    quick: OneLineParser = kinds.add_parser(
        "quick",
        help="plain vLLM against early exits, minutes",
        description="Starts plain vLLM and a server with early exits on the same model and compares them over HTTP, "
        "the two taking turns in short blocks of prompts. Greedy decoding.",
        allow_abbrev=False,
    )
    quick.add_argument("model", nargs="?", type=Path, help="model folder (default: the embedded one)")
    quick.add_argument("--prompts", type=Path, help="JSONL with `turns`, `prompt` or `messages` (default: built-in)")
    quick.add_argument("--num-prompts", type=positive, help="use only the first N prompts")
    quick.add_argument("--concurrency", type=positive_list, default=[1, 4], help="e.g. 1,4 (the default)")
    quick.add_argument("--max-tokens", type=positive, default=128, help="longest answer (default: 128)")
    quick.add_argument(
        "--repeat", type=positive, default=2, help="passes over the prompts per system and concurrency (default: 2)"
    )
    quick.add_argument("--json", type=Path, help="write the results there")
    quick.add_argument("--logs", type=Path, help="folder for the servers' logs (default: a temporary one)")
    quick.add_argument("--start-timeout-s", type=positive, default=900, help="longest wait for a server")
    quick.add_argument("--vllm-flag", action="append", default=[], metavar="FLAG", help="vLLM flag for both servers")
    add_knobs(quick)
    quick.set_defaults(run=run_quick)


def positive_list(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def run_quick(args: argparse.Namespace) -> int:
    from apparate_llm.eval.quick import quick

    def stop(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)  # leave by the way that stops the servers, too
    return quick(args)
