"""Tables whose rows are no system's under several loads: texts, targets, shares, passes, int8, predictions, replays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from apparate_llm.eval.compare import load_results
from apparate_llm.eval.systems import OFF
from apparate_llm.eval.tables import at_worst_frac, number, percent, share_rows, with_interval
from scripts.kept import QWEN, RESULTS, SMOLLM, is_kept, link, read, table_of

PASS_LINES = ("worker: blocks", "worker: lm_head")  # of scripts.profile_step
POLICIES = ("adaptive", "static", "apparate")


class Other(NamedTuple):
    files: dict[str, str]  # by model
    head: tuple[str, ...]  # behind the model
    rows: Callable[[str], list[list[str]]]  # of a file, without the model

    def made(self, folder: Path) -> str:
        rows = [
            [link(name, file, folder), *row]
            for name, file in self.files.items()
            if is_kept(file)
            for row in self.rows(file)
        ]
        return table_of(("model", *self.head), rows)


def texts(file: str) -> list[list[str]]:
    """Of each system, in percent: answers with the text of `off` under the same load."""
    results = load_results(RESULTS / file)
    systems = [name for name in results.systems if name != OFF]
    return [[name, *(plain(run.same_as_off_frac) for run in results.runs if run.system == name)] for name in systems]


def plain(frac: float | None) -> str:
    """In percent, where a heading says so."""
    return percent(frac).removesuffix(" %")


def targets(file: str) -> list[list[str]]:
    """Of each system that has one."""
    return [
        [
            run.system,
            number(run.tpt_ms.mean, 1),
            plain(run.within_target_frac),
            plain(at_worst_frac(run)),
        ]
        for run in load_results(RESULTS / file).runs
        if run.within_target_frac is not None
    ]


def shares(file: str) -> list[list[str]]:
    """Each part over those before it, with one client."""
    rows = [row for row in share_rows(load_results(RESULTS / file)) if row[0] == "1 client"]
    return [[system, ratio, share.removesuffix(" %")] for _, system, _, ratio, share in rows]


def passes(file: str) -> list[list[str]]:
    """Of our server without exits: a pass of so many rows, over the time its weights take to be read."""
    cells = {}
    for result in read(file)["results"]:
        lines = [(result["lines"][line], result["bytes_per_call"][line]) for line in PASS_LINES]
        took_ms = sum(line["ms"] for line, _ in lines)
        floor_ms = sum(line["calls"] * read for line, read in lines) / result["bytes_per_ms"]
        cells[result["batch"]] = f"{number(took_ms, 1)} ({number(took_ms / floor_ms)})"
    return [[cells[rows] for rows in (1, 2, 4, 8)]]


def int8(file: str) -> list[list[str]]:
    agreement = read(file)["agreement"]
    return [[str(agreement["num_tokens"]), plain(agreement["same_frac"]), number(agreement["kl_nats"], 4)]]


def replays(file: str) -> list[list[str]]:
    """Of each bound: TPT / plain vLLM's and nats per token of every policy's fastest setting, and the oracle's TPT."""
    slowest_first = sorted(read(file)["rows"], key=lambda row: -row["tpt_ratio"])
    fastest: dict[tuple[float, str], Any] = {(row["accuracy_bound"], row["policy"]): row for row in slowest_first}

    def cells(bound: float, policies: tuple[str, ...], measure: str, digits: int) -> list[str]:
        return [number(fastest.get((bound, policy), {}).get(measure), digits) for policy in policies]

    return [
        [
            f"{bound:g}",
            *cells(bound, (*POLICIES, "oracle"), "tpt_ratio", 3),
            *cells(bound, POLICIES, "regret_nats_per_token", 4),
        ]
        for bound in sorted({bound for bound, _ in fastest})
    ]


def predictions(file: str) -> list[list[str]]:
    """By clients, of `ramps verify`: the ratio of TPT that was predicted, the one that was measured, how far apart."""
    rows = []
    for clients, level in read(file)["clients"].items():
        predicted, measured = level["predicted"], level["measured"]
        both = [with_interval(one["tpt_ratio"], one.get("ci95")) for one in (predicted, measured)]
        rows.append([clients, *both, number(measured["tpt_ratio"] / predicted["tpt_ratio"])])
    return rows


OTHERS: dict[str, Other] = {
    "texts": Other(
        {QWEN: "texts-qwen.json", SMOLLM: "texts-smollm2.json"},
        ("system", "as off with 1 client, %", "4", "16"),
        texts,
    ),
    "targets": Other(
        {SMOLLM: "targets-smollm2.json"}, ("system", "TPT, ms", "within the target, %", "at worst, %"), targets
    ),
    "shares": Other(
        {QWEN: "shares-qwen.json", SMOLLM: "shares-smollm2.json"},
        ("part", "TPT over those before", "share of the gain, %"),
        shares,
    ),
    "passes": Other(
        {QWEN: "passes-qwen.json", SMOLLM: "passes-smollm2.json"}, tuple(f"{n}, ms" for n in (1, 2, 4, 8)), passes
    ),
    "int8": Other({QWEN: "int8-qwen.json"}, ("greedy tokens", "the same in int8, %", "KL, nats"), int8),
    "predictions": Other(
        {QWEN: "verify-qwen.json", SMOLLM: "verify-smollm2.json"},
        ("clients", "predicted", "measured", "measured / predicted"),
        predictions,
    ),
    "replay": Other(
        {QWEN: "replay-qwen.json", SMOLLM: "replay-smollm2.json"},
        ("bound", "TPT / plain, adaptive", "static", "apparate", "oracle", "nats per token, adaptive", *POLICIES[1:]),
        replays,
    ),
}
