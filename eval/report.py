"""`report.html`: what was measured, on one page that needs nothing from elsewhere."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from apparate_llm.eval.figures import Points, figures
from apparate_llm.eval.headline import plain_name, summary_sentence, verdict
from apparate_llm.eval.schema import Results, Run
from apparate_llm.eval.systems import PLAIN
from apparate_llm.eval.tables import (
    ANSWER_COLUMNS,
    DASH,
    EXIT_COLUMNS,
    SHARES_COLUMNS,
    SHARES_TITLE,
    Columns,
    at_worst_cell,
    baselines_in,
    bounds_of,
    divergence_cell,
    flat,
    load_name,
    loads_of,
    machine_text,
    number,
    percent,
    prompts_text,
    ratio_cell,
    ratios_by_run,
    share_rows,
    small,
    with_interval,
)
from apparate_llm.files import write_atomically

REPORT_NAME = "report.html"
SHOWN_ELSEWHERE = ("loads", "bounds", "prompts")  # settings that are shown with the figures

SHARES_NOTE = (
    "TPT of each system over that of the one before it, which lacks one part. Shares are of the logarithm of the ratio "
    "of all parts, so that they add up."
)


class Section(NamedTuple):
    """A table with its heading."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def write_report(folder: Path, results: Results, points: Points) -> Path:
    """Writes and returns `folder`/report.html; makes the folder if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT_NAME
    write_atomically(path, render(results, points).encode())
    return path


def render(results: Results, points: Points) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(REPORT_NAME).render(
        models=", ".join(dict.fromkeys(run.model for run in results.runs)) or DASH,
        sentence=summary_sentence(results),
        prompts=prompts_text(results.settings),
        results=results,
        sections=sections(results),
        figures=figures(results, points),
        machine=flat(results.machine),
        machine_text=machine_text(results.machine),
        settings=flat({name: value for name, value in results.settings.items() if name not in SHOWN_ELSEWHERE}),
        dash=DASH,
    )


def sections(results: Results) -> list[Section]:
    runs = [run for load in loads_of(results) for run in results.runs if (run.load, run.fixed_length) == load]
    with_exits = [run for run in runs if run.exits]
    answers = [run for run in runs if run.quality or run.divergences is not None]
    made = [
        *(_ratios(results, baseline) for baseline in baselines_in(results)),
        Section(SHARES_TITLE, SHARES_NOTE, SHARES_COLUMNS, share_rows(results)),
        _section("Absolute figures", "", _speed_columns(runs), runs),
        _known_columns(
            "Quality",
            "Divergences are counted by the server: tokens the full model would not have written; at worst, exits "
            "without a verdict included: that is what the bound holds for. Answers are compared with the baseline's. "
            "Without any divergence they can still part where the full model's best two tokens are nearly equal, as "
            "passes over more rows round differently.",
            _quality_columns(bounds_of(results)),
            answers,
        ),
        _section(
            "Exits",
            "Guesses of the ramps. Held ones waited for the full model, and those it accepted were sent; released ones "
            "were sent at once and checked afterwards. By depth: those that were sent, and their share of the output "
            "tokens.",
            _exit_columns(with_exits),
            with_exits,
        ),
        _section("Costs", "", COST_COLUMNS, runs),
    ]
    return [section for section in made if section.rows]


def _ratios(results: Results, baseline: str) -> Section:
    first, by_run = baseline == baselines_in(results)[0], ratios_by_run(results, baseline)
    oracle = results.oracle_ratio if baseline in PLAIN else {}
    rows = []
    for load, fixed_length in loads_of(results):
        name = load_name(load, fixed_length)
        for item in by_run.values():
            if (item.load, item.fixed_length) == (load, fixed_length):
                cells = [
                    with_interval(item.tpt_p99, item.tpt_p99_ci95),
                    with_interval(item.ttft_mean, item.ttft_mean_ci95),
                    with_interval(item.ttft_p99, item.ttft_p99_ci95),
                    with_interval(item.throughput, item.throughput_ci95),
                ]
                by_repeat = " ".join(number(value) for value in item.tpt_mean_by_repeat) or DASH
                rows.append([name, item.system, ratio_cell(item), verdict(item), *cells, by_repeat])
        clients = {str(run.concurrency) for run in results.runs if (run.load, run.fixed_length) == (load, fixed_length)}
        for level in sorted(clients & oracle.keys()):
            rows.append([name, "oracle (perfect ramp)", number(results.oracle_ratio[level], 3), *[DASH] * 6])
    columns = ["load", "system", "TPT (95 % CI)", "verdict", "TPT p99 (95 % CI)", "TTFT mean (95 % CI)"]
    baseline_name = plain_name(baseline)
    note = f"Divided by the figure of {baseline_name} under the same load: below 1 is better, for throughput above 1."
    if oracle:
        note += (
            " Oracle: the ramp's own guesses, were it always known which of them are right, replayed from the log of "
            "exits that ships with this model. It comes from that log's machine and prompts: a mark to hold the "
            "measured ratios against, no more."
        )
    title = "Against the baseline" if first else f"Against {baseline_name}"
    return Section(title, note, [*columns, "TTFT p99 (95 % CI)", "throughput (95 % CI)", "TPT by repeat"], rows)


def _section(title: str, note: str, columns: Columns, runs: list[Run]) -> Section:
    rows = [
        [load_name(run.load, run.fixed_length), run.system, *(cell(run) for cell in columns.values())] for run in runs
    ]
    return Section(title, note, ["load", "system", *columns], rows)


def _known_columns(title: str, note: str, columns: Columns, runs: list[Run]) -> Section:
    """Without those in which nothing is known: texts that are drawn at random are not compared."""
    whole = _section(title, note, columns, runs)
    shown = [i for i in range(len(whole.columns)) if i < 2 or any(row[i] != DASH for row in whole.rows)]
    return whole._replace(
        columns=[whole.columns[i] for i in shown], rows=[[row[i] for i in shown] for row in whole.rows]
    )


def _speed_columns(runs: list[Run]) -> Columns:
    columns: Columns = {
        "TPT mean, ms (95 % CI)": lambda run: with_interval(run.tpt_ms.mean, run.tpt_ms.mean_ci95),
        "TPT p50": lambda run: number(run.tpt_ms.p50),
        "TPT p95": lambda run: number(run.tpt_ms.p95),
        "TPT p99": lambda run: number(run.tpt_ms.p99),
        "TTFT p50, ms": lambda run: number(run.ttft_ms.p50, 1),
        "TTFT p99": lambda run: number(run.ttft_ms.p99, 1),
        "E2E p50, ms": lambda run: number(run.e2e_ms.p50, 0),
        "gap p99, ms": lambda run: number(run.gap_ms.p99, 1),
        "in a shared chunk": lambda run: percent(run.shared_chunk_frac),
        "tokens/s": lambda run: number(run.output_tokens_per_s),
    }
    if any(run.goodput_frac is not None or run.goodput_per_s is not None for run in runs):
        columns["goodput"] = lambda run: percent(run.goodput_frac)
        columns["goodput, requests/s"] = lambda run: number(run.goodput_per_s)
    columns["requests"] = lambda run: str(run.requests)
    columns["failed"] = lambda run: str(run.failed)
    return columns


def _quality_columns(bounds: dict[str, float]) -> Columns:
    return {
        "divergences": divergence_cell,
        "at worst": at_worst_cell,
        "bound": lambda run: percent(bounds.get(run.system)),
        "regret, nats/token": lambda run: small(run.regret_nats_per_token),
        **ANSWER_COLUMNS,
    }


def _exit_columns(runs: list[Run]) -> Columns:
    left_out = {"divergences", "at worst", "regret, nats/token"}  # which are in other tables
    if all(run.within_target_frac is None for run in runs):
        left_out.add("within target")
    columns = {name: cell for name, cell in EXIT_COLUMNS.items() if name not in left_out}
    depths = {depth for run in runs if run.exits for depth in run.exits.by_depth}
    for depth in sorted(depths, key=lambda text: (len(text), text)):
        columns[f"at depth {depth}"] = partial(_depth_cell, depth=depth)
    return columns


def _depth_cell(run: Run, depth: str) -> str:
    if not run.exits or not run.tokens_at_server:
        return DASH
    count = run.exits.by_depth.get(depth, 0)
    return f"{count} ({percent(count / run.tokens_at_server)})"


COST_COLUMNS: Columns = {
    "CPU, s/token": lambda run: small(run.cpu_s_per_token),
    "energy, J/token": lambda run: small(run.energy_j_per_token),
    "blocks/token": lambda run: number(run.blocks_per_token),
    "peak memory, GiB": lambda run: number(run.peak_memory_gib),
    "wall time, s": lambda run: number(run.wall_s, 1),
}
