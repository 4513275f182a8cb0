"""The `tune` part of the command line, and one run of it."""

import argparse
import json
import shlex
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from apparate_llm.eval.command import NOT_SHARED
from apparate_llm.eval.values import above_zero, positive_list
from apparate_llm.flags import (
    Commands,
    OneLineParser,
    Paragraphs,
    add_options,
    check_new_file,
    check_new_folder,
    config_of,
    positive,
)
from apparate_llm.lifeline import exit_on_sigterm
from apparate_llm.named_model import add_model, model_of

if TYPE_CHECKING:
    from rich.table import Table

    from apparate_llm.host.choice import Choice
    from apparate_llm.host.chosen import Chosen
    from apparate_llm.host.limits import CpuLimits
    from apparate_llm.tune.decide import Trial
    from apparate_llm.tune.trials import TunePlan

COSTS = """\
Measures how this machine serves the model fastest, and keeps it for `serve`, `eval` and `prepare`: how many threads
compute, with which kernels and pages, how engine and worker wait for each other, and whether they are one process. Each
candidate is a server, interleaved with one as it is used so far. It takes that one's place where the whole 95 %
interval of the ratio of times per token lies below 0.98, with gaps no longer, and texts that do not depend on the load.

what it costs:
  Four to six candidates, each started (half a minute; with other threads the model is compiled anew, up to two
  minutes more) and measured for four times --seconds, with two numbers of clients: about 20 minutes. Nothing else may
  run meanwhile."""


