"""The only module that knows the inside of vLLM's V1 model runner.

Adds to one engine step: verdict rows in the completion pass, their comparison, and the rounds after sampling.
"""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from apparate_llm.config import config_from_vllm
from apparate_llm.controller.budget import AccuracyBudget
from apparate_llm.controller.policies import POLICIES
from apparate_llm.core import Outstanding
from apparate_llm.engine.eligibility import is_releasable, stop_token_ids
from apparate_llm.engine.output import EarlyExitOutput
from apparate_llm.engine.rounds import Rounds, Row
from apparate_llm.engine.verdicts import PendingVerdict, VerdictLedger
from apparate_llm.models.mixin import ramps_of

logger = init_logger("vllm.apparate")


class EarlyExitRunner(CPUModelRunner):
    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.exit_config = config_from_vllm(vllm_config)
        self.budget = AccuracyBudget(self.exit_config.accuracy_bound)
        self.ledger = VerdictLedger()
        self.rounds: Rounds | None = None  # None: no exits
        self._pending: list[PendingVerdict] = []  # verdicts the pass under way will give
        self._released: dict[str, list[int]] = {}  # exits released in the step under way

    def load_model(self, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights)
        if self.exit_config.policy == "off":
            return
        ramps = ramps_of(self.model)
        if ramps.inner:
            self.get_model().set_inner_state_depths(ramps.inner)  # type: ignore[operator]
            self.use_aux_hidden_state_outputs = True
        self.rounds = Rounds(
            self,
            ramps=ramps,
            policy=POLICIES[self.exit_config.policy](self.exit_config),
            budget=self.budget,
            max_exits=min(self.exit_config.max_exits, self.num_spec_tokens),
            max_rows=self.exit_config.max_rows,
        )
        logger.info("Early exits: ramp at depth %d, %s", ramps.depth, self.exit_config)

    # ---- requests come and go

    def _update_states(self, scheduler_output: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.ledger.end_request(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id not in self.ledger.requests and new.sampling_params is not None:
                self.ledger.add_request(new.req_id, releasable=is_releasable(new.sampling_params))
        correction = super()._update_states(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:  # the engine idles
            self._guarded(self.check_integrity)
        return correction

    # ---- verdicts: extra logits rows, taken off again before vLLM samples

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        logits_indices, spec_metadata, max_sampled = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._pending = []
        if self.ledger.counts.outstanding:
            batch = self.input_batch
            for index, request_id in enumerate(batch.req_ids):
                self._pending += self.ledger.due(
                    request_id,
                    first_position=int(batch.num_computed_tokens_cpu[index]),
                    num_scheduled=int(num_scheduled_tokens[index]),
                    first_row=int(self.query_start_loc.np[index]),
                )
        if self._pending:
            rows = torch.tensor([item.row for item in self._pending], dtype=logits_indices.dtype)
            logits_indices = torch.cat([logits_indices, rows.to(logits_indices.device)])
        return logits_indices, spec_metadata, max_sampled

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:  # type: ignore[override]
        state = self.execute_model_state
        if state is not None:
            self.ledger.counts.completion_passes += 1
            if self._pending:
                num_sampling_rows = len(state.logits) - len(self._pending)
                verdicts = state.logits[num_sampling_rows:].argmax(dim=-1).tolist()
                self.ledger.record(self._pending, verdicts)
                self._pending = []
                self.execute_model_state = state._replace(
                    logits=state.logits[:num_sampling_rows],
                    sample_hidden_states=state.sample_hidden_states[:num_sampling_rows],
                )
        self._released = {}
        output = super().sample_tokens(grammar_output)
        if self._released:
            output = EarlyExitOutput.extending(output, self._released)
        return output

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        # With nothing to check this is plain sampling: cheaper than the rejection sampler, which also fails on top-k
        # with no draft in the batch.
        if spec_decode_metadata is not None and spec_decode_metadata.max_spec_len == 0:
            spec_decode_metadata = None
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
        num_drafts = spec_decode_metadata.num_draft_tokens
        rows = self._live_rows(sampled_token_ids, num_drafts)
        num_rounds = self.rounds.num_rounds(self.input_batch.num_reqs) if self.rounds is not None else 0
        if rows and num_rounds and self.rounds is not None:
            run = self.rounds.run
            inner = aux_hidden_states or []
            done = self._guarded(lambda: run(rows, num_rounds, hidden_states, inner, self.ledger.counts))
            if done is not None:
                self.ledger.counts.rounds += done
                for row in rows:
                    drafts[row.request_index] = row.held
                    self._commit_released(row)
        return drafts

    def _live_rows(self, sampled_token_ids: list[list[int]], num_drafts: list[int]) -> list[Row]:
        """Count this step's checked tokens; a row for each request that goes on."""
        counts, batch = self.ledger.counts, self.input_batch
        rows = []
        for index, checked in enumerate(sampled_token_ids):
            if not checked:  # a prompt chunk
                continue
            num_accepted = len(checked) - 1
            counts.held += num_drafts[index]
            counts.accepted += num_accepted
            request_id = batch.req_ids[index]
            request = self.requests[request_id]
            params = request.sampling_params
            assert params is not None and params.max_tokens is not None, f"{request_id} generates without limits"
            stops = stop_token_ids(params)
            num_emitted = next((i + 1 for i, token in enumerate(checked) if token in stops), len(checked))
            num_before = len(request.output_token_ids) - len(checked)
            num_left = params.max_tokens - num_before - num_emitted
            num_context_left = self.max_model_len - int(batch.num_tokens_no_spec[index])
            counts.emitted += num_emitted + min(num_left, 0)
            if num_emitted < len(checked) or checked[-1] in stops or num_left <= 0 or num_context_left <= 0:
                continue
            if self.rounds is None:
                continue
            newest_position = int(batch.num_tokens_no_spec[index]) - 1
            room = min(num_left, num_context_left, self.rounds.room(index, newest_position))
            if room <= 0:
                continue
            rows.append(
                Row(
                    request_index=index,
                    newest_token=checked[-1],
                    newest_position=newest_position,
                    state_row=int(self.query_start_loc.np[index + 1]) - 1 - (num_drafts[index] - num_accepted),
                    max_released=room,
                    max_held=min(room, num_left - 1, num_context_left - 1),
                    releasable=self.ledger.requests[request_id].releasable,
                    stop_token_ids=stops,
                )
            )
        return rows

    def _commit_released(self, row: Row) -> None:
        """Make released exits ordinary tokens of the request, as vLLM's bookkeeping does with sampled ones."""
        if not row.released:
            return
        assert self.rounds is not None
        batch = self.input_batch
        request_id = batch.req_ids[row.request_index]
        start = int(batch.num_tokens_no_spec[row.request_index])
        end = start + len(row.released)
        assert end <= self.max_model_len, f"released past the context: {end} > {self.max_model_len}"
        batch.token_ids_cpu[row.request_index, start:end] = row.released
        batch.is_token_ids[row.request_index, start:end] = True
        batch.num_tokens_no_spec[row.request_index] = end
        self.requests[request_id].output_token_ids.extend(row.released)
        depth = self.rounds.ramps.depth
        self.ledger.release(request_id, [Outstanding(start + i, token, depth) for i, token in enumerate(row.released)])
        self._released[request_id] = row.released

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
        self.budget.check_integrity(self.ledger.counts)
        for request_id, exits in self.ledger.requests.items():
            request = self.requests[request_id]
            tokens = request.num_tokens
            first = tokens - len(exits.outstanding)
            assert [exit_.position for exit_ in exits.outstanding] == list(range(first, tokens)), (
                f"outstanding exits of {request_id} are not its last tokens: {exits.outstanding} of {tokens}"
            )
            assert not exits.outstanding or request.num_computed_tokens <= first, (
                f"{request_id}: {request.num_computed_tokens} tokens counted as computed, exits from {first} are not"
            )
