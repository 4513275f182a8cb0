"""What the runner hands to the scheduler besides vLLM's own output."""

from dataclasses import dataclass, field

from vllm.v1.outputs import ModelRunnerOutput


@dataclass
class EarlyExitOutput(ModelRunnerOutput):
    # request id -> exits released in this step, in order, after the step's checked tokens
    released: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def extending(cls, output: ModelRunnerOutput, released: dict[str, list[int]]) -> "EarlyExitOutput":
        return cls(**vars(output), released=released)