def add_tune(subparsers: Commands) -> None:
    parser: OneLineParser = subparsers.add_parser(
        "tune",
        help="measure how this machine serves a model fastest, and keep it",
        description=COSTS,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    add_model(parser)
    parser.add_argument("--clients", type=positive_list, default=[1, 4], help="numbers of clients (default: 1,4)")
    parser.add_argument(
        "--seconds",
        type=above_zero,
        default=30.0,
        help="seconds that each server is measured with each number of clients (default: 30)",
    )
    parser.add_argument(
        "--prompts", type=Path, default=Path("chat"), help="prompts, as `eval tpt --help` says (default: chat)"
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=64, help="longest answer, in tokens; lengths vary (default: 64)"
    )
    parser.add_argument("--json", type=Path, help="file to write what was measured to")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs (default: a temporary one)")
    parser.add_argument(
        "--print-env",
        action="store_true",
        help="measure nothing: print what is kept as variables, with which plain vLLM uses this machine the same way",
    )
    parser.add_argument(
        "--start-timeout-s", type=positive, default=900, help="longest wait for a server to start (default: 900)"
    )
    parser.add_argument(
        "--vllm-flag", action="append", default=[], metavar='"--FLAG VALUE"', help="vLLM flag for servers; repeatable"
    )
    left_out = (*(name for name in NOT_SHARED if name != "policy"), "huge_pages")
    add_options(parser, leave_out=left_out)
    parser.set_defaults(run=run_tune)


def run_tune(args: argparse.Namespace) -> int:
    """Raises ValueError for bad input, RuntimeError where servers do not run."""
    from apparate_llm.eval.plan import check_model
    from apparate_llm.host.chosen import choose
    from apparate_llm.host.dtype import dtype_flags
    from apparate_llm.host.options import Tuning
    from apparate_llm.machine import writable_cache
    from apparate_llm.vllm_flags import normalised, split_flag

    exit_on_sigterm()
    check_new_file("--json", args.json)
    check_new_folder("--logs", args.logs)
    if args.max_tokens < 2:
        raise ValueError("--max-tokens: at least 2, as a single token has no time per output token, got 1")
    flags = normalised([part for text in args.vllm_flag for part in split_flag(text)])
    model = model_of(args, check_model)
    if dtype := dtype_flags(model, flags, num_servers=2):
        flags, args.vllm_flag = [*flags, *dtype], [*args.vllm_flag, " ".join(dtype)]
    options = options_of_servers(args, model)
    chosen = choose(Tuning(), model, flags, config_of(options))
    if args.print_env:
        print_variables(chosen, flags)
        return 0
    writable_cache()
    measure_and_keep(plan_of(args, model, options, chosen), flags, args.json)
    return 0


def print_variables(chosen: "Chosen", flags: list[str]) -> None:
    """As a shell reads them, libraries to preload included. flags: of the servers that were measured."""
    from apparate_llm.launch import server_environment

    env = {"LD_PRELOAD": server_environment().get("LD_PRELOAD", "")} | chosen.environment
    for name, value in env.items():
        if value:
            print(f"export {name}={shlex.quote(value)}")
    if flags:
        print(f"# for servers with {shlex.join(flags)}")


def options_of_servers(args: argparse.Namespace, model: Path) -> tuple[str, ...]:
    """As flags. Without a word on it, exits are on where the model has ramps."""
    from apparate_llm.eval.plan import option_flags
    from apparate_llm.flags import options_from

    options_from(args)  # raises for a value that is not allowed
    without = args.policy is None and args.ramps is None and not has_ramps(model)
    return ("--accuracy-bound", "0", *option_flags(args), *(("--policy", "off") if without else ()))


def plan_of(args: argparse.Namespace, model: Path, options: tuple[str, ...], chosen: "Chosen") -> "TunePlan":
    from apparate_llm.config import ConfigError
    from apparate_llm.eval.plan import server_flags
    from apparate_llm.eval.prompts import prompts_to_send
    from apparate_llm.eval.systems import ModelChoice
    from apparate_llm.host.options import num_ranks
    from apparate_llm.launch import check_build
    from apparate_llm.machine import cache_folder
    from apparate_llm.tune.trials import TunePlan

    check_build()
    flags = server_flags(args.vllm_flag, num_servers=2)
    if num_ranks(flags) > 1:
        raise ConfigError("--vllm-flag: vLLM binds the threads of several workers itself: nothing to tune")
    check_variables(chosen)
    return TunePlan(
        served=ModelChoice(model, tuple(flags), options),
        old=chosen.choice,
        limits=chosen.limits,
        prompts=prompts_to_send(args.prompts),
        clients=args.clients,
        seconds=args.seconds,
        max_tokens=args.max_tokens,
        config=config_of(options),
        logs=args.logs or Path(tempfile.mkdtemp(prefix="apparate-tune-")),
        cache=cache_folder(),
        start_timeout_s=args.start_timeout_s,
    )


def check_variables(chosen: "Chosen") -> None:
    """Raises ConfigError where one is set by hand that a candidate needs: it would stay as it is."""
    from apparate_llm.config import ConfigError
    from apparate_llm.host.choice import (
        BIND,
        HUGE_PAGES,
        KERNELS,
        OWN_PROCESS,
        QUEUES,
        RESERVED,
        WORKER,
        has_zentorch,
    )

    needed = (BIND, RESERVED, HUGE_PAGES, QUEUES, WORKER, OWN_PROCESS, *([KERNELS] if has_zentorch() else []))
    by_hand = [name for name in needed if name in chosen.given]
    if by_hand:
        raise ConfigError(f"{', '.join(by_hand)}: set by hand, and would stay so in all servers: unset it to measure")


def has_ramps(model: Path) -> bool:
    from apparate_llm.config import parse_config
    from apparate_llm.models.architectures import architecture_of
    from apparate_llm.preflight import preflight_ramps

    try:
        preflight_ramps(parse_config({}), model, architecture_of(model))
    except ValueError:
        return False
    return True


def measure_and_keep(plan: "TunePlan", flags: list[str], file: Path | None) -> None:
    from rich.console import Console

    from apparate_llm.files import private_folder, write_atomically
    from apparate_llm.host.store import Kept, key_of, save
    from apparate_llm.machine import machine
    from apparate_llm.progress import Progress
    from apparate_llm.tune.candidates import name_of
    from apparate_llm.tune.decide import best_of
    from apparate_llm.tune.trials import measure

    private_folder(plan.logs)
    console = Console(stderr=True)
    with Progress(console) as progress:
        trials = measure(plan, progress, lambda trial: progress.say(one_line(trial, plan.limits)))
    best = best_of(trials)
    choice = plan.old if best is None else best.choice
    kept = Kept(
        key=key_of(plan.served.model, flags, plan.limits, plan.config),
        choice=choice,
        measured=datetime.now().astimezone().isoformat(timespec="seconds"),
        table=[trial.as_dict() for trial in trials],
    )
    Console(width=120).print(table_of(trials, best, plan.limits, old=plan.old))
    if file is not None:
        document = kept.model_dump() | {"machine": machine(), "old": plan.old.model_dump()}
        write_atomically(file, (json.dumps(document, indent=1) + "\n").encode())
    save(plan.cache, kept)
    stays = " (as before)" if best is None else ""
    console.print(f"kept: {name_of(choice, plan.limits)}{stays}; logs: {plan.logs}", soft_wrap=True, markup=False)


def one_line(trial: "Trial", limits: "CpuLimits") -> str:
    from apparate_llm.eval.tables import with_interval
    from apparate_llm.tune.candidates import name_of

    if not trial.times:
        return f"{name_of(trial.choice, limits)}: {trial.problem}"
    return f"{name_of(trial.choice, limits)}: {with_interval(*trial.ratio(), 3)} of the old time per token"


def table_of(trials: list["Trial"], best: "Trial | None", limits: "CpuLimits", *, old: "Choice") -> "Table":
    """A row for each candidate and number of clients, the old choice's own times beside it."""
    from apparate_llm.eval.tables import WITH_INTERVAL, console_table, number, with_interval
    from apparate_llm.tune.candidates import name_of

    rows = []
    for trial in trials:
        verdict = "kept" if trial is best else trial.verdict() or "slower than what is kept"
        if not trial.times:
            rows.append([name_of(trial.choice, limits), "", "", "", "", "", "", verdict])
        for place, (clients, (ours, theirs)) in enumerate(trial.times.items()):
            ratio = with_interval(*trial.ratio([clients]), 3)
            times = [ours.tpt_ms, theirs.tpt_ms, ours.gap_p99_ms, theirs.gap_p99_ms]
            name = name_of(trial.choice, limits) if place == 0 else ""
            rows.append([name, str(clients), *(number(value, 1) for value in times), ratio, "" if place else verdict])
    columns = ["system", "clients", "TPT ms", "old", "gap p99 ms", "old", f"ratio, {WITH_INTERVAL}", ""]
    return console_table(f"Compared with: {name_of(old, limits)}", columns, rows)
