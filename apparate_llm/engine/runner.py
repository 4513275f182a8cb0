"""The only module that knows the inside of vLLM's V1 model runner.

Adds to one engine step: verdict rows in the completion pass, their comparison, and the rounds after sampling.
"""

from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter

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

from apparate_llm.engine.eligibility import custom_processors
from apparate_llm.engine.fallback import FallbackRunner
from apparate_llm.engine.greedy import check, first_rows, is_plain_greedy
from apparate_llm.engine.huge_pages import use_huge_pages
from apparate_llm.engine.output import EarlyExitOutput
from apparate_llm.engine.runtime_config import PolicySwitch, admit_request
from apparate_llm.engine.seeds import kept
from apparate_llm.engine.shallow_pass import ShallowPass
from apparate_llm.engine.state_key import state_key_of
from apparate_llm.engine.vllm_args import forget_knobs
from apparate_llm.exits.draft import Drafter, DraftRequest
from apparate_llm.exits.ledger import PendingVerdict, RequestExits
from apparate_llm.exits.memory import Memory
from apparate_llm.exits.shadow import Shadow
from apparate_llm.exits.verify import best_and_regret, verdicts_of_sampling, verify_held
from apparate_llm.models.mixin import ramps_of

logger = init_logger("vllm.apparate")


