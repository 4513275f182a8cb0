"""Policy `static`: fixed thresholds on the confidence, as in FREE (Bae et al., EMNLP 2023)."""

from dataclasses import dataclass

from apparate_llm.core import Verb


@dataclass(slots=True, kw_only=True)
class StaticPolicy:
    threshold: float
    hold_threshold: float

    def decide(self, confidence: float, may_release: bool) -> Verb:
        if may_release and confidence >= self.threshold:
            return Verb.RELEASE
        return Verb.HOLD if confidence >= self.hold_threshold else Verb.STOP
