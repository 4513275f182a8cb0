"""The `prepare` and `ramps` parts of the command line."""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from apparate_llm.eval.values import positive_list
from apparate_llm.flags import Commands, OneLineParser, Paragraphs, check_new_file, check_new_folder, positive, seed
from apparate_llm.host.options import kept_tuning_from
from apparate_llm.lifeline import exit_on_sigterm
from apparate_llm.named_model import add_model, folder_here, model_of
from apparate_llm.prepare.given import ramps_and_model
from apparate_llm.progress import Progress
from apparate_llm.quiet_log import log_of_engines
from apparate_llm.redact import redacted

if TYPE_CHECKING:
    from apparate_llm.prepare.plan import Plan
    from apparate_llm.prepare.prompts import Messages

DEFAULT_TIME_BUDGET = "60m"
UNITS = {"s": 1, "m": 60, "h": 3600}
COSTS = """\
what it costs, and what that brings:
  --time-budget  All stages are within it, more than half of it writes text. With 45 minutes two cores
                 wrote 425,000 answer tokens of a model with half a billion parameters.
  --tokens       Text is what limits ramps; each doubling brings less than the one before. The shipped
                 ones had 1.25 million (Qwen2.5-Coder) and 4.7 million tokens (SmolLM2). On disk a token
                 takes about 8 bytes times the model's hidden size (with two depths), until OUT/work is
                 deleted.
  --depths       Each depth but the first adds half of the first one's training time, and no text.
                 `serve` takes the depth that pays most. A deeper ramp agrees more often, and each of
                 its draft steps runs more blocks.
  --ramp-vocab   A ramp predicts no other tokens. Each draft step reads hidden size times vocabulary
                 weights, 8192 of SmolLM2's are 9.4 MB in bfloat16.
  --prompts      They cost no time: a third of the prompts are yours, for as long as these last. Ramps are
                 worth most on text like what they were trained on.
What memory and disk a run takes is said before it begins."""
EVALUATION_COSTS = """\
The model loads and answers all prompts, many at once; measuring takes seconds. Progress is shown meanwhile."""


def add_prepare(subparsers: Commands) -> None:
    parser: OneLineParser = subparsers.add_parser(
        "prepare",
        help="make ramps for a model",
        description="Makes ramps for a model without any data. The model writes and answers its own prompts; ramps are "
        "trained on what it computes meanwhile and calibrated, and their cost is measured on this machine. An "
        "interrupted run goes on where it stopped when the same command is given again.",
        epilog=COSTS,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, help="ramp folder to make, with report.html and report.json")
    parser.add_argument(
        "--prompts", type=Path, help="your own prompts, mixed in: JSONL with `turns`, `prompt` or `messages`"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--tokens", type=positive, help="number of answer tokens to train on; more are better")
    amount.add_argument(
        "--time-budget",
        type=duration,
        metavar="TIME",
        help=f"of the whole preparation, e.g. 45m, 2h (default: {DEFAULT_TIME_BUDGET})",
    )
    parser.add_argument(
        "--depths",
        default="auto",
        help="blocks before each ramp, e.g. 0,2,4 (default: auto: 0, and a twelfth of the model's)",
    )
    parser.add_argument("--ramp-vocab", type=positive, default=8192, help="tokens a ramp can predict (default: 8192)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of prompts and training (default: 0)")
    parser.add_argument("--enforce-eager", action="store_true", help="measure costs as served with --enforce-eager")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="at the end measure the gain as well, on --prompts or on eval's; that takes minutes more",
    )
    parser.set_defaults(run=run_prepare, goes_on=True)


def add_ramps(subparsers: Commands) -> None:
    parser: OneLineParser = subparsers.add_parser("ramps", help="look at ramps, measure and calibrate them")
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=OneLineParser)
    _add_show(kinds)
    _add_evaluate(kinds)
    _add_calibrate(kinds)
    _add_verify(kinds)


def _add_show(kinds: Commands) -> None:
    show: OneLineParser = kinds.add_parser(
        "show", help="what a ramp folder holds", description="Reads the folder and loads no model.", allow_abbrev=False
    )
    show.add_argument("folder", type=Path, help="ramp folder")
    show.set_defaults(run=run_show)


