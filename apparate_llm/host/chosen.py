"""What is in force for one server: what was measured, else all cores, and what its user says by hand."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apparate_llm.config import ConfigError, EarlyExitConfig
from apparate_llm.host.choice import AS_VLLM, DEFAULT, HUGE_PAGES, Choice, environment, line
from apparate_llm.host.limits import CpuLimits, cpu_limits
from apparate_llm.host.options import EXECUTOR, Tuning, check_tuning, num_ranks, parts_by_hand
from apparate_llm.host.store import key_of, load
from apparate_llm.launch import is_cpu_build
from apparate_llm.machine import cache_folder
from apparate_llm.vllm_flags import given_value

MEASURED = "kept; `apparate-llm tune` measures again"
NOT_MEASURED = "not measured here; `apparate-llm tune` does"
OFF = "--tuning off"
RANKS = "several workers"
WITH_EXITS = EarlyExitConfig()


@dataclass(frozen=True, slots=True)
class Chosen:
    choice: Choice
    limits: CpuLimits
    origin: str
    given: Mapping[str, str] = field(repr=False)  # the variables that were set already

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.choice, self.limits, self.given)

    @property
    def huge_pages(self) -> bool | None:
        """None: of servers with exits only."""
        by_hand = self.given.get(HUGE_PAGES)
        return self.choice.huge_pages if by_hand is None else by_hand == "1"

    @property
    def line(self) -> str | None:
        """None where all is as without us."""
        if self.choice == AS_VLLM:
            return None
        return line(self.choice, self.limits, self.given, self.origin)


def choose(
    tuning: Tuning,
    model: Path,
    flags: Sequence[str] = (),
    config: EarlyExitConfig = WITH_EXITS,
    *,
    given: Mapping[str, str] | None = None,
) -> Chosen:
    """For a server of `model` with these flags of vLLM's, in one spelling, and these options. given: variables, by
    themselves this process's. Raises ConfigError for parts given by hand that are not allowed."""
    limits = cpu_limits()
    given = dict(os.environ if given is None else given)
    check_tuning(tuning, limits, flags, given, config)
    if not is_cpu_build():
        return Chosen(AS_VLLM, limits, OFF, given)
    base, origin = _base(tuning, model, flags, limits, config)
    if given_value([*flags], EXECUTOR) not in (None, "uni"):  # the user's own way to a worker
        base = base.model_copy(update={"worker": AS_VLLM.worker})
    if parts := parts_by_hand(tuning, config):
        origin = f"{', '.join(name.replace('_', ' ') for name in parts)} by hand, else {origin}"
    return Chosen(base.model_copy(update=parts), limits, origin, given)


def _base(
    tuning: Tuning, model: Path, flags: Sequence[str], limits: CpuLimits, config: EarlyExitConfig
) -> tuple[Choice, str]:
    if tuning.tuning == "off":
        return AS_VLLM, OFF
    if num_ranks(flags) > 1:
        return AS_VLLM, RANKS
    try:
        kept = load(cache_folder(), key_of(model, flags, limits, config))
    except ConfigError:  # no cache folder: nothing is kept
        kept = None
    return (DEFAULT, NOT_MEASURED) if kept is None else (kept.choice, MEASURED)
