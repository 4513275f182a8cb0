"""Policy `off`: never an exit."""

from dataclasses import dataclass

from apparate_llm.core import Verb


@dataclass(slots=True, kw_only=True)
class OffPolicy:
    def decide(self, confidence: float, may_release: bool) -> Verb:
        return Verb.STOP
