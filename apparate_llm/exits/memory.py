"""What outlives the steps of an engine: histograms, the feedback log, the controller's state. No exit depends on it:
what fails here is a warning."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.feedback import FeedbackLog
from apparate_llm.controller.policy import Policy
from apparate_llm.controller.state import ControllerState, resolve_path
from apparate_llm.exits.histograms import Distributions
from apparate_llm.exits.ledger import Verdict
from apparate_llm.exits.safety import Asides
from apparate_llm.exits.step_clock import Took
from apparate_llm.machine import cache_folder


class Memory:
    """Of one runner; with several ranks the first one keeps the files."""

    def __init__(self) -> None:
        self.state: ControllerState | None = None  # None: nothing is kept
        self.feedback: FeedbackLog | None = None
        self.asides = Asides()

    def begin(
        self, config: EarlyExitConfig, identity: Mapping[str, object], policy: Policy, *, num_layers: int
    ) -> None:
        """Give `policy` what an earlier start has learned."""
        path = resolve_path(config.controller_state, identity, cache_folder)
        if path is not None:
            self.state = ControllerState(path, identity, writes=True)
            self.state.restore(policy)
        if config.feedback_log is not None:
            self.feedback = FeedbackLog(Path(config.feedback_log).expanduser(), {**identity, "num_layers": num_layers})

    def end(self, policy: Policy | None) -> None:
        if self.state is not None and policy is not None:
            self.asides.run("The controller's state", partial(self.state.save, policy))

    def learned(
        self,
        took: Took | None,
        verdicts: list[Verdict],
        policy: Policy,
        histograms: Distributions,
        controller_ms: float,
    ) -> None:
        """Of a step: what it took, if it can be said, and its verdicts."""
        if took is not None:
            self.asides.run("A histogram", partial(histograms.verify_ms.observe, took.verify_ms))
        self.asides.run("A histogram", partial(histograms.controller_ms.observe, controller_ms))
        if self.feedback is not None:
            self.asides.run("The feedback log", partial(self.feedback.completed, took, verdicts))
        if self.state is not None:
            self.asides.run("The controller's state", partial(self.state.save_now_and_then, policy))

    def drafted(self, spent: list[tuple[int, float]], histograms: Distributions) -> None:
        """Rows and ms of draft steps."""
        for _, ms in spent:
            self.asides.run("A histogram", partial(histograms.draft_step_ms.observe, ms))
        if self.feedback is not None:
            self.asides.run("The feedback log", partial(self.feedback.drafted, spent))
