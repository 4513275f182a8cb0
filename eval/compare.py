"""Two results side by side."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table

from apparate_llm.eval.schema import SCHEMA_VERSION, Results, Run
from apparate_llm.eval.tables import (
    DASH,
    WITH_INTERVAL,
    at_worst_cell,
    baselines_in,
    console_table,
    divergence_cell,
    flat,
    key_of,
    load_name,
    loads_of,
    number,
    ratio_cell,
    ratios_by_run,
)
from apparate_llm.renamed import OLD_SETTINGS, system_of_old

RESULTS_NAME = "results.json"
MAX_SHOWN = 60  # characters of a value that differs


def load_results(folder_or_file: Path) -> Results:
    """Raises ValueError for what is not there, not JSON or of another schema."""
    path = folder_or_file / RESULTS_NAME if folder_or_file.is_dir() else folder_or_file
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no results at {path}; allowed: a results file, or a folder with {RESULTS_NAME}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read results {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: results must be JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: results must be an object, got {type(data).__name__}")
    if "levels" in data:
        raise ValueError(f"{path}: results of `eval steady`, which only that command shows")
    if (got := data.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version is {got!r}, allowed: {SCHEMA_VERSION}; run that evaluation again")
    try:
        results = Results.model_validate(data)
        return _with_new_names(results) if is_old(results.settings) else results
    except ValidationError as error:
        first, *more = error.errors()
        where = ".".join(map(str, first["loc"]))
        rest = f" (and {len(more)} more)" if more else ""
        raise ValueError(f"{path}: {where}: {first['msg']}{rest}") from None


def is_old(settings: Mapping[str, object]) -> bool:
    """Whether an evaluation is of version 0.1, going by its settings."""
    return OLD_SETTINGS in settings


def _with_new_names(results: Results) -> Results:
    settings = results.settings
    settings["options"] = settings.pop(OLD_SETTINGS)
    settings["systems"] = [system_of_old(name) for name in settings.get("systems", [])]
    for run in results.runs:
        run.system = system_of_old(run.system)
    for ratio in results.ratios:
        ratio.system = system_of_old(ratio.system)
    for by_system in (results.systems, results.skipped, settings.get("bounds") or {}):
        for name in list(by_system):
            by_system[system_of_old(name)] = by_system.pop(name)
    return results


def compare(a: Results, b: Results, names: tuple[str, str]) -> list[Table]:
    """First what is not alike in how they were made, if anything; then every run that either has."""
    runs_a, runs_b = ({key_of(run): run for run in results.runs} for results in (a, b))
    ratios_a, ratios_b = ratios_by_run(a), ratios_by_run(b)
    differences, speed, tokens = list(_differences(a, b)), [], []
    for key in dict.fromkeys([*runs_a, *runs_b]):
        one, other = runs_a.get(key), runs_b.get(key)
        label = [key[0], load_name(*key[1:])]
        if one is None or other is None:
            differences.append([f"run {', '.join(label)}", *("there" if run else "missing" for run in (one, other))])
        speed.append([*label, *_speed(one, other), ratio_cell(ratios_a.get(key)), ratio_cell(ratios_b.get(key))])
        tokens.append([*label, *_tokens(one), *_tokens(other)])
    speed_columns = [
        "TPT ms a",
        "b",
        "b / a",
        "tokens/s a",
        "b",
        f"a / baseline, {WITH_INTERVAL}",
        f"b / baseline, {WITH_INTERVAL}",
    ]
    token_columns = [f"{what} {side}" for side in "ab" for what in ("tokens", "divergences", "at worst", "failed")]
    caption = "\n".join(
        f"{side}: {name}, commit {results.commit or DASH}, {results.started}"
        for side, name, results in zip("ab", names, (a, b), strict=True)
    )
    made = [
        console_table("Time per output token (TPT) and throughput", ["system", "load", *speed_columns], speed),
        console_table("Tokens", ["system", "load", *token_columns], tokens, caption),
    ]
    if not differences:
        return made
    return [console_table("Warning: the two are not alike", ["what", "a", "b"], differences), *made]


def _speed(one: Run | None, other: Run | None) -> list[str]:
    mean_a, mean_b = (run.tpt_ms.mean if run else None for run in (one, other))
    change = mean_b / mean_a if mean_a and mean_b is not None else None
    rates = [run.output_tokens_per_s if run else None for run in (one, other)]
    return [number(mean_a), number(mean_b), number(change, 3), *(number(rate, 1) for rate in rates)]


def _tokens(run: Run | None) -> list[str]:
    if run is None:
        return [DASH] * 4
    return [str(run.output_tokens), divergence_cell(run), at_worst_cell(run), str(run.failed)]


def _differences(a: Results, b: Results) -> Iterator[list[str]]:
    """[what, in a, in b] for all that should be the same."""
    for one, other in zip(_conditions(a), _conditions(b), strict=True):
        for name in dict.fromkeys([*one, *other]):
            if one.get(name) != other.get(name):
                yield [name, *(_shortened(side.get(name, DASH)) for side in (one, other))]


def _conditions(results: Results) -> list[dict[str, str]]:
    models = ", ".join(dict.fromkeys(run.model for run in results.runs)) or DASH
    baselines = ", ".join(baselines_in(results)) or DASH
    over = "blocks" if any(item.units is not None for item in results.ratios) else "prompts or requests"
    return [
        {"model": models, "baseline": baselines, "intervals": f"over {over}" if results.ratios else DASH},
        {"loads": ", ".join(load_name(*load) for load in loads_of(results))},
        flat(results.machine, "machine."),
        flat({name: value for name, value in results.settings.items() if name != "loads"}, "settings."),
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
