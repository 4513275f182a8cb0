"""The `eval` part of the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path

from apparate_llm.address import add_api_key
from apparate_llm.eval.values import (
    OBJECTIVES,
    above_zero,
    objectives,
    paths,
    positive_list,
    rates,
    shares,
    temperature,
)
from apparate_llm.flags import Commands, OneLineParser, Paragraphs, add_options, positive, seed
from apparate_llm.host.options import KeptTuning, add_tuning
from apparate_llm.lifeline import exit_on_sigterm
from apparate_llm.named_model import add_model

DEFAULT_SYSTEMS = "vllm,lossless,early-exit,ngram,hf-early-exit"
NOT_SHARED = (
    "policy",
    "accuracy_bound",
    "feedback_log",
    "controller_state",
    "tenants",
)  # a system's own, or a file that only one may write
TPT_COSTS = """

what it costs:
  Each server starts once, in half a minute to several. Then each system answers every prompt, once for each load and
  pass (--repeat), one system at a time: halve any of these and the time halves. With several clients half of the time
  goes to requests that do not count. More prompts make the intervals narrower: four times as many, half as wide; an
  interval needs eight blocks, each of as many requests as there are clients. `make bench` is meant to take ten
  minutes."""

STEADY_COSTS = """

what it costs:
  A level, one number of clients, takes --settle-s and --turns times --turn-s for each system: with the defaults 105 s.
  With --switch it takes --learn-s and, for each turn, twice --settle-s and --turn-s: with the defaults 430 s. Four
  times as many turns make intervals half as wide."""


def add_eval(subparsers: Commands) -> None:
    parser = subparsers.add_parser("eval", help="measure what early exits bring")
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=OneLineParser)
    _add_quick(kinds)
    _add_tpt(kinds)
    _add_drift(kinds)
    _add_steady(kinds)
    report: OneLineParser = kinds.add_parser(
        "report",
        help="draw the report of an evaluation again",
        description="Draws report.html of `eval tpt` or `drift` again, from what was measured, and prints the tables. "
        "No server is needed.",
        allow_abbrev=False,
    )
    report.add_argument("folder", type=Path, help="folder that was --out of the evaluation")
    report.set_defaults(run=_later("run_report"))
    compare: OneLineParser = kinds.add_parser(
        "compare",
        help="two evaluations side by side",
        description="Prints the figures of two evaluations side by side, after a warning of what was not measured "
        "alike. Not for `eval steady`.",
        allow_abbrev=False,
    )
    compare.add_argument("a", type=Path, help="an evaluation: its folder or results.json")
    compare.add_argument("b", type=Path, help="the other one")
    compare.set_defaults(run=_later("run_compare"))


def _add_quick(kinds: Commands) -> None:
    quick: OneLineParser = kinds.add_parser(
        "quick",
        help="plain vLLM against early exits, in minutes",
        description="Starts plain vLLM and a server with early exits on the same model and compares them over HTTP, "
        "the two interleaved in short blocks of prompts. Greedy decoding.",
        allow_abbrev=False,
    )
    _add_common(quick, repeat=2)
    quick.add_argument("--concurrency", type=positive_list, default=[1, 4], help="numbers of clients (default: 1,4)")
    quick.add_argument("--json", type=Path, help="file to write the results to")
    quick.add_argument("--logs", type=Path, help="folder for the servers' logs (default: a temporary one)")
    quick.add_argument("--prompts", type=Path, help="prompts, as `eval tpt --help` says (default: quick)")
    add_options(quick, leave_out=("tenants",))
    quick.set_defaults(run=_later("run_quick"))


def _add_tpt(kinds: Commands) -> None:
    tpt: OneLineParser = kinds.add_parser(
        "tpt",
        help="the full evaluation: several systems, loads and measures, with a report",
        description="Serves the model by several systems, each a server process of its own, and asks them the same "
        "prompts over HTTP with streaming, the systems interleaved block by block. Leaves raw timestamps, "
        "results.json and report.html in --out; the same command goes on after an interruption.",
        epilog=_systems_help() + TPT_COSTS,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    _add_common(tpt, repeat=1)
    _add_systems(tpt, DEFAULT_SYSTEMS)
    tpt.add_argument(
        "--prompts",
        type=Path,
        default=Path("chat"),
        help="chat (default), code, copy, quick, or a file: JSONL with turns, prompt or messages (Spec-Bench, "
        "MT-bench), ShareGPT JSON, or plain lines",
    )
    tpt.add_argument(
        "--prompt-tokens",
        type=positive_list,
        metavar="N1,N2",
        help="prompts of about these many tokens, the chat template not counted, made of the texts of --prompts: each "
        "load once for each, e.g. to see how long first tokens take",
    )
    _add_arrivals(tpt)
    tpt.add_argument(
        "--length",
        choices=("free", "fixed", "both", "varied"),
        help="where answers end: free (the default): by themselves, or at --max-tokens; fixed: always at --max-tokens; "
        "both: each load free and fixed; varied: by themselves, or at varied output lengths up to --max-tokens, "
        "so that many clients do not get synchronised",
    )
    _add_sampling(tpt)
    tpt.set_defaults(run=_later("run_tpt"), goes_on=True)


def _add_arrivals(tpt: OneLineParser) -> None:
    """When requests come: as clients have their answers, or at times of their own."""
    tpt.add_argument(
        "--concurrency",
        type=positive_list,
        help="numbers of clients that ask one after the other, e.g. 1,16 (default: 1,2,4,8)",
    )
    tpt.add_argument("--rate", type=rates, help="requests per second that arrive at random (Poisson), e.g. 0.5,1")
    tpt.add_argument(
        "--slice-s",
        type=above_zero,
        help="seconds of arrivals (--rate, --trace) after which the next system has its turn (default: 20)",
    )
    tpt.add_argument("--seed", type=seed, default=0, help="seed of arrivals and varied lengths (default: 0)")
    tpt.add_argument(
        "--trace",
        type=Path,
        help="requests arrive as in this CSV file with TIMESTAMP,ContextTokens,GeneratedTokens, as Azure's traces are",
    )
    tpt.add_argument("--trace-scale", type=above_zero, help="the times of --trace are multiplied by it (default: 1)")
    tpt.add_argument(
        "--num-requests", type=positive, help="number of requests taken from --trace (default: as many as prompts)"
    )


def _add_drift(kinds: Commands) -> None:
    drift: OneLineParser = kinds.add_parser(
        "drift",
        help="quality over time while the workload changes: A, B, A",
        description="Like `eval tpt`, with one workload, another and the first again in the life of one server.",
        epilog=_systems_help(),
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    _add_common(drift, repeat=1)
    _add_systems(drift, "vllm,early-exit")
    drift.add_argument(
        "--workloads",
        type=paths,
        default=[Path("chat"), Path("code")],
        help="the two sets of prompts (default: chat,code)",
    )
    drift.add_argument("--clients", type=positive, default=2, help="number of clients (default: 2)")
    drift.set_defaults(run=_later("run_drift"), goes_on=True)


def _add_steady(kinds: Commands) -> None:
    steady: OneLineParser = kinds.add_parser(
        "steady",
        help="clients in a closed loop: what exits bring and cost under full load",
        description="Every system has clients that ask again as soon as they have their answer. The systems are "
        "interleaved in turns of a few seconds, all others frozen in the middle of their answers, so that ratios are "
        "of turns side by side. With --switch one server's policy is switched between adaptive and off instead. Leaves "
        "results.json in --out, written after every level.",
        epilog=_systems_help() + STEADY_COSTS,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    add_model(steady)
    steady.add_argument("--out", type=Path, required=True, help="folder for all that is measured")
    steady.add_argument("--fresh", action="store_true", help="delete what --out holds of an earlier measurement")
    steady.add_argument(
        "--systems",
        default="vllm,lossless",
        help="names, see below; compared with vllm, else with the first (default: vllm,lossless)",
    )
    steady.add_argument("--switch", action="store_true", help="switch the policy of the one system named by --systems")
    _add_turns(steady)
    steady.add_argument(
        "--prompts", type=Path, default=Path("chat"), help="prompts, as `eval tpt --help` says (default: chat)"
    )
    steady.add_argument("--num-prompts", type=positive, help="use only the first N prompts")
    steady.add_argument(
        "--max-tokens", type=positive, default=96, help="longest answer, in tokens; lengths vary (default: 96)"
    )
    steady.add_argument(
        "--limit",
        type=above_zero,
        help="exit code 1 where TPT is more than so many times the first baseline's, e.g. 1.03",
    )
    _add_sampling(steady)
    _add_peers(steady)
    _add_options_of_systems(steady)
    _add_servers(steady)
    steady.set_defaults(run=_later("run_steady"))


def _add_turns(steady: OneLineParser) -> None:
    """How many clients, and how long they are measured."""
    steady.add_argument(
        "--clients",
        type=positive_list,
        default=[1, 16],
        help="numbers of clients, one level each, e.g. 1,16,1 (default: 1,16)",
    )
    steady.add_argument(
        "--turns", type=positive, default=20, help="turns of each system, or policy, at each level (default: 20)"
    )
    steady.add_argument("--turn-s", type=above_zero, default=5.0, help="seconds of a turn, 1 to 300 (default: 5)")
    steady.add_argument(
        "--settle-s",
        type=above_zero,
        default=5.0,
        help="seconds that do not count: of each system as a level begins, or after every switch (default: 5)",
    )
    steady.add_argument(
        "--learn-s", type=above_zero, default=30.0, help="with --switch: seconds before the first turn (default: 30)"
    )


def _add_common(parser: OneLineParser, *, repeat: int) -> None:
    add_model(parser)
    parser.add_argument("--num-prompts", type=positive, help="use only the first N prompts (of each set)")
    parser.add_argument("--max-tokens", type=positive, default=128, help="longest answer, in tokens (default: 128)")
    parser.add_argument(
        "--repeat",
        type=positive,
        default=repeat,
        help=f"passes over the prompts per system and load (default: {repeat})",
    )
    _add_servers(parser)


def _add_servers(parser: OneLineParser) -> None:
    parser.add_argument(
        "--start-timeout-s", type=positive, default=900, help="longest wait for a server to start (default: 900)"
    )
    parser.add_argument(
        "--vllm-flag",
        action="append",
        default=[],
        metavar='"--FLAG VALUE"',
        help="vLLM flag for all vLLM servers; repeatable",
    )
    add_api_key(parser)
    add_tuning(parser, KeptTuning)


def _add_sampling(parser: OneLineParser) -> None:
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        help="draw answers at random, 0 to 2 (default: 0, greedy); then texts are not compared",
    )
    parser.add_argument(
        "--sampling-seed",
        type=seed,
        help="with --temperature: a seed for each request, so that answers are the same again; such requests take no "
        "exits",
    )


def _add_systems(parser: OneLineParser, default: str) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is measured")
    parser.add_argument("--fresh", action="store_true", help="delete what --out holds of an earlier evaluation")
    parser.add_argument("--systems", default=default, help=f"names, see below (default: {default})")
    _add_options_of_systems(parser)
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar='"NAME=--option value"',
        help="early exits with these options; repeatable",
    )
    parser.add_argument(
        "--base-url",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a server that is running, any OpenAI-compatible; URL with or without /v1; repeatable",
    )
    _add_peers(parser)
    parser.add_argument(
        "--hf-layer", type=positive, help="number of blocks that hf-early-exit drafts with (default: half)"
    )
    parser.add_argument(
        "--slo", type=objectives, metavar="ttft=MS,tpt=MS", help=f"objectives of goodput: {', '.join(OBJECTIVES)} in ms"
    )


def _add_peers(parser: OneLineParser) -> None:
    parser.add_argument(
        "--llama-cpp",
        action="append",
        default=[],
        metavar='"NAME=FILE.gguf FLAGS"',
        help="llama.cpp's server with this model file; what its flags leave open is set as the others have it: all "
        "threads, a slot for each client, no prompts kept; repeatable",
    )
    parser.add_argument(
        "--llama-server", type=Path, metavar="PATH", help="llama.cpp's server program (default: the one on PATH)"
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="NAME",
        help="system that the others are compared with (default: vllm, a further one wherever it is measured); "
        "repeatable: texts are compared with the first one's",
    )


def _add_options_of_systems(parser: OneLineParser) -> None:
    parser.add_argument(
        "--accuracy-bounds",
        type=shares,
        default=[0.05],
        metavar="E1,E2",
        help="accuracy bounds of system early-exit (default: 0.05)",
    )
    add_options(parser, leave_out=NOT_SHARED)


def _systems_help() -> str:
    from apparate_llm.eval.systems import NAMES

    return "systems:\n" + "\n".join(f"  {name:14} {text}" for name, text in NAMES.items())


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """A command of `eval/run.py`, imported when it runs; leaves by the way that stops the servers, too."""

    def run(args: argparse.Namespace) -> int:
        from apparate_llm.eval import run as commands

        exit_on_sigterm()
        command: Callable[[argparse.Namespace], int] = getattr(commands, name)
        return command(args)

    return run
