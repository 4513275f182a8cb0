"""The results as tables for the console, and how their figures are written everywhere."""

import math
from collections.abc import Callable, Mapping

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from apparate_llm.eval.schema import Ratio, Results, Run

DASH = "\N{EN DASH}"  # unknown; never 0
LEFT = ("load", "system", "what", "over")
WITH_INTERVAL = "95 % CI"  # in the heading of a column
SHARES_TITLE = "What each part brings"
SHARES_COLUMNS = ["load", "system", "over", f"TPT, {WITH_INTERVAL}", "share of the gain"]

Columns = dict[str, Callable[[Run], str]]


def tables(results: Results) -> list[Table]:
    """Speed, exits and answers, of at most 120 columns."""
    baselines, ratios = baselines_in(results), ratios_by_run(results)

    def by_repeat(run: Run) -> str:
        item = ratios.get(key_of(run))
        return " ".join(f"{value:.2f}" for value in item.tpt_mean_by_repeat) if item else ""

    speed: Columns = {
        "TPT ms mean": lambda run: number(run.tpt_ms.mean),
        "p50": lambda run: number(run.tpt_ms.p50),
        "p95": lambda run: number(run.tpt_ms.p95),
        "p99": lambda run: number(run.tpt_ms.p99),
        "TTFT ms p50": lambda run: number(run.ttft_ms.p50, 0),
        "tokens/s": lambda run: number(run.output_tokens_per_s, 1),
        "failed": lambda run: str(run.failed),
        f"ratio, {WITH_INTERVAL}": lambda run: ratio_cell(ratios.get(key_of(run)), 2),
        "by repeat": by_repeat,
    }
    title = f"Time per output token (TPT), {machine_text(results.machine)}"
    title = f"{title}; ratio: to {baselines[0]}" if ratios else title
    made = [_table(title, speed, results.runs, prompts_text(results.settings))]
    made += [_ratio_table(results, other) for other in baselines[1:]]
    if rows := share_rows(results):
        made.append(console_table(SHARES_TITLE, SHARES_COLUMNS, rows))
    if with_exits := [run for run in results.runs if run.exits]:
        made.append(_table("Exits", EXIT_COLUMNS, with_exits))
    if with_quality := [run for run in results.runs if run.quality]:
        made.append(_table("Answers", ANSWER_COLUMNS, with_quality))
    return made


def machine_text(machine: Mapping[str, object]) -> str:
    cpu, cores, quota = (machine.get(name) for name in ("cpu", "cores", "cpu_quota"))
    time = "" if quota is None else f", time of {quota:g} CPUs"
    return f"{cpu or DASH}, {cores or DASH} cores{time}"


def share_rows(results: Results) -> list[list[str]]:
    """Of each part: load, system, the one before it, TPT over that, and its share of the logarithm of the gain, so
    that shares add up; a dash where all parts together bring none."""
    rows = []
    for item in results.steps:
        of_load = [other.tpt_mean or math.nan for other in results.steps if _load_of(other) == _load_of(item)]
        gain = -sum(map(math.log, of_load))
        share = -math.log(item.tpt_mean) / gain if item.tpt_mean and gain > 0 else None
        rows.append([load_name(*_load_of(item)), item.system, item.baseline, ratio_cell(item), percent(share)])
    return rows


def _load_of(item: Ratio) -> tuple[str, bool]:
    return item.load, item.fixed_length


def _ratio_table(results: Results, baseline: str) -> Table:
    columns = [f"TPT, {WITH_INTERVAL}", "TPT p99", "TTFT mean", "tokens/s"]
    rows = [
        [
            item.system,
            load_name(item.load, item.fixed_length),
            ratio_cell(item, 2),
            *(number(value) for value in (item.tpt_p99, item.ttft_mean, item.throughput)),
        ]
        for item in ratios_by_run(results, baseline).values()
    ]
    return console_table(f"Ratios to {baseline}", ["system", "load", *columns], rows)


def _table(title: str, columns: Columns, runs: list[Run], caption: str = "") -> Table:
    """A column in which nothing is known is left out: 120 characters are few."""
    rows = [
        [run.system, load_name(run.load, run.fixed_length), *(cell(run) for cell in columns.values())] for run in runs
    ]
    names = ["system", "load", *columns]
    shown = [i for i in range(len(names)) if i < 2 or any(row[i] not in (DASH, "") for row in rows)]
    return console_table(title, [names[i] for i in shown], [[row[i] for i in shown] for row in rows], caption)