class EarlyExitRunner(FallbackRunner):
    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.custom_processors = custom_processors(self.input_batch.logitsprocs)
        self.memory = Memory()

    def load_model(self, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights)
        config = self.exit_config
        if config.policy == "off":
            return
        ramps, depth = ramps_of(self.model)
        inner_depths = set(ramps[depth].inner) | (ramps.keys() - {0} if len(ramps) > 1 else set())
        if inner_depths:
            self.get_model().set_inner_state_depths(tuple(sorted(inner_depths)))  # type: ignore[operator]
            self.use_aux_hidden_state_outputs = True
        forget_knobs(self.vllm_config, sorted(inner_depths))
        num_layers = self.model_config.get_total_num_hidden_layers()
        self.switch = PolicySwitch(depth, tuple(sorted(ramps)), num_layers, most_exits=self.num_spec_tokens)
        policy = self.switch.make(config)
        self.exit_drafter = Drafter(
            ShallowPass(self, self.peers),
            ramps=ramps,
            policy=policy,
            budget=self.ledger.budget,
            max_exits=min(config.max_exits, self.num_spec_tokens),
            peers=self.peers,
        )
        self.shadow = Shadow(self.exit_drafter, tuple(sorted(inner_depths)), self.clock, self.peers)
        if self.peers.is_first:
            self.memory.begin(config, state_key_of(self, depths=sorted(ramps)), policy, num_layers=num_layers)
        learned = self.peers.share_object(policy.state())
        if learned and not self.peers.is_first:  # another rank may have another file, or none
            policy.restore(learned)
        if config.huge_pages:
            use_huge_pages()
        if self.custom_processors:
            logger.warning(
                "No request takes exits: the logits processors %s may act on any of them, and know nothing of exits",
                ", ".join(self.custom_processors),
            )
        logger.info("Early exits: ramps at depths %s, beginning with %d, %s", sorted(ramps), depth, config)

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
            if new.req_id not in self.ledger.requests and new.sampling_params is not None:
                self.ledger.add_request(new.req_id, self._exits_of(new.sampling_params))
                if self.exit_drafter is not None:
                    self.exit_drafter.policy.on_request()

    def _exits_of(self, params: SamplingParams) -> RequestExits:
        return admit_request(params, self.exit_config, self.ledger, others_allow=not self.custom_processors)

    # ---- verdicts: extra logits rows, taken off again before vLLM samples

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: NDArray[np.int32]
    ) -> tuple[torch.Tensor, SpecDecodeMetadata | None, int]:
        logits_indices, spec_metadata, max_sampled = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        plain: tuple[list[PendingVerdict], torch.Tensor] = ([], logits_indices)
        self._pending, logits_indices = self._guarded(
            "verdict rows",
            lambda: self._with_verdict_rows(scheduler_output, num_scheduled_tokens, plain[1], spec_metadata),
            plain,
        )
        return logits_indices, spec_metadata, max_sampled

    def _with_verdict_rows(
        self,
        scheduler_output: SchedulerOutput,
        num_scheduled_tokens: NDArray[np.int32],
        logits_indices: torch.Tensor,
        spec_metadata: SpecDecodeMetadata | None,
    ) -> tuple[list[PendingVerdict], torch.Tensor]:
        batch, pending = self.input_batch, list[PendingVerdict]()
        if self.ledger.counts.outstanding:
            for index, request_id in enumerate(batch.req_ids):
                self.ledger.check_arrived(request_id, num_tokens=int(batch.num_tokens_no_spec[index]))
                pending += self.ledger.due(
                    request_id,
                    first_position=int(batch.num_computed_tokens_cpu[index]),
                    num_scheduled=int(num_scheduled_tokens[index]),
                    first_row=int(self.query_start_loc.np[index]),
                )
        num_drafts = sum(spec_metadata.num_draft_tokens) if spec_metadata is not None else 0
        self.clock.scheduled(
            num_requests=batch.num_reqs,
            num_rows=int(scheduler_output.total_num_scheduled_tokens),
            num_decode_rows=batch.num_reqs + num_drafts + len(pending),
        )
        if pending:
            rows = [item.row for item in pending]
            logits_indices = torch.cat([logits_indices, logits_indices.new_tensor(rows)])
        return pending, logits_indices

    @torch.inference_mode()
    def sample_tokens(  # type: ignore[override]  # vLLM's decorator has torch's class for its type
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput:
        state = self.execute_model_state
        self._judged, self.later = [], None
        if state is not None:
            self.ledger.counts.completion_passes += 1
            self._judge(state)
        self._released = {}
        with kept(self.input_batch.generators, self._attempt("seeds", self._unfinished_prompts, ())):
            output: ModelRunnerOutput = super().sample_tokens(grammar_output)  # type: ignore[type-var, assignment]
        if released := self._released:
            output = self._attempt("release", lambda: EarlyExitOutput.extending(output, released=released), output)
        self._rows = []
        return output

    def _unfinished_prompts(self) -> Iterable[int]:
        """Requests of which part of the prompt was read only, where there are random streams."""
        return (
            self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
            if self.input_batch.generators
            else ()
        )

    def _judge(self, state: ExecuteModelState) -> None:
        """Record the verdicts that the pass has given. Whatever comes of them, vLLM samples from its own rows."""
        if pending := self._pending:
            self._pending, all_logits, num_rows = [], state.logits, len(state.logits) - len(pending)
            state = self.execute_model_state = state._replace(
                logits=all_logits[:num_rows], sample_hidden_states=state.sample_hidden_states[:num_rows]
            )
            self._attempt("verdicts", lambda: self._record_released(pending, all_logits[num_rows:]), None)
        if self._drops_drafts():
            self._attempt("verdicts", self.ledger.drop_held, None)
        drafts = self._drafts_to_judge(state)
        if drafts is not None:
            logits = state.logits if self.peers.alone else state.logits.clone()  # no rank may be ahead of others
            if self._guarded("verdicts", lambda: self._judge_held(drafts, logits), False):
                self.execute_model_state = state._replace(logits=logits)

    def _record_released(self, pending: list[PendingVerdict], logits: torch.Tensor) -> None:
        """Record the verdicts on released exits: logits [num_pending, vocab]."""
        token_ids = torch.tensor([item.exit.token_id for item in pending])
        self._judged = self.ledger.record(pending, *best_and_regret(logits, token_ids))

    def _drafts_to_judge(self, state: ExecuteModelState) -> SpecDecodeMetadata | None:
        """Held exits whose verdicts take scores; else what is accepted tells them, see `verdicts_of_sampling`."""
        metadata, config = state.spec_decode_metadata, self.exit_config
        lossless = config.accuracy_bound == 0 and not config.allow_looser_requests and config.feedback_log is None
        if self.exit_drafter is None or metadata is None or metadata.max_spec_len == 0 or lossless:
            return None
        return metadata

    def _judge_held(self, drafts: SpecDecodeMetadata, logits: torch.Tensor) -> bool:
        assert self.exit_drafter is not None
        now_s = self.clock.now_s
        self._judged += verify_held(
            logits,
            drafts,
            self.input_batch.req_ids,
            ledger=self.ledger,
            policy=self.exit_drafter.policy,
            may_diverge=lambda request_id: self.ledger.requests[request_id].may_diverge(now_s),
        )
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
            output = self._attempt("checking", partial(self._check, logits, spec_decode_metadata), None)
            if output is not None:
                return output
        return super()._sample(logits, spec_decode_metadata)

    def _check(self, logits: torch.Tensor | None, metadata: SpecDecodeMetadata) -> SamplerOutput | None:
        assert logits is not None, "drafts without scores"
        return check(logits, metadata) if is_plain_greedy(self.input_batch.sampling_metadata) else None

    # ---- rounds

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
        """vLLM's call for drafts after sampling and bookkeeping: the rounds. Held exits are the drafts."""
        self._drafts = [[] for _ in sampled_token_ids]
        self._guarded(
            "rounds",
            lambda: self._go_on(
                sampled_token_ids, spec_decode_metadata.num_draft_tokens, hidden_states, aux_hidden_states or []
            ),
            None,
        )
        self._attempt("clock", self.clock.start, None)
        return self._drafts

    def _go_on(
        self, sampled_token_ids: list[list[int]], num_drafts: list[int], final: torch.Tensor, inner: list[torch.Tensor]
    ) -> None:
        """Count what the step brought, learn from it, and run the rounds or leave them for later."""
        self.clock.completed()
        if self.safety.is_due(self.clock.now_s):
            self._come_back(by_hand=False)
        rows, ends = self._live_rows(sampled_token_ids, num_drafts)
        self._rows = rows
        if self.exit_drafter is None:
            return
        self._learn()
        if self.exit_drafter.policy.wants_shadow():
            self.shadow.maybe_run(sampled_token_ids, num_drafts, final, inner)
        num_rounds = self.exit_drafter.start() if rows else None
        if num_rounds is None:
            return
        propose = partial(self._propose, rows, num_rounds, final, inner)
        if ends or self._begins_an_answer(sampled_token_ids):
            self.later = propose
            for row in rows:
                row.may_release = False  # the tokens leave without
        else:
            propose()

    def _propose(
        self, rows: list[DraftRequest], num_rounds: int, final: torch.Tensor, inner: list[torch.Tensor]
    ) -> None:
        """Run the rounds and enter the held exits in the drafts."""
        self._run_rounds(rows, num_rounds, final, inner)
        for row in rows:
            self._commit(row)
            self._drafts[row.request_index] = [exit_.token_id for exit_ in row.held]

    @torch.inference_mode()
    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """vLLM's call for the drafts, made when the step's tokens are on their way."""
        if later := self.later:
            self.later = None
            self._guarded("rounds", later, None)
            self._attempt("clock", self.clock.start, None)
        return super().take_draft_token_ids()

    def with_drafts(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """The step's output together with them; without, the scheduler asks for them."""
        return self._attempt(
            "drafts", lambda: EarlyExitOutput.extending(output, drafts=self.take_draft_token_ids()), output
        )

    def _begins_an_answer(self, sampled_token_ids: list[list[int]]) -> bool:
        """Whether a request's first token is among those of this step."""
        return any(
            checked and len(self.requests[request_id].output_token_ids) == len(checked)
            for request_id, checked in zip(self.input_batch.req_ids, sampled_token_ids, strict=False)
        )

    def _learn(self) -> None:
        """Tell the policy what the step has shown."""
        assert self.exit_drafter is not None
        policy = self.exit_drafter.policy
        began_s = perf_counter()
        for verdict in self._judged:
            if verdict.follows_text:
                policy.on_verdict(verdict.exit, verdict.agrees)
        self.clock.tell(policy)
        controller_ms = (perf_counter() - began_s) * 1e3 + self.exit_drafter.take_deciding_ms()
        self.memory.learned(self.clock.last, self._judged, policy, self.ledger.distributions, controller_ms)

    def _run_rounds(
        self, rows: list[DraftRequest], num_rounds: int, final: torch.Tensor, inner: list[torch.Tensor]
    ) -> None:
        assert self.exit_drafter is not None
        policy = self.exit_drafter.policy
        spent = self.exit_drafter.run(rows, num_rounds, final, self.shadow.ramp_states(inner))
        self.ledger.counts.rounds += len(spent)
        self.ledger.counts.shallow_blocks += policy.depth * sum(num_rows for num_rows, _ in spent)
        shared = self.clock.shared_rounds(spent)
        for num_rows, ms in shared:
            policy.on_draft_step(policy.depth, num_rows, ms)
        self.memory.rounds(shared, self.ledger.distributions)

    def _live_rows(self, sampled_token_ids: list[list[int]], num_drafts: list[int]) -> tuple[list[DraftRequest], bool]:
        """Count this step's checked tokens; a row for each request that goes on and takes exits, and whether another
        ends here."""
        batch, now_s = self.input_batch, self.clock.now_s
        judged = {verdict.request_id for verdict in self._judged if not verdict.released}
        takes_drafts = self.exit_drafter is not None and not self._drops_drafts()
        rows, ends = [], False
        for index, checked in enumerate(sampled_token_ids):
            if not checked:  # a prompt chunk
                continue
            num_accepted = len(checked) - 1
            request_id = batch.req_ids[index]
            request = self.requests[request_id]
            params = request.sampling_params
            assert params is not None and params.max_tokens is not None, f"{request_id} generates without limits"
            exits = self.ledger.requests[request_id]
            stops = exits.stop_token_ids
            num_emitted = next((i + 1 for i, token in enumerate(checked) if token in stops), len(checked))
            num_before = len(request.output_token_ids) - len(checked)
            num_left = params.max_tokens - num_before - num_emitted
            end = int(batch.num_tokens_no_spec[index])
            num_context_left = self.max_model_len - end
            self.ledger.checked(exits, num_drafts[index], num_accepted)
            num_unjudged = 0 if request_id in judged else num_drafts[index]
            self._judged += verdicts_of_sampling(request_id, exits, checked, end, num_unjudged)
            self.ledger.emit(request_id, num_emitted + min(num_left, 0), now_s)
            if num_emitted < len(checked) or checked[-1] in stops or num_left <= 0 or num_context_left <= 0:
                ends = True
                self.ledger.ended(request_id)
                continue
            if self.exit_drafter is None or not takes_drafts or not exits.takes_exits:
                continue
            room = min(num_left, num_context_left, self.exit_drafter.room(index, end - 1))
            if room <= 0:
                continue
            rows.append(
                DraftRequest(
                    request_index=index,
                    newest_token=checked[-1],
                    newest_position=end - 1,
                    state_row=int(self.query_start_loc.np[index + 1]) - 1 - (num_drafts[index] - num_accepted),
                    max_released=room,
                    max_held=min(room, num_left - 1, num_context_left - 1),
                    may_release=exits.releasable and exits.may_diverge(now_s),
                    greedy=exits.greedy,
                    bucket=exits.bucket,
                    stop_token_ids=stops,
                )
            )
        return rows, ends

    def _commit(self, row: DraftRequest) -> None:
        """Make released exits ordinary tokens of the request, as vLLM's bookkeeping does with sampled ones."""
        assert self.exit_drafter is not None
        request_id = self.input_batch.req_ids[row.request_index]
        exits = self.ledger.requests[request_id]
        exits.held, exits.offered = row.held, row.offered
        if not row.released:
            return
        tokens = [exit_.token_id for exit_ in row.released]
        self.exit_drafter.model.append(row.request_index, tokens)
        self.ledger.release(request_id, row.released)
        self._released[request_id] = tokens
