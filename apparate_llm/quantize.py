"""`apparate-llm quantize`: a model's W8A8 folder, what it costs in agreement, and what to do with it."""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from apparate_llm.config import ConfigError
from apparate_llm.files import write_atomically
from apparate_llm.flags import Commands, check_new_file
from apparate_llm.machine import machine
from apparate_llm.named_model import add_model, model_of
from apparate_llm.naming import model_name
from apparate_llm.progress import Progress

if TYPE_CHECKING:
    from apparate_llm.agreement import Agreement

MEASURE_S = 120.0
SCHEMA_VERSION = 1


def add_quantize(subparsers: Commands) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="make a W8A8 (int8) folder of a model",
        description="Writes MODEL with its linear layers in int8: a scale for each output channel, inputs quantised "
        "token by token. Embedding, norms and head stay as they are. It takes no data, and seconds. "
        "Then says how near the new model stays to MODEL. Ramps of MODEL serve both.",
        allow_abbrev=False,
    )
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--measure-s",
        type=seconds,
        default=MEASURE_S,
        metavar="S",
        help=f"about how long to compare the two models' tokens; 0: not at all (default: {MEASURE_S:.0f})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write sizes and agreement there")
    parser.set_defaults(run=run_quantize)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be seconds, at least 0, got {text!r}")
    return value


def run_quantize(args: argparse.Namespace) -> int:
    from apparate_llm.lifeline import exit_on_sigterm
    from apparate_llm.w8a8 import LOAD_FORMAT, check_config, check_quantisable

    out: Path = args.out
    check_places(out, args.json)
    model = model_of(args, check_config, load_format=LOAD_FORMAT)
    check_quantisable(model)
    exit_on_sigterm()
    console, name = Console(file=sys.stderr), model_name(model.resolve())
    took_s = write(model, out, console)
    sizes = size_mb(out), size_mb(model)
    print(f"written: {out} ({sizes[0]:.0f} MB, {name} has {sizes[1]:.0f} MB, {took_s:.0f} s)", flush=True)
    agreement = cost_of(model, out, args.measure_s, console) if args.measure_s > 0 else None
    if args.json:
        results = {"model": name, "took_s": took_s, "made_mb": sizes[0], "original_mb": sizes[1]}
        keep(args.json, results | {"agreement": None if agreement is None else agreement._asdict()})
    print(f"next: {shlex.join(['apparate-llm', 'serve', str(out)])}")
    return 0


def check_places(out: Path, json_file: Path | None) -> None:
    """Raises ConfigError where nothing new can be written."""
    if out.exists():
        raise ConfigError(f"--out: {out} is there already: name a new folder")
    check_new_file("--out", out)
    check_new_file("--json", json_file)


def write(model: Path, out: Path, console: Console) -> float:
    """Seconds that it took."""
    from apparate_llm.sealed import becoming
    from apparate_llm.w8a8 import write_w8a8

    began = time.monotonic()
    with (
        Progress(console) as progress,
        progress.stage("quantise", total=math.inf, facts=f"to {out}") as stage,
        becoming(out.absolute()) as work,
    ):
        write_w8a8(model, work, stage)
    return time.monotonic() - began


def keep(file: Path, results: Mapping[str, object]) -> None:
    from apparate_llm.eval.run import commit

    command = shlex.join(["apparate-llm", *sys.argv[1:]])
    document = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "commit": commit(),
        "machine": machine(),
        **results,
    }
    write_atomically(file, (json.dumps(document, indent=1) + "\n").encode())


def cost_of(model: Path, out: Path, limit_s: float, console: Console) -> "Agreement | None":
    """Printed as well. None of a model that can be asked nothing: its folder is made all the same."""
    from apparate_llm.agreement import NothingToAskError, agreement_of
    from apparate_llm.eval.prompts import load_prompts

    prompts, name = [prompt.messages for prompt in load_prompts(None)], model_name(model.resolve())
    try:
        with Progress(console) as progress:
            agreement = agreement_of(model, out, prompts, limit_s=limit_s, progress=progress)
    except NothingToAskError as error:
        print(f"not compared with {name}: {error}")
        return None
    print(f"against {name}: {agreement}")
    return agreement


def size_mb(folder: Path) -> float:
    """Of its weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
