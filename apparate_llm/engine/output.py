"""What the runner hands to the scheduler besides vLLM's own output."""

from dataclasses import dataclass, field

from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput


@dataclass
class EarlyExitOutput(ModelRunnerOutput):
    # request id -> exits released in this step, in order, after the step's checked tokens
    released: dict[str, list[int]] = field(default_factory=dict)
    drafts: DraftTokenIds | None = None  # held exits, checked in the next step; None: to be asked for

    @classmethod
    def extending(cls, output: ModelRunnerOutput, **ours: object) -> "EarlyExitOutput":
        return cls(**vars(output) | ours)
