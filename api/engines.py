"""The engines behind one API server: one, or several with data parallelism."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.engine.protocol import EngineClient

from apparate_llm.core import shares_of


def num_engines(engine: EngineClient) -> int:
    core = getattr(engine, "engine_core", None)
    return len(getattr(core, "core_engines", "1"))


async def ask_all(engine: EngineClient, method: str, *args: object) -> list[Any]:
    """What every engine answers, of all its ranks."""
    core: Any = getattr(engine, "engine_core", None)
    if hasattr(core, "core_engines"):
        answers = await core.call_utility_all_async("collective_rpc", method, None, args, None)
        return [of_ranks(ranks) for ranks in answers]
    return [of_ranks(await engine.collective_rpc(method, args=args))]


def of_ranks(answers: Sequence[Any]) -> Any:
    """The tensor-parallel ranks of one engine as one: the first one's word, unless another has worse to tell. Done is
    what all have done, refused what one refuses, exits are made where all make them."""
    first = answers[0]
    if isinstance(first, bool):
        return all(answers)
    if first is None or isinstance(first, str):
        return next((refusal for refusal in answers if refusal is not None), None)
    if not (isinstance(first, dict) and "active" in first and len(answers) > 1):
        return first
    fallbacks = max(status["counts"]["fallbacks"] for status in answers)
    return {
        **first,
        "active": all(status["active"] for status in answers),
        "failure": next((status["failure"] for status in answers if status["failure"]), None),
        "counts": {**first["counts"], "fallbacks": fallbacks},
        "ranks": [{"active": status["active"], "fallbacks": status["counts"]["fallbacks"]} for status in answers],
    }


def merged(statuses: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The status of all engines as if they were one: totals are sums, what each decides for itself is the first one's.
    With several, `engines` has each one's own."""
    first = statuses[0]
    if len(statuses) == 1:
        return first
    counts = _sum([status["counts"] for status in statuses])
    counts |= shares_of(counts, counts["emitted"])
    histograms = {
        name: {**histogram, **_sum([_uncut(status["distributions"][name]) for status in statuses])}
        for name, histogram in first["distributions"].items()
    }
    return {
        **first,
        "active": all(status["active"] for status in statuses),
        "failure": next((status["failure"] for status in statuses if status.get("failure")), None),
        "running": sum(status["running"] for status in statuses),
        "counts": counts,
        "tenants": _sum([status["tenants"] for status in statuses]),
        "audit": {name: max(status["audit"][name] for status in statuses) for name in first["audit"]},
        "distributions": histograms,
        "budget_left": sum(status["budget_left"] for status in statuses),
        "budget_fill_frac": sum(status["budget_fill_frac"] for status in statuses) / len(statuses),
        "engines": list(statuses),
    }


def _uncut(histogram: Mapping[str, object]) -> dict[str, object]:
    return {"counts": histogram["counts"], "total": histogram["total"]}


def _sum(items: Sequence[Any]) -> Any:
    """Of numbers; of lists and dictionaries of them part by part; None counts for nothing."""
    present = [item for item in items if item is not None]
    if not present:
        return None
    if isinstance(present[0], dict):
        names = dict.fromkeys(name for item in present for name in item)
        return {name: _sum([item.get(name) for item in present]) for name in names}
    if isinstance(present[0], list):
        return [_sum(parts) for parts in zip(*present, strict=True)]
    return sum(present)
