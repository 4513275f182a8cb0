"""The only module that knows the inside of vLLM's V1 model runner.

Adds to one engine step: verdict rows in the completion pass, their comparison, and the rounds after sampling.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from apparate_llm.config import config_from_vllm
from apparate_llm.controller.budget import AccuracyBudget
from apparate_llm.controller.feedback import FeedbackLog
from apparate_llm.controller.state import ControllerState, resolve_path
from apparate_llm.engine.classes import shares_of
from apparate_llm.engine.clock import StepClock
from apparate_llm.engine.eligibility import custom_processors
from apparate_llm.engine.greedy import check, first_rows, is_plain_greedy
from apparate_llm.engine.huge_pages import use_huge_pages
from apparate_llm.engine.identity import identity_of
from apparate_llm.engine.judge import best_and_regret, judge_by_sampling, judge_held
from apparate_llm.engine.live import LivePolicy, exits_of, reconfigured, requests_follow
from apparate_llm.engine.output import EarlyExitOutput
from apparate_llm.engine.parallel import share_prediction
from apparate_llm.engine.rounds import Rounds, Row
from apparate_llm.engine.seeds import kept
from apparate_llm.engine.settings import forget_knobs
from apparate_llm.engine.shadow import Shadow
from apparate_llm.engine.verdicts import PendingVerdict, RequestExits, Verdict, VerdictLedger
from apparate_llm.machine import cache_folder
from apparate_llm.models.mixin import ramps_of

logger = init_logger("vllm.apparate")


class EarlyExitRunner(CPUModelRunner):
    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.exit_config = config = config_from_vllm(vllm_config)
        self.ledger = VerdictLedger(AccuracyBudget(config.accuracy_bound, config.bound_kind), shares_of(config))
        self.clock = StepClock(get_tp_group())
        self.custom_processors = custom_processors(self.input_batch.logitsprocs)
        self.rounds: Rounds | None = None  # None: no exits
        self.live: LivePolicy | None = None  # None: started without exits
        self.controller_state: ControllerState | None = None  # None: nothing is kept
        self.feedback: FeedbackLog | None = None
        self._pending: list[PendingVerdict] = []  # verdicts the pass under way will give
        self._released: dict[str, list[int]] = {}  # exits released in the step under way
        self._judged: list[Verdict] = []  # on exits, by the step under way
        # Rounds that wait until the step's tokens have left, where an answer begins or ends: its client has them
        # sooner, and what it asks next may still join the next step.
        self.later: Callable[[], None] | None = None

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
        self.live = LivePolicy(depth, tuple(sorted(ramps)), num_layers, most_exits=self.num_spec_tokens)
        policy = self.live.make(config)
        self.rounds = Rounds(
            self,
            ramps=ramps,
            policy=policy,
            budget=self.ledger.budget,
            max_exits=min(config.max_exits, self.num_spec_tokens),
            share=lambda prediction: share_prediction(prediction, get_tp_group()),
        )
        self.shadow = Shadow(self.rounds, tuple(sorted(inner_depths)))
        is_first_rank = get_tp_group().rank_in_group == 0
        identity = identity_of(self, depths=sorted(ramps))
        path = resolve_path(config.state, identity, cache_folder)
        if path is not None:
            self.controller_state = ControllerState(path, identity, writes=is_first_rank)
            self.controller_state.restore(policy)
        if config.feedback_log is not None and is_first_rank:
            self.feedback = FeedbackLog(Path(config.feedback_log).expanduser(), {**identity, "num_layers": num_layers})
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
        if self.controller_state is not None and self.rounds is not None:
            self.controller_state.save(self.rounds.policy)
        super().shutdown()

    # ---- requests come and go

    def _update_states(self, scheduler_output: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.ledger.end_request(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id not in self.ledger.requests and new.sampling_params is not None:
                self.ledger.add_request(new.req_id, self._exits_of(new.sampling_params))
                if self.rounds is not None:
                    self._guarded(self.rounds.policy.joined)
        correction = super()._update_states(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:  # the engine idles
            self.clock.stop()
            self._guarded(self.check_integrity)
        return correction

    def _exits_of(self, params: Any) -> RequestExits:
        return exits_of(params, self.exit_config, self.ledger, others_allow=not self.custom_processors)

    def reconfigure(self, changes: Any) -> None:
        """Serve with other knobs from the next step on; raises ConfigError if they are not allowed."""
        self.exit_config = reconfigured(self.live, self.rounds, self.exit_config, changes)
        requests_follow(self.ledger, self.exit_config)
        logger.info("Early exits go on with %s", self.exit_config)

    # ---- verdicts: extra logits rows, taken off again before vLLM samples

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        logits_indices, spec_metadata, max_sampled = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._pending = []
        batch = self.input_batch
        if self.ledger.counts.outstanding:
            for index, request_id in enumerate(batch.req_ids):
                self._pending += self.ledger.due(
                    request_id,
                    first_position=int(batch.num_computed_tokens_cpu[index]),
                    num_scheduled=int(num_scheduled_tokens[index]),
                    first_row=int(self.query_start_loc.np[index]),
                )
        num_drafts = sum(spec_metadata.num_draft_tokens) if spec_metadata is not None else 0
        self.clock.scheduled(
            num_requests=batch.num_reqs,
            num_rows=int(scheduler_output.total_num_scheduled_tokens),
            num_decode_rows=batch.num_reqs + num_drafts + len(self._pending),
        )
        if self._pending:
            rows = [item.row for item in self._pending]
            logits_indices = torch.cat([logits_indices, logits_indices.new_tensor(rows)])
        return logits_indices, spec_metadata, max_sampled

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:  # type: ignore[override]
        state = self.execute_model_state
        self._judged, self.later = [], None
        if state is not None:
            self.ledger.counts.completion_passes += 1
            if self._pending:
                state = self._record_released(state)
            if self._drops_drafts():
                self.ledger.drop_held()
            self._guarded(lambda: self._judge_held(state))
        self._released = {}
        generators = self.input_batch.generators
        unfinished = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0] if generators else ()
        with kept(generators, unfinished):
            output = super().sample_tokens(grammar_output)
        if self._released:
            output = EarlyExitOutput.extending(output, released=self._released)
        return output

    def _record_released(self, state: Any) -> Any:
        """Record the verdicts on released exits and take their rows off."""
        num_sampling_rows = len(state.logits) - len(self._pending)
        token_ids = torch.tensor([item.exit.token_id for item in self._pending])
        self._judged = self.ledger.record(self._pending, *best_and_regret(state.logits[num_sampling_rows:], token_ids))
        self._pending = []
        self.execute_model_state = state._replace(
            logits=state.logits[:num_sampling_rows],
            sample_hidden_states=state.sample_hidden_states[:num_sampling_rows],
        )
        return self.execute_model_state

    def _judge_held(self, state: Any) -> None:
        metadata = state.spec_decode_metadata
        config = self.exit_config
        lossless = config.accuracy_bound == 0 and not config.allow_looser_requests and config.feedback_log is None
        if self.rounds is None or metadata is None or not metadata.max_spec_len or lossless:
            return  # without scores what is accepted tells the verdicts, see `judge_by_sampling`
        now_s = self.clock.now_s
        self._judged += judge_held(
            state.logits,
            metadata,
            self.input_batch.req_ids,
            ledger=self.ledger,
            policy=self.rounds.policy,
            may_diverge=lambda request_id: self.ledger.requests[request_id].may_diverge(now_s),
        )

    def _drops_drafts(self) -> bool:
        """Whether a step goes on as if there were none: scores of tokens that a request names come from vLLM's plain
        sampler only."""
        return bool(self.input_batch.sampling_metadata.logprob_token_ids)

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        # With nothing to check, plain sampling is cheaper; the rejection sampler also fails on top-k without any draft.
        if spec_decode_metadata is not None and spec_decode_metadata.max_spec_len == 0:
            spec_decode_metadata = None
        if spec_decode_metadata is not None and self._drops_drafts():
            logits, spec_decode_metadata = logits[first_rows(spec_decode_metadata)], None
        if spec_decode_metadata is not None and is_plain_greedy(self.input_batch.sampling_metadata):
            output = self._guarded(lambda: check(logits, spec_decode_metadata))
            if output is not None:
                return output
        return super()._sample(logits, spec_decode_metadata)

    # ---- rounds

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        return common_attn_metadata is not None  # rows near the end of the context are left out one by one

    def propose_draft_token_ids(  # type: ignore[override]
        self,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        spec_decode_metadata: Any,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> list[list[int]]:
        """vLLM's call for drafts after sampling and bookkeeping: the rounds. Held exits are the drafts."""
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        self.clock.completed()
        rows, ends = self._live_rows(sampled_token_ids, spec_decode_metadata.num_draft_tokens)
        inner = aux_hidden_states or []
        if self.rounds is not None:
            self._guarded(self._learn)
        if self.rounds is not None and self.rounds.policy.wants_shadow():
            num_drafts = spec_decode_metadata.num_draft_tokens
            self._guarded(lambda: self.shadow.maybe_run(sampled_token_ids, num_drafts, hidden_states, inner))
        num_rounds = self._guarded(self.rounds.start) if self.rounds is not None and rows else None
        if num_rounds is not None:
            propose = partial(self._propose, drafts, rows, num_rounds, hidden_states, inner)
            if ends or self._begins_an_answer(sampled_token_ids):
                self.later = propose
                for row in rows:
                    row.may_release = False  # the tokens leave without
            else:
                propose()
        self.clock.start()
        return drafts

    def _propose(
        self, drafts: list[list[int]], rows: list[Row], num_rounds: int, final: torch.Tensor, inner: list[torch.Tensor]
    ) -> None:
        """Run the rounds and enter the held exits in `drafts`."""
        self._guarded(lambda: self._run_rounds(rows, num_rounds, final, inner))
        for row in rows:
            drafts[row.request_index] = [exit_.token_id for exit_ in row.held]
            self._commit(row)

    @torch.inference_mode()
    def take_draft_token_ids(self) -> Any:
        """vLLM's call for the drafts, made when the step's tokens are on their way."""
        if self.later is not None:
            self.later()
            self.later = None
            self.clock.start()
        return super().take_draft_token_ids()

    def _begins_an_answer(self, sampled_token_ids: list[list[int]]) -> bool:
        """Whether a request's first token is among those of this step."""
        return any(
            checked and len(self.requests[request_id].output_token_ids) == len(checked)
            for request_id, checked in zip(self.input_batch.req_ids, sampled_token_ids, strict=False)
        )

    def _learn(self) -> None:
        """Tell the policy what the step has shown."""
        assert self.rounds is not None
        policy, took, spread = self.rounds.policy, self.clock.last, self.ledger.distributions
        began_s = perf_counter()
        for verdict in self._judged:
            if verdict.follows_text:
                policy.verdict(verdict.exit, verdict.agrees)
        self.clock.tell(policy)
        if took is not None:
            spread.completion_ms.observe(took.completion_ms)
        spread.controller_ms.observe((perf_counter() - began_s) * 1e3 + self.rounds.take_deciding_ms())
        if self.feedback is not None:
            self.feedback.completed(took, self._judged)
        if self.controller_state is not None:
            self.controller_state.save_now_and_then(policy)

    def _run_rounds(self, rows: list[Row], num_rounds: int, final: torch.Tensor, inner: list[torch.Tensor]) -> None:
        assert self.rounds is not None
        policy = self.rounds.policy
        try:
            spent = self.rounds.run(rows, num_rounds, final, self.shadow.ramp_states(inner))
        except Exception:
            for row in rows:
                for _ in row.released:
                    self.ledger.budget.prove_right(row.bucket)  # not emitted after all
                row.released, row.held, row.offered = [], [], None
            raise
        self.ledger.counts.rounds += len(spent)
        self.ledger.counts.shallow_blocks += policy.depth * sum(num_rows for num_rows, _ in spent)
        for num_rows, ms in self.clock.shared_rounds(spent):
            policy.round_took(policy.depth, num_rows, ms)
            self.ledger.distributions.round_ms.observe(ms)
        if self.feedback is not None:
            self.feedback.rounds(spent)

    def _live_rows(self, sampled_token_ids: list[list[int]], num_drafts: list[int]) -> tuple[list[Row], bool]:
        """Count this step's checked tokens; a row for each request that goes on and takes exits, and whether another
        ends here."""
        batch, now_s = self.input_batch, self.clock.now_s
        judged = {verdict.request_id for verdict in self._judged if not verdict.released}
        takes_drafts = self.rounds is not None and not self._drops_drafts()
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
            self._judged += judge_by_sampling(request_id, exits, checked, end, num_unjudged)
            self.ledger.emit(request_id, num_emitted + min(num_left, 0), now_s)
            if num_emitted < len(checked) or checked[-1] in stops or num_left <= 0 or num_context_left <= 0:
                ends = True
                self.ledger.ended(request_id)
                continue
            if self.rounds is None or not takes_drafts or not exits.takes_exits:
                continue
            room = min(num_left, num_context_left, self.rounds.room(index, end - 1))
            if room <= 0:
                continue
            rows.append(
                Row(
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

    def _commit(self, row: Row) -> None:
        """Make released exits ordinary tokens of the request, as vLLM's bookkeeping does with sampled ones."""
        batch = self.input_batch
        request_id = batch.req_ids[row.request_index]
        exits = self.ledger.requests[request_id]
        exits.held, exits.offered = row.held, row.offered
        if not row.released:
            return
        start = int(batch.num_tokens_no_spec[row.request_index])
        end = start + len(row.released)
        assert end <= self.max_model_len, f"released past the context: {end} > {self.max_model_len}"
        tokens = [exit_.token_id for exit_ in row.released]
        batch.token_ids_cpu[row.request_index, start:end] = tokens
        batch.is_token_ids[row.request_index, start:end] = True
        batch.num_tokens_no_spec[row.request_index] = end
        self.requests[request_id].output_token_ids.extend(tokens)
        self.ledger.release(request_id, row.released)
        self._released[request_id] = tokens

    # ---- safety

    def _guarded(self, work: Any) -> Any:
        """Run a part that plain serving does not need; if it fails, serving goes on without exits."""
        try:
            return work()
        except Exception:
            logger.exception("Early exits failed and are off from now on; serving continues as plain vLLM")
            self.ledger.counts.fallbacks += 1
            self.rounds = None
            return None

    def check_integrity(self) -> None:
        """Raise AssertionError if the exits do not add up or KV is counted that was never computed."""
        self.ledger.check_integrity()
        self.ledger.check_requests(self.requests)
