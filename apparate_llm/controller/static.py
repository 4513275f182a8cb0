"""Policy `static`: fixed thresholds on the confidence, as in FREE (Bae et al., EMNLP 2023)."""

from collections import Counter
from dataclasses import dataclass, field

from apparate_llm.controller.policy import ExitKind, Policy, draft_steps_within, kind_of
from apparate_llm.core import Decision, Exit


@dataclass(slots=True, kw_only=True)
class StaticPolicy(Policy):
    depth: int
    depths: tuple[int, ...]
    threshold: float
    hold_threshold: float
    max_exits: int
    max_batch_tokens: int
    sibling: bool = False
    _verdicts: Counter[ExitKind] = field(default_factory=Counter)

    def start(self, num_requests: int) -> int:
        return draft_steps_within(self.max_batch_tokens, self.max_exits, num_requests)

    def decide(self, exit_: Exit, *, joint_acceptance: float, may_release: bool, num_tokens: int) -> Decision:
        exit_.probability = exit_.confidence
        if may_release and exit_.confidence >= self.threshold:
            return Decision.RELEASE
        return Decision.HOLD if exit_.confidence >= self.hold_threshold else Decision.STOP

    def on_verdict(self, exit_: Exit, agrees: bool) -> None:
        self._verdicts[kind_of(exit_)] += 1

    def num_verdicts(self, exit_: Exit) -> int:
        return self._verdicts[kind_of(exit_)]
