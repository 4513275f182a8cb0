"""Policy `static`: fixed thresholds on the confidence, as in FREE (Bae et al., EMNLP 2023)."""

from dataclasses import dataclass

from apparate_llm.controller.policy import Policy, draft_steps_within
from apparate_llm.core import Decision, Exit


@dataclass(slots=True, kw_only=True)
class StaticPolicy(Policy):
    depth: int
    depths: tuple[int, ...]
    threshold: float
    hold_threshold: float
    max_exits: int
    max_batch_tokens: int

    def start(self, num_requests: int) -> int:
        return draft_steps_within(self.max_batch_tokens, self.max_exits, num_requests)

    def decide(self, exit_: Exit, *, joint_acceptance: float, may_release: bool, num_rows: int) -> Decision:
        exit_.probability = exit_.confidence
        if may_release and exit_.confidence >= self.threshold:
            return Decision.RELEASE
        return Decision.HOLD if exit_.confidence >= self.hold_threshold else Decision.STOP
