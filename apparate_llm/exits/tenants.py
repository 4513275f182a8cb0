"""Tenants: what each may spend, and what it got."""

from dataclasses import dataclass, fields

from apparate_llm.config import EarlyExitConfig, effective_bound
from apparate_llm.controller.budget import Bucket

UNNAMED = "(none)"  # requests that are of no tenant, where there are some


@dataclass(slots=True)
class TenantShare:
    bucket: Bucket
    emitted: int = 0
    divergences: int = 0
    unverified: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    targets_met: int = 0
    targets_missed: int = 0

    def as_dict(self) -> dict[str, float]:
        counts = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "bucket"}
        return {**counts, "divergences_at_worst": self.divergences_at_worst, "budget_left": self.bucket.balance}

    @property
    def divergences_at_worst(self) -> int:
        return self.divergences + self.unverified


def shares_of(config: EarlyExitConfig) -> dict[str, TenantShare]:
    """By name; empty where the server has no tenants."""
    if not config.tenants:
        return {}
    names = [*config.tenants, UNNAMED]
    return {
        name: TenantShare(Bucket.for_tenant(effective_bound(config, tenant_name=name), len(names))) for name in names
    }
