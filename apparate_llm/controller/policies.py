"""The policies by name."""

from collections.abc import Callable
from typing import Protocol

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.off import OffPolicy
from apparate_llm.controller.static import StaticPolicy
from apparate_llm.core import Verb


class Policy(Protocol):
    def decide(self, confidence: float, may_release: bool) -> Verb:
        """What becomes of an exit of this calibrated confidence, in [0, 1]."""
        ...


POLICIES: dict[str, Callable[[EarlyExitConfig], Policy]] = {
    "static": lambda config: StaticPolicy(threshold=config.threshold, hold_threshold=config.hold_threshold),
    "off": lambda config: OffPolicy(),
}