def console_table(title: str, columns: list[str], rows: list[list[str]], caption: str | None = None) -> Table:
    """Names come from users: what looks like markup in them is none."""
    table = Table(
        title="\n" + escape(title),
        title_justify="left",
        caption=escape(caption) if caption else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        justify: JustifyMethod = "left" if column in LEFT else "right"
        kept_whole = column == "system" or WITH_INTERVAL in column
        table.add_column(escape(column), justify=justify, overflow="fold", no_wrap=kept_whole)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def number(value: float | None, digits: int = 2) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def small(value: float | None) -> str:
    """Three digits, however small."""
    if value is None:
        return DASH
    return number(value) if abs(value) >= 1 else f"{value:.3g}"


def percent(frac: float | None) -> str:
    return DASH if frac is None else f"{100 * frac:.1f} %"


def with_interval(value: float | None, interval: tuple[float, float] | None, digits: int = 2) -> str:
    """In brackets; a dash there: of too few."""
    if value is None:
        return DASH
    if interval is None:
        return f"{number(value, digits)} ({DASH})"
    return f"{number(value, digits)} ({number(interval[0], digits)}{DASH}{number(interval[1], digits)})"


def ratio_cell(item: Ratio | None, digits: int = 3) -> str:
    return with_interval(item.tpt_mean, item.tpt_mean_ci95, digits) if item else DASH


def divergence_cell(run: Run) -> str:
    """Count and share."""
    return DASH if run.divergences is None else f"{run.divergences} ({percent(divergence_frac(run))})"


def at_worst_cell(run: Run) -> str:
    """The same, exits without a verdict included."""
    number = run.divergences_at_worst
    return DASH if number is None else f"{number} ({percent(at_worst_frac(run))})"


def divergence_frac(run: Run) -> float | None:
    """Of all output tokens, of requests that do not count as well."""
    return run.divergences / run.tokens_at_server if run.divergences is not None and run.tokens_at_server else None


def at_worst_frac(run: Run) -> float | None:
    number = run.divergences_at_worst
    return number / run.tokens_at_server if number is not None and run.tokens_at_server else None


def load_name(load: str, fixed_length: bool) -> str:
    return f"{load}, fixed length" if fixed_length else load


def key_of(item: Run | Ratio) -> tuple[str, str, bool]:
    return item.system, item.load, item.fixed_length


def baselines_in(results: Results) -> list[str]:
    """What ratios are to. Answers are compared with the first one's."""
    return list(dict.fromkeys(item.baseline for item in results.ratios))


def ratios_by_run(results: Results, baseline: str | None = None) -> dict[tuple[str, str, bool], Ratio]:
    """To the first baseline, unless another is named."""
    named = [baseline] if baseline is not None else baselines_in(results)[:1]
    return {key_of(item): item for item in results.ratios if item.baseline in named}


def loads_of(results: Results) -> list[tuple[str, bool]]:
    """(load, fixed_length), in the order they were run."""
    return list(dict.fromkeys((run.load, run.fixed_length) for run in results.runs))


def systems_of(results: Results) -> list[str]:
    """Baselines first, if there are any."""
    return list(dict.fromkeys([*baselines_in(results), *results.systems, *(run.system for run in results.runs)]))


def bounds_of(results: Results) -> dict[str, float]:
    """Accuracy bound by system, for those that have one."""
    return {system: bound for system, bound in (results.settings.get("bounds") or {}).items() if bound is not None}


def exits_cell(name: str) -> Callable[[Run], str]:
    return lambda run: DASH if run.exits is None else str(getattr(run.exits, name))


def quality_cell(name: str, shown: Callable[[float | None], str]) -> Callable[[Run], str]:
    return lambda run: shown(getattr(run.quality, name, None))


EXIT_COLUMNS: Columns = {
    "output tokens": lambda run: str(run.tokens_at_server),
    "held": exits_cell("held"),
    "accepted": exits_cell("accepted"),
    "released": exits_cell("released"),
    "no verdict": exits_cell("unverified"),
    "divergences": divergence_cell,
    "at worst": at_worst_cell,
    "within target": lambda run: percent(run.within_target_frac),
    "regret, nats/token": lambda run: small(run.regret_nats_per_token),
}
ANSWER_COLUMNS: Columns = {
    "same answers": quality_cell("identical_frac", percent),
    "same as off's": lambda run: percent(run.same_as_off_frac),
    "same as under the first load": lambda run: percent(run.same_as_first_load_frac),
    "first difference, tokens": quality_cell("first_difference_tokens", lambda tokens: number(tokens, 0)),
    "ROUGE-L, baseline": quality_cell("rouge_l_baseline", lambda value: number(value, 3)),
    "ROUGE-L, reference": quality_cell("rouge_l_reference", lambda value: number(value, 3)),
    "same number": quality_cell("same_number_frac", percent),
    "right number": quality_cell("right_number_frac", percent),
    "code passed": quality_cell("code_passed_frac", percent),
}


def prompts_text(settings: Mapping[str, object]) -> str:
    """`30 of the 60 prompts of code, which were in use while this was developed`; empty where it is not known."""
    sets = settings.get("prompts")
    if not isinstance(sets, Mapping):  # of old results, which may have a text
        return ""
    return "; ".join(_set_text(name, **part) for name, part in sets.items())


def _set_text(name: str, *, size: int, asked: int, developed_with: int) -> str:
    text = f"{size} prompts of {name}" if asked == size else f"{asked} of the {size} prompts of {name}"
    if developed_with:
        which = "which" if developed_with == asked else f"of which {developed_with}"
        text += f", {which} {'was' if developed_with == 1 else 'were'} in use while this was developed"
    return text


def flat(mapping: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """{"packages": {"torch": "2"}} -> {"packages.torch": "2"}."""
    flattened: dict[str, str] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flattened |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flattened[f"{prefix}{name}"] = ", ".join(map(str, value)) or DASH
        else:
            flattened[f"{prefix}{name}"] = DASH if value is None or value == {} else str(value)
    return flattened
