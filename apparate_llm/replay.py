"""`apparate-llm replay`: what a policy would have done with the exits of a feedback log."""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from apparate_llm.config import ConfigError, EarlyExitConfig, parse_config
from apparate_llm.drawing import Axes
from apparate_llm.files import replacing, write_atomically
from apparate_llm.flags import Commands, OneLineParser, add_options, check_new_file, options_from
from apparate_llm.redact import redacted
from apparate_llm.renamed import OPTIONS

if TYPE_CHECKING:
    from apparate_llm.controller.feedback import LoggedStep
    from apparate_llm.controller.replay import LogCosts, Replayed

FIGURES = (".png", ".svg", ".pdf")
LOGS = Path(__file__).parent / "assets" / "logs"


class Row(TypedDict):
    """What a policy would have done, with one combination of parameters."""

    policy: str
    parameters: str
    accuracy_bound: float
    tpt_ratio: float  # to plain vLLM
    tpt_ms: float
    tokens_per_pass: float
    divergence_frac: float
    worst_divergence_frac: float  # over all prefixes of what it emitted
    regret_nats_per_token: float
    emitted: int
    held: int
    accepted: int
    released: int
    divergences: int


def add_replay(subparsers: Commands) -> None:
    parser: OneLineParser = subparsers.add_parser(
        "replay",
        help="try any policy on logged exits, without a server",
        description="Replays a feedback log (written by `serve --feedback-log FILE`) under a policy, once for each "
        "combination of the --param values, and shows speed against divergences. An oracle's row shows what a perfect "
        "ramp with the same proposals would reach.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "log", nargs="?", help=f"a file or a shipped log: {', '.join(shipped_logs())} (default: the first)"
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="values to try of an option (threshold=0.8,0.9) or of a policy's parameter (window=8,16,32); repeatable",
    )
    parser.add_argument("--figure", type=Path, help="file for a figure of TPT against divergences (PNG, SVG or PDF)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    add_options(parser, leave_out=("tenants",))  # a log does not tell them apart
    parser.set_defaults(run=run_replay)


def shipped_logs() -> dict[str, Path]:
    return {path.name.removesuffix(".jsonl.gz"): path for path in sorted(LOGS.glob("*.jsonl.gz"))}


def run_replay(args: argparse.Namespace) -> int:
    from rich.console import Console

    from apparate_llm.controller.feedback import read_header, read_steps
    from apparate_llm.controller.replay import LogCosts
    from apparate_llm.progress import Progress

    config = options_from(args)
    path = find_log(args.log)
    check_new_file("--json", args.json)
    check_figure(args.figure)
    header, steps = read_header(path), list(read_steps(path))
    if type(num_layers := header.get("num_layers")) is not int or num_layers < 1:
        raise ConfigError(f"{path}: num_layers in its header must be a whole number of at least 1, got {num_layers!r}")
    costs = LogCosts(steps)
    check_depth("--depth", config, costs)
    rows = []
    with Progress(Console(stderr=True)) as progress:
        combinations = parameter_grid(args.param)
        with progress.stage("replay", total=len(combinations), unit="combinations", often_brief=True) as stage:
            for done, parameters in enumerate(combinations):
                stage.update(done)
                rows.append(one_row(config, parameters, header["num_layers"], steps, costs))
            stage.update(len(combinations))
    rows.append(oracle_row(config, steps, costs))
    print_rows(
        rows, f"{path.name}: {len(steps)} passes of {header.get('model', 'a model')} on {header.get('cpu', '?')}"
    )
    if args.json:
        document = {"schema_version": 1, "command": shlex.join(["apparate-llm", *redacted(sys.argv[1:])]), "rows": rows}
        write_atomically(args.json, (json.dumps(document, indent=1) + "\n").encode())
    if args.figure:
        save_figure(args.figure, rows)
    return 0


def check_depth(flag: str, config: EarlyExitConfig, costs: "LogCosts") -> None:
    """Raises ConfigError for a depth that the log does not have."""
    if config.depth not in ("auto", *costs.draft_steps):
        depths = ", ".join(map(str, costs.draft_steps))
        raise ConfigError(f"{flag}: the log holds exits of depth {depths}, got {config.depth}")


def check_figure(path: Path | None) -> None:
    """Raises ConfigError where it could not be drawn or written."""
    check_new_file("--figure", path)
    if path is not None and path.suffix.lower() not in FIGURES:
        raise ConfigError(f"--figure: must end in {', '.join(FIGURES)}, got {path}")


def find_log(name: str | None) -> Path:
    shipped = shipped_logs()
    if name is None:
        if not shipped:
            raise ValueError("no log given, and none is shipped")
        return next(iter(shipped.values()))
    return shipped[name] if name in shipped else Path(name)


def parameter_grid(given: list[str]) -> list[dict[str, object]]:
    """All combinations of `name=v1,v2`; raises ValueError for what is not of this form."""
    axes = []
    for text in given:
        name, equals, values = text.partition("=")
        if not (name and equals and values):
            raise ValueError(f"--param must be NAME=V1,V2,..., got {text!r}")
        try:
            axes.append([(OPTIONS.get(name, name), json.loads(value)) for value in values.split(",")])
        except ValueError:
            raise ValueError(f"--param {name}: values must be numbers, true or false, got {values!r}") from None
    return [dict(combination) for combination in itertools.product(*axes)]


def one_row(
    config: EarlyExitConfig,
    parameters: Mapping[str, object],
    num_layers: int,
    steps: "list[LoggedStep]",
    costs: "LogCosts",
) -> Row:
    from apparate_llm.controller.policies import make_policy
    from apparate_llm.controller.replay import replay

    options = {name: value for name, value in parameters.items() if name in EarlyExitConfig.model_fields}
    rest = {name: value for name, value in parameters.items() if name not in options}
    config = parse_config({**config.model_dump(), **options})
    check_depth("--param depth", config, costs)
    depths = tuple(sorted(costs.draft_steps))
    policy = make_policy(
        config,
        depth=depths[0] if config.depth == "auto" else config.depth,
        depths=depths if config.depth == "auto" else (config.depth,),
        num_layers=num_layers,
        parameters=rest,
    )
    result = replay(steps, costs, policy, accuracy_bound=config.accuracy_bound, kind=config.bound_kind)
    label = ", ".join(f"{name}={value}" for name, value in parameters.items())
    return row_of(config.policy, label, config.accuracy_bound, result)


def oracle_row(config: EarlyExitConfig, steps: "list[LoggedStep]", costs: "LogCosts") -> Row:
    from apparate_llm.controller.replay import oracle

    depth = min(costs.draft_steps) if config.depth == "auto" else config.depth
    return row_of("oracle", "", 0.0, oracle(steps, costs, depth=depth))


def row_of(policy: str, parameters: str, accuracy_bound: float, result: "Replayed") -> Row:
    return {
        "policy": policy,
        "parameters": parameters,
        "accuracy_bound": accuracy_bound,
        "tpt_ratio": round(result.tpt_ratio, 4),
        "tpt_ms": round(result.tpt_ms, 3),
        "tokens_per_pass": round(result.tokens_per_pass, 3),
        "divergence_frac": round(result.divergence_frac, 5),
        "worst_divergence_frac": round(result.worst_share, 5),
        "regret_nats_per_token": round(result.regret_per_token, 5),
        "emitted": result.emitted,
        "held": result.held,
        "accepted": result.accepted,
        "released": result.released,
        "divergences": result.divergences,
    }


def print_rows(rows: list[Row], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    columns = (
        "policy|parameters|bound|TPT / plain|tokens per pass|divergences|regret, nats per token|held|accepted|released"
    )
    for column in columns.split("|"):
        table.add_column(column, justify="left" if column in ("policy", "parameters") else "right")
    for row in rows:
        table.add_row(
            row["policy"],
            row["parameters"],
            f"{row['accuracy_bound']:g}",
            f"{row['tpt_ratio']:.3f}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['divergence_frac']:.4f}",
            f"{row['regret_nats_per_token']:.4f}",
            *map(str, (row["held"], row["accepted"], row["released"])),
        )
    Console(width=max(Console().width, 120)).print(table)


def save_figure(path: Path, rows: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    draw_tradeoff(ax, rows)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=150)
    pyplot.close(figure)


def draw_tradeoff(ax: Axes, rows: list[Row]) -> None:
    """TPT ratio over divergence share; a line for each policy, points named by their parameters."""
    for policy in dict.fromkeys(row["policy"] for row in rows):
        points = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["divergence_frac"])
        x = [100 * row["divergence_frac"] for row in points]
        ax.plot(x, [row["tpt_ratio"] for row in points], marker="o", label=policy)
        for row, at in zip(points, x, strict=True):
            ax.annotate(
                row["parameters"], (at, row["tpt_ratio"]), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
    ax.set_xlabel("divergences, % of tokens")
    ax.set_ylabel("time per output token / plain")
    ax.grid(alpha=0.3)
    ax.legend()
