"""With `batch.py` all that knows the inside of vLLM's V1 model runner.

Each of vLLM's calls is answered by what `exits/step.py` does then: verdict rows join the pass, their
scores are compared, and after sampling exits are drafted.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import ExecuteModelState

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.policy import Policy
from apparate_llm.engine.batch import batch_of
from apparate_llm.engine.eligibility import custom_processors
from apparate_llm.engine.fallback import FallbackRunner
from apparate_llm.engine.greedy import first_rows, is_plain_greedy, verify_greedy
from apparate_llm.engine.huge_pages import use_huge_pages
from apparate_llm.engine.output import EarlyExitOutput
from apparate_llm.engine.runtime_config import PolicySwitch, admit_request, max_tokens_of
from apparate_llm.engine.screening import screened_head
from apparate_llm.engine.seeds import kept
from apparate_llm.engine.shallow_pass import ShallowPass
from apparate_llm.engine.state_key import state_key_of
from apparate_llm.engine.vllm_args import forget_options
from apparate_llm.exits.draft import Drafter, DraftRequest
from apparate_llm.exits.ledger import PendingVerdict, RequestExits
from apparate_llm.exits.memory import Memory
from apparate_llm.exits.shadow import Shadow
from apparate_llm.models.mixin import ramps_of
from apparate_llm.models.screened_head import ScreenedHead

logger = init_logger("vllm.apparate")


class EarlyExitRunner(FallbackRunner):
    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.custom_processors = custom_processors(self.input_batch.logitsprocs)
        self.memory = Memory()
        self.screened_head: ScreenedHead | None = None

    def load_model(self, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights)
        config = self.exit_config
        if config.policy == "off":
            return
        ramps, depth = ramps_of(self.model)
        aux_depths = set(ramps[depth].aux_layers) | (ramps.keys() - {0} if len(ramps) > 1 else set())
        if aux_depths:
            self.get_model().set_aux_state_depths(tuple(sorted(aux_depths)))  # type: ignore[operator]
            self.use_aux_hidden_state_outputs = True
        forget_options(self.vllm_config, sorted(aux_depths))
        num_layers = self.model_config.get_total_num_hidden_layers()
        sibling = self.get_model().sibling
        self.switch = PolicySwitch(
            depth, tuple(sorted(ramps)), num_layers, most_exits=self.num_spec_tokens, sibling=sibling is not None
        )
        policy = self.switch.make(config)
        self.exit_drafter = Drafter(
            ShallowPass(self, self.peers),
            ramps=ramps,
            policy=policy,
            budget=self.ledger.budget,
            max_exits=min(config.max_exits, self.num_spec_tokens),
            peers=self.peers,
        )
        self.shadow = Shadow(self.exit_drafter, tuple(sorted(aux_depths)), self.clock, self.peers)
        self._recall(config, sorted(ramps), policy, num_layers)
        if config.screened_head and self.peers.alone:
            self.screened_head = self._attempt("screening", lambda: screened_head(self.get_model()), None)
        if config.huge_pages:
            use_huge_pages()
        if self.custom_processors:
            logger.warning(
                "No request takes exits: the logits processors %s may act on any of them, and know nothing of exits",
                ", ".join(self.custom_processors),
            )
        whose = f", {sibling}" if sibling is not None else ""
        logger.info("Early exits: ramps at depths %s, beginning with %d%s, %s", sorted(ramps), depth, whose, config)

    def _recall(self, config: EarlyExitConfig, depths: list[int], policy: Policy, num_layers: int) -> None:
        """What the policy learned in earlier runs, the same on all ranks."""
        if self.peers.is_first:
            self.memory.begin(config, state_key_of(self, depths=depths), policy, num_layers=num_layers)
        learned = self.peers.share_object(policy.state())
        if learned and not self.peers.is_first:  # another rank may have another file, or none
            policy.restore(learned)

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Warm-up of sampling by one row. vLLM takes as many as it may ever sample, to see what memory a GPU needs for
        it; on a CPU nobody looks, and sorting them takes seconds."""
        return super()._dummy_sampler_run(hidden_states[:1])

    def shutdown(self) -> None:
        self.memory.end(self.exit_drafter.policy if self.exit_drafter is not None else None)
        super().shutdown()

    # ---- requests come and go

    def _update_states(self, scheduler_output: SchedulerOutput) -> Callable[..., object] | None:
        self._attempt("requests", lambda: self._requests_change(scheduler_output), None)
        correction = super()._update_states(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:  # the engine idles
            self._attempt("clock", self.clock.stop, None)
            self._guarded("integrity", self.check_integrity, None)
        return correction

    def _requests_change(self, scheduler_output: SchedulerOutput) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self.ledger.end_request(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            if (known := self.ledger.requests.get(new.req_id)) is not None:  # its input goes on, with other limits
                known.max_tokens = max_tokens_of(new.sampling_params)
            elif new.sampling_params is not None:
                self.ledger.add_request(new.req_id, self._exits_of(new.sampling_params))
                if self.exit_drafter is not None:
                    self.exit_drafter.policy.on_request()

    def _exits_of(self, params: SamplingParams) -> RequestExits:
        return admit_request(params, self.exit_config, self.ledger, others_allow=not self.custom_processors)

    # ---- verdicts: extra logits rows, taken off again before vLLM samples

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: NDArray[np.int32]
    ) -> tuple[torch.Tensor, SpecDecodeMetadata | None, int]:
        plain_indices, spec_metadata, max_sampled = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        logits_indices = self._guarded(
            "verdict rows",
            lambda: self._with_verdict_rows(scheduler_output, num_scheduled_tokens, plain_indices, spec_metadata),
            plain_indices,
        )
        if self.screened_head is not None:
            self._screen_next(self.screened_head, scheduler_output, spec_metadata, num_plain=len(plain_indices))
        return logits_indices, spec_metadata, max_sampled

    def _with_verdict_rows(
        self,
        scheduler_output: SchedulerOutput,
        num_scheduled_tokens: NDArray[np.int32],
        logits_indices: torch.Tensor,
        spec_metadata: SpecDecodeMetadata | None,
    ) -> torch.Tensor:
        rows = self.step.due(
            batch_of(self),
            num_scheduled_tokens,
            num_tokens=int(scheduler_output.total_num_scheduled_tokens),
            num_drafts=sum(spec_metadata.num_draft_tokens) if spec_metadata is not None else 0,
        )
        return torch.cat([logits_indices, logits_indices.new_tensor(rows)]) if rows else logits_indices

    def _screen_next(
        self,
        head: ScreenedHead,
        scheduler_output: SchedulerOutput,
        spec_metadata: SpecDecodeMetadata | None,
        *,
        num_plain: int,
    ) -> None:
        """Let the head be screened in this pass, where nothing but best tokens and the scores of exits is read."""
        model: Any = self.get_model()
        model.next_scores = None
        is_plain = is_plain_greedy(self.input_batch.sampling_metadata) and not self.custom_processors
        if self.safety.is_off or not is_plain or scheduler_output.has_structured_output_requests:
            return
        asked = [(num_plain + number, item.exit.token_id) for number, item in enumerate(self.step.pending)]
        if spec_metadata is not None:
            tokens = spec_metadata.draft_token_ids.tolist()
            asked += zip(spec_metadata.target_logits_indices[: len(tokens)].tolist(), tokens, strict=True)

        def scores(hidden: torch.Tensor) -> torch.Tensor | None:
            return self._attempt("screening", lambda: head.scores(hidden, asked), None)

        model.next_scores = scores

    @torch.inference_mode()
    def sample_tokens(  # type: ignore[override]  # vLLM's decorator has torch's class for its type
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput:
        state = self.execute_model_state
        pending = self.step.begin_verifying()
        if state is not None:
            self.ledger.counts.verification_passes += 1
            self._verify(state, pending)
        self.step.released = {}
        with kept(self.input_batch.generators, self._attempt("seeds", self._unfinished_prompts, ())):
            output: ModelRunnerOutput = super().sample_tokens(grammar_output)  # type: ignore[type-var, assignment]
        if released := self.step.released:
            output = self._attempt("release", lambda: EarlyExitOutput.extending(output, released=released), output)
        self.step.requests = []
        return output

    def _unfinished_prompts(self) -> Iterable[int]:
        """Requests of which part of the prompt was read only, where there are random streams."""
        return (
            self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
            if self.input_batch.generators
            else ()
        )

    def _verify(self, state: ExecuteModelState, pending: list[PendingVerdict]) -> None:
        """Take the verdicts that the pass has given. Whatever comes of them, vLLM samples from its own rows."""
        if pending:
            all_logits, num_tokens = state.logits, len(state.logits) - len(pending)
            state = self.execute_model_state = state._replace(
                logits=all_logits[:num_tokens], sample_hidden_states=state.sample_hidden_states[:num_tokens]
            )
            self._attempt("verdicts", lambda: self.step.verify_released(pending, all_logits[num_tokens:]), None)
        if self._drops_drafts():
            self._attempt("verdicts", self.ledger.drop_held, None)
        drafts = self._drafts_to_verify(state)
        if drafts is not None:
            logits = state.logits if self.peers.alone else state.logits.clone()  # no rank may be ahead of others
            if self._guarded("verdicts", lambda: self._verify_held(drafts, logits), False):
                self.execute_model_state = state._replace(logits=logits)

    def _drafts_to_verify(self, state: ExecuteModelState) -> SpecDecodeMetadata | None:
        """Held exits whose verdicts take scores; else what is accepted tells them, see `verify_sampled`."""
        metadata, config = state.spec_decode_metadata, self.exit_config
        lossless = config.accuracy_bound == 0 and not config.allow_looser_requests and config.feedback_log is None
        if self.exit_drafter is None or metadata is None or metadata.max_spec_len == 0 or lossless:
            return None
        return metadata

    def _verify_held(self, drafts: SpecDecodeMetadata, logits: torch.Tensor) -> bool:
        assert self.exit_drafter is not None
        self.step.verify_held(drafts, logits, self.input_batch.req_ids, self.exit_drafter.policy)
        return True

    def _drops_drafts(self) -> bool:
        """Whether a step goes on as if there were none: scores of tokens that a request names come from vLLM's plain
        sampler only."""
        return bool(self.input_batch.sampling_metadata.logprob_token_ids)

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        # With nothing to check, plain sampling is cheaper; the rejection sampler also fails on top-k without any draft.
        if spec_decode_metadata is not None and spec_decode_metadata.max_spec_len == 0:
            spec_decode_metadata = None
        if spec_decode_metadata is not None and self._drops_drafts():
            assert logits is not None, "drafts without scores"
            logits, spec_decode_metadata = logits[first_rows(spec_decode_metadata)], None
        if spec_decode_metadata is not None:
            output = self._attempt("checking", partial(self._verify_greedy, logits, spec_decode_metadata), None)
            if output is not None:
                return output
        return super()._sample(logits, spec_decode_metadata)

    def _verify_greedy(self, logits: torch.Tensor | None, metadata: SpecDecodeMetadata) -> SamplerOutput | None:
        assert logits is not None, "drafts without scores"
        return verify_greedy(logits, metadata) if is_plain_greedy(self.input_batch.sampling_metadata) else None

    # ---- drafting

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        return common_attn_metadata is not None  # rows near the end of the context are left out one by one

    def propose_draft_token_ids(  # type: ignore[override]
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        sampling_metadata: SamplingMetadata,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        spec_decode_metadata: SpecDecodeMetadata,
        common_attn_metadata: CommonAttentionMetadata,
        slot_mappings: object,
    ) -> list[list[int]]:
        """vLLM's call for drafts after sampling and bookkeeping. Held exits are the drafts."""
        self.step.drafts = [[] for _ in sampled_token_ids]
        self._guarded(
            "drafting",
            lambda: self._go_on(
                sampled_token_ids, spec_decode_metadata.num_draft_tokens, hidden_states, aux_hidden_states or []
            ),
            None,
        )
        self._attempt("clock", self.clock.start, None)
        return self.step.drafts

    def _go_on(
        self, sampled_token_ids: list[list[int]], num_drafts: list[int], final: torch.Tensor, aux: list[torch.Tensor]
    ) -> None:
        """Count what the step brought, learn from it, and draft, now or later."""
        self.clock.completed()
        if self.safety.is_due(self.clock.now_s):
            self._come_back(by_hand=False)
        drafter, step = self.exit_drafter, self.step
        is_turn = step.emit(batch_of(self), sampled_token_ids, num_drafts, None if self._drops_drafts() else drafter)
        if drafter is None:
            return
        step.learn(drafter, self.memory)
        if drafter.policy.wants_shadow():
            self.shadow.maybe_run(sampled_token_ids, num_drafts, final, aux)
        requests = step.requests
        num_steps = drafter.start() if requests else None
        if num_steps is None:
            return
        propose = partial(self._propose, requests, num_steps, final, aux)
        if is_turn:
            step.put_off(propose)
        else:
            propose()

    def _propose(
        self, requests: list[DraftRequest], num_steps: int, final: torch.Tensor, aux: list[torch.Tensor]
    ) -> None:
        assert self.exit_drafter is not None
        spent = self.exit_drafter.run(requests, num_steps, final, self.shadow.ramp_states(aux))
        self.step.count_drafting(spent, self.exit_drafter.policy, self.memory)
        self.step.commit(requests, self.exit_drafter.model)

    @torch.inference_mode()
    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """vLLM's call for the drafts, made when the step's tokens are on their way."""
        if later := self.step.later:
            self.step.later = None
            self._guarded("drafting", later, None)
            self._attempt("clock", self.clock.start, None)
        return super().take_draft_token_ids()

    def with_drafts(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """The step's output together with them; without, the scheduler asks for them."""
        return self._attempt(
            "drafts", lambda: EarlyExitOutput.extending(output, drafts=self.take_draft_token_ids()), output
        )
