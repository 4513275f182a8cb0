"""The scheduler class named in `--scheduler-cls`: released exits join the step's output here.

They are appended after vLLM has settled how many drafts were accepted, so its token counts and its speculation
metrics see held exits only. A released exit then is an ordinary token that is not computed yet: the next step
schedules it with the newest token. Held exits come with the output, too, where drafting is done by then.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from apparate_llm.patches.ledger import apply_all
from apparate_llm.patches.overrides import check_those_of

logger = init_logger("vllm.apparate")
T = TypeVar("T")


class EarlyExitScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._released: dict[str, list[int]] = {}
        self.has_drafts = False  # the last step's came with its output
        self.num_failures = 0
        apply_all("engine")
        check_those_of("engine.scheduler")
        # Draft steps deeper than 0 write KV for the newest token and the exits after it.
        self.num_lookahead_tokens = max(self.num_lookahead_tokens, self.num_spec_tokens)
        # vLLM pads a resumed request's single row with draft placeholders (-1) for CUDA graphs; there are none here
        # and -1 is no token. A constant dynamic draft count turns the padding off.
        if self.dynamic_sd_lookup is None:
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self._released = getattr(model_runner_output, "released", {})
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._safely(self._check_computed, None)
        self._released = {}
        drafts = getattr(model_runner_output, "drafts", None)
        self.has_drafts = drafts is not None
        if drafts is not None:
            self.update_draft_token_ids(drafts)
        return outputs

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Also vLLM's own call, where drafting comes after the output."""
        self._safely(lambda: self._hold(draft_token_ids), None)

    def _hold(self, drafts: DraftTokenIds) -> None:
        super().update_draft_token_ids(drafts)

    def _check_computed(self) -> None:
        """Raise AssertionError if KV is counted that was never computed."""
        for request_id, released in self._released.items():
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished() and not request.is_prefill_chunk:
                computed, tokens = request.num_computed_tokens, request.num_tokens
                assert computed == 0 or computed == tokens - 1 - len(released), (
                    f"{request_id}: {computed} of {tokens} tokens computed with {len(released)} exits outstanding"
                )

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        new_token_ids.extend(self._safely(lambda: self._released_of(request), []))
        return super()._update_request_with_output(request, new_token_ids, is_stale)

    def _released_of(self, request: Request) -> list[int]:
        return self._released.get(request.request_id, [])

    def _safely(self, work: Callable[[], T], default: T) -> T:
        """Whatever fails here costs this step's exits: the worker follows what the scheduler has, see its
        `_update_states`."""
        try:
            return work()
        except Exception:
            self.num_failures += 1
            if self.num_failures & (self.num_failures - 1) == 0:
                logger.exception("Early exits failed in the scheduler, in this step it goes on without")
            return default

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        if request.num_output_tokens and request.num_computed_tokens < request.num_tokens - 1:
            # Exits are outstanding: their verdict rows must be computed, not found in the prefix cache.
            request.skip_reading_prefix_cache = True
        super()._preempt_request(request, timestamp, drop_stale_output)
