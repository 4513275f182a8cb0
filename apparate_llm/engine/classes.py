"""Classes of requests: what each may spend, and what it got."""

from dataclasses import dataclass, fields
from typing import Any

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.budget import Bucket

UNNAMED = "(none)"  # requests that are of no class, where there are some


@dataclass(slots=True)
class ClassShare:
    bucket: Bucket
    emitted: int = 0
    diverged: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    targets_met: int = 0
    targets_missed: int = 0

    def as_dict(self) -> dict[str, Any]:
        counts = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "bucket"}
        return {**counts, "budget_left": self.bucket.balance}


def shares_of(config: EarlyExitConfig) -> dict[str, ClassShare]:
    """By name; empty where the server has no classes."""
    if not config.classes:
        return {}
    bounds = {name: own.accuracy_bound for name, own in config.classes.items()} | {UNNAMED: None}
    return {
        name: ClassShare(Bucket.for_class(config.accuracy_bound if bound is None else bound, len(bounds)))
        for name, bound in bounds.items()
    }
