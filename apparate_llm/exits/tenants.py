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
    unverified: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    targets_met: int = 0
    targets_missed: int = 0

    def as_dict(self) -> dict[str, Any]:
        counts = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "bucket"}
        return {**counts, "divergences_at_worst": self.divergences_at_worst, "budget_left": self.bucket.balance}

    @property
    def divergences_at_worst(self) -> int:
        return self.diverged + self.unverified


def class_bound(config: EarlyExitConfig, name: str) -> float:
    """The bound of its requests that ask for none."""
    own = config.classes[name].accuracy_bound if name in config.classes else None
    return config.accuracy_bound if own is None else allowed_bound(own, config)


def allowed_bound(asked: float, config: EarlyExitConfig) -> float:
    return asked if config.allow_looser_requests else min(asked, config.accuracy_bound)


def shares_of(config: EarlyExitConfig) -> dict[str, ClassShare]:
    """By name; empty where the server has no classes."""
    if not config.classes:
        return {}
    names = [*config.classes, UNNAMED]
    return {name: ClassShare(Bucket.for_class(class_bound(config, name), len(names))) for name in names}
