"""Shallow rounds: blocks [0, depth) and the ramp, one row per live request, several times over."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from apparate_llm.controller.budget import AccuracyBudget
from apparate_llm.controller.policies import Policy
from apparate_llm.core import ExitCounts, Verb
from apparate_llm.ramps.copying import copy_of
from apparate_llm.ramps.load import Prediction, Proposals, RampSet


@dataclass(slots=True)
class Row:
    """One request taking part in this step's rounds."""

    request_index: int  # in vLLM's input batch
    newest_token: int
    newest_position: int
    state_row: int  # row of the completion pass that predicted the newest token
    max_released: int  # exits that may still be emitted
    max_held: int  # exits worth checking; a held one past this could not save a step
    releasable: bool
    stop_token_ids: frozenset[int]
    released: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    @property
    def num_exits(self) -> int:
        return len(self.released) + len(self.held)


class Rounds:
    """Runs the rounds of one engine step over a vLLM runner's model and KV cache."""

    def __init__(
        self, runner: Any, *, ramps: RampSet, policy: Policy, budget: AccuracyBudget, max_exits: int, max_rows: int
    ) -> None:
        self.runner = runner
        self.ramps = ramps
        self.policy = policy
        self.budget = budget
        self.max_exits = max_exits
        self.max_rows = max_rows

    def num_rounds(self, num_requests: int) -> int:
        """Rounds with which the next completion pass stays within `max_rows`, a row per request and exit."""
        return max(0, min(self.max_exits, self.max_rows // max(num_requests, 1) - 1))

    def run(
        self,
        rows: list[Row],
        num_rounds: int,
        final_states: torch.Tensor,
        inner_states: list[torch.Tensor],
        counts: ExitCounts,
    ) -> int:
        """Fill in `released` and `held` of the rows in up to `num_rounds`; returns the number of rounds run.

        final_states [num_tokens, hidden_size] are the completion pass's, after the final norm; inner_states, of the
        same shape each, its residual streams at the ramp's inner depths.
        """
        live = rows
        tokens = torch.tensor([row.newest_token for row in live])
        state_rows = [row.state_row for row in live]
        state = self.ramps.head.enter(final_states[state_rows], [inner[state_rows] for inner in inner_states])
        num_pending = 0
        for number in range(num_rounds):
            prediction = self.predict(live, tokens, state, number)
            going: list[int] = []
            for i, (row, token, confidence) in enumerate(
                zip(live, prediction.token_ids.tolist(), prediction.confidences, strict=True)
            ):
                may_release = (
                    row.releasable
                    and not row.held  # a held exit blocks later releases
                    and row.num_exits < row.max_released
                    and self.budget.allows_release(counts, num_pending)
                )
                verb = self.policy.decide(confidence, may_release)
                if verb is Verb.RELEASE:
                    assert may_release, "the policy released an exit that it may not"
                    row.released.append(token)
                    num_pending += 1
                elif verb is Verb.HOLD and row.num_exits < row.max_held:
                    row.held.append(token)
                else:
                    continue
                if token not in row.stop_token_ids:
                    going.append(i)
            if not going:
                return number + 1
            live = [live[i] for i in going]
            tokens, state = prediction.token_ids[going], prediction.state[going]
        return num_rounds

    def predict(self, live: list[Row], tokens: torch.Tensor, state: torch.Tensor, number: int) -> Prediction:
        """One round: `tokens` [num_rows] are the rows' newest, `state` [num_rows, hidden_size] the ramp's."""
        hidden = self._shallow(live, tokens, number)
        proposals = self._proposals(live) if self.ramps.head.reads_copies else None
        return self.ramps.predict(hidden, state, proposals, round_number=number)

    def _proposals(self, live: list[Row]) -> Proposals:
        """What the copy feature makes of each row's text, its exits included."""
        found = []
        for row in live:
            text = self.runner.input_batch.token_ids_cpu[row.request_index, : row.newest_position + 1]
            found.append(copy_of(np.append(text, row.released + row.held) if row.num_exits else text))
        tokens, lengths = torch.tensor(found).unbind(1)
        return Proposals(tokens, lengths, self.runner.model.model.embed_input_ids(tokens))

    def _shallow(self, live: list[Row], tokens: torch.Tensor, number: int) -> torch.Tensor:
        """[num_rows, hidden_size] residual stream of each row's newest token after `depth` blocks."""
        depth = self.ramps.depth
        positions = torch.tensor([row.newest_position + number for row in live])
        if depth == 0:
            return self.runner.model.forward_shallow(0, tokens, positions)
        attention, slots = self._attention_metadata([row.request_index for row in live], positions)
        with set_forward_context(attention, self.runner.vllm_config, num_tokens=len(live), slot_mapping=slots):
            return self.runner.model.forward_shallow(depth, tokens, positions)

    def _attention_metadata(self, request_indices: list[int], positions: torch.Tensor) -> tuple[dict, dict]:
        """Per-layer attention metadata and slot mappings of one query row per request."""
        runner = self.runner
        num_rows = len(request_indices)
        seq_lens = (positions + 1).int()
        query_start = torch.arange(num_rows + 1, dtype=torch.int32)
        attention, slots = {}, {}
        for group_id, groups in enumerate(runner.attn_groups):
            table = runner.input_batch.block_table[group_id]
            blocks = table.get_device_tensor(runner.input_batch.num_reqs)[request_indices]
            block_of = torch.gather(blocks, 1, (positions // table.block_size)[:, None])[:, 0].long()
            slot_mapping = block_of * table.block_size + positions % table.block_size
            common = CommonAttentionMetadata(
                query_start_loc=query_start,
                query_start_loc_cpu=query_start,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens,
                num_reqs=num_rows,
                num_actual_tokens=num_rows,
                max_query_len=1,
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=blocks,
                slot_mapping=slot_mapping,
                causal=True,
                positions=positions,
            )
            for group in groups:
                metadata = group.build_metadata(common)
                for layer_name in group.layer_names:
                    attention[layer_name] = metadata
                    slots[layer_name] = slot_mapping
        return attention, slots

    def room(self, request_index: int, newest_position: int) -> int:
        """Rounds whose KV slots (newest_position, newest_position + 1, ...) are allocated already."""
        if self.ramps.depth == 0:
            return self.max_exits
        slots = min(
            int(table.num_blocks_per_row[request_index]) * table.block_size
            for table in self.runner.input_batch.block_table.block_tables
        )
        return int(np.clip(slots - newest_position, 0, self.max_exits))
