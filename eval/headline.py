"""The results in one sentence: how much faster, at what cost, when not."""

import math
import re
from collections.abc import Sequence
from typing import Literal

from apparate_llm.eval.schema import Ratio, Results, Run
from apparate_llm.eval.systems import PLAIN, SPECULATION
from apparate_llm.eval.tables import (
    at_worst_frac,
    baselines_in,
    bounds_of,
    divergence_frac,
    key_of,
    load_name,
    loads_of,
    number,
)

MAX_LISTED = 3  # more loads than these are given as a range

Verdict = Literal["faster", "slower", "no clear difference", "not measured"]


def summary_sentence(results: Results) -> str:
    """Says faster or slower only where the whole confidence interval (without one: the ratio) does. Before that it
    warns of texts that are not what lossless exits promise, and after it names others that are faster still."""
    return _texts_warning(results) + _speed_sentence(results) + _faster_still(results)


def _texts_warning(results: Results) -> str:
    """Of lossless exits whose answers are plain vLLM's less often than those of vLLM's own speculation."""
    if not PLAIN.keys() >= {*baselines_in(results)[:1]}:  # answers are compared with another's
        return ""
    lossless = {name for name, bound in bounds_of(results).items() if bound == 0}
    runs_by_pair: dict[tuple[str, str], list[Run]] = {}
    for run in results.runs:
        others = [other for other in results.runs if other.system in SPECULATION and other.load == run.load]
        for other in others:
            if run.system in lossless and other.fixed_length == run.fixed_length and _fewer_texts(run, other):
                runs_by_pair.setdefault((run.system, other.system), []).append(run)
    return "".join(
        f"Warning: {system} has plain vLLM's very text less often than vLLM's {other} speculation {_loads(runs)} "
        f"({_joined([f'{_percent(run.identical_frac or 0.0)} %' for run in runs])} of the answers). "
        for (system, other), runs in runs_by_pair.items()
    )


def _fewer_texts(run: Run, other: Run) -> bool:
    own, others = run.identical_frac, other.identical_frac
    return own is not None and others is not None and own < others


def _speed_sentence(results: Results) -> str:
    if not results.ratios:
        return _nothing_compared(results) + _failures(results.runs) + "."
    parts = []
    for baseline in baselines_in(results):
        ratios = [item for item in results.ratios if item.baseline == baseline]
        systems = dict.fromkeys(item.system for item in ratios)
        clauses = [_system_clause(results, [item for item in ratios if item.system == system]) for system in systems]
        parts.append(f"against {plain_name(baseline)}, " + "; ".join(clauses))
    text = "; ".join(parts)
    for phrase in (" time per token", "95 % CI "):
        head, first, tail = text.partition(phrase)
        text = head + first + tail.replace(phrase, "")
    return text[0].upper() + text[1:] + _failures(results.runs) + "."


def verdict(item: Ratio) -> Verdict:
    if item.tpt_mean is None:
        return "not measured"
    # The interval is of blocks that both answered, so the ratio of all requests can lie outside of it.
    edges = (item.tpt_mean, *(item.tpt_mean_ci95 or ()))
    if max(edges) < 1:
        return "faster"
    return "slower" if min(edges) > 1 else "no clear difference"


def plain_name(system: str) -> str:
    return PLAIN.get(system, system)


def _faster_still(results: Results) -> str:
    """Systems without exits, other than the baselines, that take less time per token than all with exits."""
    with_exits, baselines = bounds_of(results), baselines_in(results)
    faster: dict[str, list[tuple[Run, Run]]] = {}
    for load in loads_of(results):
        runs = [run for run in results.runs if (run.load, run.fixed_length) == load]
        best = min((run for run in runs if run.system in with_exits and run.tpt_ms.mean), key=_tpt_ms, default=None)
        for run in runs:
            if best is not None and run.system not in {*with_exits, *baselines} and _tpt_ms(run) < _tpt_ms(best):
                faster.setdefault(run.system, []).append((run, best))
    return "".join(
        f" {system} is faster than every system with exits {_loads([run for run, _ in pairs])} "
        f"({_joined([f'{number(_tpt_ms(run), 1)} against {number(_tpt_ms(best), 1)} ms' for run, best in pairs])})."
        for system, pairs in faster.items()
    )


def _tpt_ms(run: Run) -> float:
    """Infinite where it was not measured."""
    return math.inf if run.tpt_ms.mean is None else run.tpt_ms.mean


