"""Policy `off`: never an exit."""

from dataclasses import dataclass

from apparate_llm.controller.policy import Policy
from apparate_llm.core import Decision, Exit


@dataclass(slots=True, kw_only=True)
class OffPolicy(Policy):
    depth: int = 0
    depths: tuple[int, ...] = (0,)

    def start(self, num_requests: int) -> int:
        return 0

    def decide(self, exit_: Exit, *, joint_acceptance: float, may_release: bool, num_tokens: int) -> Decision:
        return Decision.STOP