def _add_evaluate(kinds: Commands) -> None:
    evaluate: OneLineParser = kinds.add_parser(
        "evaluate",
        help="acceptance rates on your prompts",
        description="Lets the model answer the prompts greedily and measures how often each ramp agrees with it: the "
        "acceptance rate at each position.",
        epilog=EVALUATION_COSTS,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    add_answering(evaluate, several=False)
    evaluate.add_argument("--json", type=Path, help="file to write the results to")
    evaluate.set_defaults(run=run_evaluate)


def _add_calibrate(kinds: Commands) -> None:
    calibrate: OneLineParser = kinds.add_parser(
        "calibrate",
        help="fit the confidence of ramps to your prompts",
        description="Lets the model answer the prompts greedily and moves each ramp's calibration half-way to what "
        "that says. Only ramps.json of the folder changes.",
        epilog=EVALUATION_COSTS,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    add_answering(calibrate, several=True)
    calibrate.set_defaults(run=run_calibrate)


def _add_verify(kinds: Commands) -> None:
    verify: OneLineParser = kinds.add_parser(
        "verify",
        help="predicted gain of ramps against measured",
        description="Predicts TPT with lossless exits / plain vLLM, from acceptance rates on the prompts and "
        "from costs on this machine. Then it measures: both servers are started and interleaved. That takes minutes "
        "and wants the machine to itself.",
        allow_abbrev=False,
    )
    add_answering(verify, several=False, required=False)
    verify.add_argument(
        "--concurrency",
        type=positive_list,
        default=[1, 4, 16],
        metavar="N,N",
        help="numbers of clients (default: 1,4,16)",
    )
    verify.add_argument("--json", type=Path, help="file to write the results to")
    verify.set_defaults(run=run_verify)


def add_answering(parser: argparse.ArgumentParser, *, several: bool, required: bool = True) -> None:
    parser.add_argument("folder", type=Path, help="ramp folder")
    add_model(parser, as_flag=True)
    parser.add_argument(
        "--prompts",
        type=Path,
        required=required,
        nargs="+" if several else None,
        help="JSONL with `turns`, `prompt` or `messages`, and `category`" + ("" if required else " (default: eval's)"),
    )
    parser.add_argument("--max-tokens", type=positive, default=128, help="longest answer, in tokens (default: 128)")


def duration(text: str) -> float:
    """Seconds of `90s`, `45m`, `1.5h`."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smh])", text)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 45m or 1.5h, got {text!r}")
    return float(match[1]) * UNITS[match[2]]


def parse_depths(text: str, num_layers: int) -> tuple[int, ...]:
    from apparate_llm.prepare.plan import automatic_depths

    if text == "auto":
        return automatic_depths(num_layers)
    parts = text.split(",")
    depths = {int(part) for part in parts if part.strip().isdecimal()}
    if len(depths) < len(parts) or max(depths) >= num_layers:
        raise ValueError(f"--depths must be auto or different numbers from 0 to {num_layers - 1}, got {text!r}")
    return tuple(sorted(depths))


def run_prepare(args: argparse.Namespace) -> int:
    """Bad input is found before anything is written."""
    from apparate_llm.eval.prompts import load_prompts
    from apparate_llm.launch import check_build, reexec_with_libraries
    from apparate_llm.prepare.engine import environment

    kept_tuning_from()  # raises for a variable that its servers cannot go by
    user_prompts = [prompt.messages for prompt in load_prompts(args.prompts)] if args.prompts else []
    if args.model is not None and (here := folder_here(args.model)) is not None:
        check_architecture(here)
    check_new_folder("--out", args.out)
    check_build()
    reexec_with_libraries(environment())

    from apparate_llm.prepare.workspace import Workspace

    exit_on_sigterm()
    plan = plan_of(args, model_of(args, check_architecture), user_prompts)
    with log_of_engines(Workspace(args.out).path("vllm.log")) as console:
        from apparate_llm.prepare.pipeline import prepare

        prepare(plan, console)
        for line in what_next(args.model, args.out, args.revision):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def plan_of(args: argparse.Namespace, model: Path, user_prompts: "list[Messages]") -> "Plan":
    """What the flags leave open is chosen by the model."""
    from apparate_llm.prepare.plan import Plan, automatic_aux_layers, automatic_intermediate_size
    from apparate_llm.ramps.checkpoint import BaseModelInfo

    info = BaseModelInfo.of(model)
    return Plan(
        model=model,
        out=args.out,
        depths=parse_depths(args.depths, info.num_hidden_layers),
        aux_layers=automatic_aux_layers(info.num_hidden_layers),
        tokens=args.tokens,
        time_budget_s=None if args.tokens else args.time_budget or duration(DEFAULT_TIME_BUDGET),
        seed=args.seed,
        ramp_vocab=min(args.ramp_vocab, info.vocab_size),
        intermediate_size=automatic_intermediate_size(info.hidden_size),
        user_prompts=user_prompts,
        enforce_eager=args.enforce_eager,
        verify=args.verify,
    )


def check_architecture(folder: Path) -> None:
    """Raises UnsupportedModelError, or ConfigError for one that cannot be served here."""
    from apparate_llm.host.dtype import check_kernels
    from apparate_llm.models.architectures import architecture_of, early_exit_architecture

    check_kernels(folder)
    early_exit_architecture(architecture_of(folder))


def what_next(model: str | None, out: Path, revision: str | None = None) -> list[str]:
    """The last lines of a preparation."""
    named = [] if model is None else [model, *([] if revision is None else ["--revision", revision])]
    return [
        f"report: {out / 'report.html'}",
        f"{out / 'work'} is only needed to go on with more tokens or time; delete it to free the space",
        f"next: {shlex.join(['apparate-llm', 'serve', *named, '--ramps', str(out)])}",
    ]


def run_show(args: argparse.Namespace) -> int:
    from rich.console import Console

    from apparate_llm.prepare.shown import held_out_table
    from apparate_llm.ramps.checkpoint import MANIFEST, WEIGHTS, RampError, read_manifest

    manifest = read_manifest(args.folder)
    console = Console()
    size = (args.folder / WEIGHTS).stat().st_size
    base = manifest.base_model
    console.print(
        f"{manifest.kind} ramps for {base.architecture}, {base.num_hidden_layers} blocks ({base.fingerprint})"
    )
    vocabulary = f"ramp vocabulary {manifest.ramp_vocab} of {base.vocab_size} tokens"
    aux_states = f"auxiliary hidden states after blocks {manifest.aux_layers or 'none'}"
    console.print(f"{size / 1e6:.1f} MB, {vocabulary}, {aux_states}")
    try:
        if (tokens := manifest.training.get("answer_tokens")) is not None:
            console.print(f"trained on {tokens:,} answer tokens; {manifest.training.get('data', 'unknown data')}")
        console.print(held_out_table(manifest))
    except (ValueError, TypeError, AttributeError) as error:
        raise RampError(f"damaged {args.folder / MANIFEST}: training: {error}") from None
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    from apparate_llm.eval.prompts import load_prompts
    from apparate_llm.files import write_atomically
    from apparate_llm.prepare.shown import print_evaluation

    asked = load_prompts(args.prompts)
    prompts, categories = [prompt.messages for prompt in asked], [prompt.category for prompt in asked]
    check_new_file("--json", args.json)
    manifest, model = ramps_and_model(args)

    with log_of_engines() as console, Progress(console) as progress:
        from apparate_llm.prepare.evaluate import evaluate

        most = args.max_tokens
        result = evaluate(args.folder, manifest, model, prompts, categories, max_tokens=most, progress=progress)
    print_evaluation(result)
    if args.json:
        document = {"command": shlex.join(["apparate-llm", *redacted(sys.argv[1:])]), **result.model_dump()}
        write_atomically(args.json, (json.dumps(document, indent=1) + "\n").encode())
        print(f"written: {args.json}", file=sys.stderr)
    return 0


def run_calibrate(args: argparse.Namespace) -> int:
    from apparate_llm.eval.prompts import load_prompts
    from apparate_llm.files import write_atomically
    from apparate_llm.ramps.checkpoint import MANIFEST

    prompts = [prompt.messages for file in args.prompts for prompt in load_prompts(file)]
    manifest, model = ramps_and_model(args, siblings=False)  # what it writes is of the model that the ramps are for
    check_new_file("ramp folder", args.folder / MANIFEST)

    with log_of_engines() as console, Progress(console) as progress:
        from apparate_llm.prepare.calibrate import recalibrate

        most = args.max_tokens
        manifest, errors = recalibrate(args.folder, manifest, model, prompts, max_tokens=most, progress=progress)
    write_atomically(args.folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    for depth, (before, after) in errors.items():
        print(f"depth {depth}: calibration error on these prompts {before:.3f} -> {after:.3f}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from apparate_llm.eval.prompts import prompts_to_send
    from apparate_llm.files import write_atomically
    from apparate_llm.prepare.shown import print_verified

    kept_tuning_from()  # raises for a variable that its servers cannot go by
    prompts = prompts_to_send(args.prompts)
    check_new_file("--json", args.json)
    manifest, model = ramps_and_model(args)

    with log_of_engines() as console, Progress(console) as progress:
        from apparate_llm.prepare.verify import EVALS, YOURS, verify_folder

        verified = verify_folder(
            args.folder,
            manifest,
            model,
            prompts,
            whose=YOURS if args.prompts else EVALS,
            progress=progress,
            clients=args.concurrency,
            max_tokens=args.max_tokens,
        )
    print_verified(verified)
    if args.json:
        document = {"command": shlex.join(["apparate-llm", *redacted(sys.argv[1:])]), **verified}
        write_atomically(args.json, (json.dumps(document, indent=1) + "\n").encode())
        print(f"written: {args.json}", file=sys.stderr)
    return 0
