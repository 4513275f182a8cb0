"""The results of `eval steady` as tables for the console."""

from rich.table import Table

from apparate_llm.eval.schema import Distribution, SteadyRatio, SteadyResults, SteadyRun
from apparate_llm.eval.tables import (
    DASH,
    WITH_INTERVAL,
    console_table,
    machine_text,
    number,
    prompts_text,
    with_interval,
)

PARTS = {  # of the wait for a first token
    "step under way": "step_under_way_ms",
    "further steps": "further_steps_ms",
    "own step": "own_step_ms",
}


def steady_tables(results: SteadyResults) -> list[Table]:
    """Speed, ratios to the baseline, and what first tokens waited for; of at most 120 columns."""
    tables = [
        console_table(
            f"Clients in a closed loop, {machine_text(results.machine)}",
            ["system", "clients", "TPT ms mean", "p99", "TTFT ms mean", "p99", "tokens/s", "step ms", "failed"],
            [
                [
                    run.system,
                    str(level.clients),
                    *_mean_and_p99(run.tpt_ms or _of_turns(run)),
                    *_mean_and_p99(run.ttft_ms, 0),
                    number(run.output_tokens_per_s, 1),
                    number(run.step_ms, 1),
                    str(run.failed),
                ]
                for level in results.levels
                for run in level.runs
            ],
            prompts_text(results.settings),
        ),
        *_ratio_tables(results),
    ]
    waits = [(run, level.clients) for level in results.levels for run in level.runs if run.ttft_parts]
    if waits:
        title = "What first tokens waited for, ms, and prompts read in the step that read theirs"
        rows = [
            [
                run.system,
                str(clients),
                *(number(run.ttft_parts[name], 0) for name in PARTS.values()),
                number(run.ttft_parts["prompts_in_own_step"]),
            ]
            for run, clients in waits
            if run.ttft_parts
        ]
        tables.append(console_table(title, ["system", "clients", *PARTS, "prompts"], rows))
    return tables


def _ratio_tables(results: SteadyResults) -> list[Table]:
    """One for each baseline."""
    ratios = [(ratio, level.clients) for level in results.levels for ratio in level.ratios]
    baselines = dict.fromkeys(ratio.baseline for ratio, _ in ratios)
    return [_ratio_table(name, [item for item in ratios if item[0].baseline == name]) for name in baselines]


def _ratio_table(baseline: str, ratios: list[tuple[SteadyRatio, int]]) -> Table:
    columns = ["system", "clients", f"TPT, {WITH_INTERVAL}", f"throughput, {WITH_INTERVAL}"]
    rows = [
        [
            ratio.system,
            str(clients),
            with_interval(ratio.tpt, ratio.tpt_ci95, 3),
            with_interval(ratio.throughput, ratio.throughput_ci95, 3),
            *_of_answers(ratio),
        ]
        for ratio, clients in ratios
    ]
    names = ["TPT mean", "TPT p99", "TTFT mean", "TTFT p99"]
    if all(ratio.answers_of_both is None for ratio, _ in ratios):  # one server, and no answer is of one policy
        names, rows = [], [row[: len(columns)] for row in rows]
    return console_table(f"Ratios to {baseline}: of turns side by side, and of whole answers", columns + names, rows)


def _of_answers(ratio: SteadyRatio) -> list[str]:
    return [number(value) for value in (ratio.tpt_mean, ratio.tpt_p99, ratio.ttft_mean, ratio.ttft_p99)]


def _of_turns(run: SteadyRun) -> Distribution:
    """Where no answer is of one policy: over turns, of which so few have no p99."""
    known = [ms for ms in run.tpt_by_turn_ms if ms is not None]
    mean = sum(known) / len(known) if known else None
    return Distribution(mean=mean, p50=None, p95=None, p99=None)


def _mean_and_p99(values: Distribution | None, digits: int = 1) -> tuple[str, str]:
    return (DASH, DASH) if values is None else (number(values.mean, digits), number(values.p99, digits))