def _system_clause(results: Results, ratios: list[Ratio]) -> str:
    runs = {key_of(run): run for run in results.runs}
    groups: dict[Verdict, list[Ratio]] = {"faster": [], "no clear difference": [], "slower": [], "not measured": []}
    for item in _headline_ratios(ratios):
        groups[verdict(item)].append(item)
    parts = []
    if groups["faster"]:
        parts.append(_changes(groups["faster"], runs, "less"))
    if groups["no clear difference"]:
        parts.append(f"shows no clear difference {_loads(groups['no clear difference'])}")
    if groups["slower"]:
        parts.append(_changes(groups["slower"], runs, "more"))
    if groups["not measured"]:
        parts.append(f"gave no times {_loads(groups['not measured'])}")
    whole = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]
    return f"{ratios[0].system}{_promise(ratios[0].system, bounds_of(results))} {whole}"


def _headline_ratios(ratios: list[Ratio]) -> list[Ratio]:
    """Users get answers that end by themselves; the others are told of only where they alone warn."""
    own_length = [item for item in ratios if not item.fixed_length]
    slower = {item.load for item in own_length if verdict(item) == "slower"}
    others = [item for item in ratios if item.fixed_length and verdict(item) == "slower" and item.load not in slower]
    return own_length + others if own_length else ratios


def _promise(system: str, bounds: dict[str, float]) -> str:
    if system not in bounds or "lossless" in system:
        return ""
    return f" (at most {_percent(bounds[system])} % divergences)" if bounds[system] else " (lossless)"


def _changes(ratios: list[Ratio], runs: dict[tuple[str, str, bool], Run], word: str) -> str:
    """`takes 23 % less time per token with 1 client (95 % CI 20 to 26) at a cost of 4.1 % divergences`"""
    cost = _cost([runs[key_of(item)] for item in ratios if key_of(item) in runs], warn_only=word == "more")
    if len(ratios) > MAX_LISTED:
        changes = [abs(1 - item.tpt_mean) for item in ratios if item.tpt_mean is not None]
        return f"takes {_range(changes)} % {word} time per token {_loads(ratios)}{cost}"
    listed = []
    for item in ratios:
        assert item.tpt_mean is not None, f"{item} has a verdict without a ratio"
        interval = "no CI"
        if item.tpt_mean_ci95 is not None:
            low, high = sorted(abs(1 - edge) for edge in item.tpt_mean_ci95)
            interval = f"95 % CI {_percent(low)} to {_percent(high)}"
        listed.append(f"{_percent(abs(1 - item.tpt_mean))} % {word} time per token {_loads([item])} ({interval})")
    return f"takes {_joined(listed)}{cost}"


def _cost(runs: list[Run], *, warn_only: bool) -> str:
    shares = [share for run in runs if (share := divergence_frac(run)) is not None]
    worst = [share for run in runs if (share := at_worst_frac(run)) is not None]
    if not shares or (warn_only and not any(worst)):
        return ""
    at_worst = f" ({_range(worst)} % at worst)" if worst != shares else ""  # exits without a verdict
    cost = f"at a cost of {_range(shares)} % divergences" if any(shares) else "without a divergence"
    return f" {cost}{at_worst}"


def _range(fracs: list[float]) -> str:
    low, high = _percent(min(fracs)), _percent(max(fracs))
    return low if low == high else f"{low} to {high}"


def _loads(ratios: Sequence[Ratio | Run]) -> str:
    """`with 1, 4 and 16 clients`; loads of other kinds `under ...`."""
    names = [load_name(item.load, item.fixed_length) for item in ratios]
    clients = [match[1] for name in names if (match := re.fullmatch(r"(\d+) clients?", name))]
    parts = [f"{_joined(clients)} {'client' if clients == ['1'] else 'clients'}"] if clients else []
    parts += [name for name in names if not re.fullmatch(r"\d+ clients?", name)]
    closed = all(item.concurrency is not None for item in ratios)
    return ("with " if closed else "under ") + " and ".join(parts)


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _percent(frac: float) -> str:
    value = 100 * frac
    if value >= 9.95:
        return f"{value:.0f}"
    text = f"{value:.1f}".removesuffix(".0")
    return "under 0.1" if text == "0" and value > 0 else text


def _nothing_compared(results: Results) -> str:
    times = [run for run in results.runs if run.tpt_ms.mean is not None]
    if not times:
        return "Nothing was measured"
    systems = list(dict.fromkeys(run.system for run in times))
    only = f"Only {plain_name(systems[0])} was measured" if len(systems) == 1 else "No system was the baseline"
    named = [
        ("" if len(systems) == 1 else f"{run.system} ") + f"{number(run.tpt_ms.mean, 1)} ms per token {_loads([run])}"
        for run in times
    ]
    return f"{only}, so nothing can be compared: {_joined(named)}"


def _failures(runs: list[Run]) -> str:
    failed: dict[str, int] = {}
    for run in runs:
        if run.failed:
            failed[run.system] = failed.get(run.system, 0) + run.failed
    if not failed:
        return ""
    total = sum(run.requests for run in runs)
    who = ", ".join(f"{system}: {count}" for system, count in failed.items())
    return f"; {sum(failed.values())} of {total} requests failed ({who})"
