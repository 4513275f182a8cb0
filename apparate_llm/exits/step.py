"""The exits of one engine step after the other, in the order of the step:

due        which rows of the pass tell of released exits
verified   these get their verdicts, and the held ones
emitted    what the full model chose goes out, and with it the held exits that it accepts
learned    the policy is told what the verdicts were and what the step cost
drafted    by `draft.py`, now or when the step's tokens have left
committed  released exits become text, held ones vLLM's drafts

Nothing here knows vLLM: a step is a `Batch`, a model is a `DraftModel`.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from apparate_llm.controller.policy import Policy
from apparate_llm.exits.batch import Batch
from apparate_llm.exits.draft import Drafter, DraftModel, DraftRequest
from apparate_llm.exits.ledger import PendingVerdict, RequestExits, Verdict, VerdictLedger
from apparate_llm.exits.memory import Memory
from apparate_llm.exits.step_clock import StepClock
from apparate_llm.exits.verify import Drafts, best_and_regret, verify_held, verify_sampled


class ExitStep:
    """What is under way of exits. `runner.py` calls each part at its moment."""

    def __init__(self, ledger: VerdictLedger, clock: StepClock) -> None:
        self.ledger = ledger
        self.clock = clock
        self.pending: list[PendingVerdict] = []  # verdicts that the pass under way will give
        self.verdicts: list[Verdict] = []  # of this step
        self.requests: list[DraftRequest] = []  # that go on and take exits, until their tokens are handed over
        self.released: dict[str, list[int]] = {}  # tokens of the exits that this step released, by request
        self.drafts: list[list[int]] = []  # held exits of each request of the batch: the very list that vLLM has
        # Drafting that waits until the step's tokens have left, where an answer begins or ends: its client has them
        # sooner, and what it asks next may still join the next step.
        self.later: Callable[[], None] | None = None

    def withdraw(self) -> None:
        """After a failure: no verdict is awaited, nothing is drafted. Released exits are the caller's to take back."""
        self.pending, self.verdicts, self.later = [], [], None
        self.drafts[:] = [[] for _ in self.drafts]

    # ---- due

    def due(self, batch: Batch, num_scheduled: NDArray[np.int32], *, num_tokens: int, num_drafts: int) -> list[int]:
        """Rows of the pass that tell of released exits, which are `pending` from here on. num_scheduled [requests]:
        tokens of each in the pass, of which num_tokens are all and num_drafts held exits."""
        pending: list[PendingVerdict] = []
        if self.ledger.counts.outstanding:
            for index, request_id in enumerate(batch.request_ids):
                self.ledger.check_arrived(request_id, num_tokens=int(batch.num_tokens[index]))
                pending += self.ledger.due(
                    request_id,
                    first_position=int(batch.num_computed_tokens[index]),
                    num_scheduled=int(num_scheduled[index]),
                    first_row=int(batch.first_rows[index]),
                )
        self.clock.scheduled(
            num_requests=batch.num_requests,
            num_tokens=num_tokens,
            num_decode_tokens=batch.num_requests + num_drafts + len(pending),
        )
        self.pending = pending
        return [item.row for item in pending]

    # ---- verified

    def begin_verifying(self) -> list[PendingVerdict]:
        """What the pass tells of, once."""
        self.verdicts, self.later = [], None
        pending, self.pending = self.pending, []
        return pending

    def verify_released(self, pending: list[PendingVerdict], logits: torch.Tensor) -> None:
        """logits [num_pending, vocab]."""
        token_ids = torch.tensor([item.exit.token_id for item in pending])
        self.verdicts = self.ledger.verify_released(pending, *best_and_regret(logits, token_ids))

    def verify_held(self, drafts: Drafts, logits: torch.Tensor, request_ids: list[str], policy: Policy) -> None:
        """logits [num_tokens, vocab] are changed in place where a divergence is let through."""
        requests, now_s = self.ledger.requests, self.clock.now_s
        self.verdicts += verify_held(
            logits,
            drafts,
            request_ids,
            ledger=self.ledger,
            policy=policy,
            may_diverge=lambda request_id: requests[request_id].may_diverge(now_s),
        )

    # ---- emitted

    def emit(self, batch: Batch, sampled: list[list[int]], num_drafts: list[int], drafter: Drafter | None) -> bool:
        """Count the tokens that the full model chose, by request; those that go on and take exits are `requests`.
        Returns whether an answer begins or ends. num_drafts: held exits that the pass looked at, by request; drafter:
        None where no exits are to be drafted."""
        verified = {verdict.request_id for verdict in self.verdicts if not verdict.released}
        self.requests, is_turn = [], False
        for index, checked in enumerate(sampled):
            if not checked:  # a prompt chunk
                continue
            request_id = batch.request_ids[index]
            exits = self.ledger.requests[request_id]
            num_output = int(batch.num_tokens[index] - batch.num_prompt_tokens[index])
            is_turn |= num_output == len(checked)
            self.ledger.count_held(exits, num_drafts[index], len(checked) - 1)
            num_unverified = 0 if request_id in verified else num_drafts[index]
            end = int(batch.num_tokens[index])
            self.verdicts += verify_sampled(request_id, exits, checked, end, num_unverified)
            num_left = self._count(request_id, exits, checked, num_output)
            if num_left <= 0 or end >= batch.max_model_len:
                is_turn = True
                self.ledger.ended(request_id)
            elif drafter is not None and exits.takes_exits:
                free_slots = min(num_left, batch.max_model_len - end, drafter.free_slots(index, end - 1))
                if free_slots > 0:
                    num_rejected = num_drafts[index] - (len(checked) - 1)
                    state_row = int(batch.first_rows[index + 1]) - 1 - num_rejected
                    most_held = min(free_slots, num_left - 1, batch.max_model_len - end - 1)
                    self.requests.append(
                        self._request_of(exits, index, (checked[-1], end - 1), state_row, free_slots, most_held)
                    )
        return is_turn

    def _count(self, request_id: str, exits: RequestExits, checked: list[int], num_output: int) -> int:
        """Tokens that the answer may still have: none after a stop token."""
        stops = exits.stop_token_ids
        num_emitted = next((i + 1 for i, token in enumerate(checked) if token in stops), len(checked))
        num_left = exits.max_tokens - (num_output - len(checked)) - num_emitted
        self.ledger.emit(request_id, num_emitted + min(num_left, 0), self.clock.now_s)
        return 0 if num_emitted < len(checked) or checked[-1] in stops else num_left

    def _request_of(
        self, exits: RequestExits, index: int, newest: tuple[int, int], state_row: int, free_slots: int, most_held: int
    ) -> DraftRequest:
        """newest: the last token and its position; free_slots: exits that fit."""
        return DraftRequest(
            request_index=index,
            newest_token=newest[0],
            newest_position=newest[1],
            state_row=state_row,
            max_released=free_slots,
            max_held=most_held,
            may_release=exits.releasable and exits.may_diverge(self.clock.now_s),
            greedy=exits.greedy,
            bucket=exits.bucket,
            stop_token_ids=exits.stop_token_ids,
        )

    # ---- learned

    def learn(self, drafter: Drafter, memory: Memory) -> None:
        """Tell the policy what the step has shown."""
        policy, began_s = drafter.policy, perf_counter()
        for verdict in self.verdicts:
            if verdict.follows_text:
                policy.on_verdict(verdict.exit, verdict.agrees)
        self.clock.tell(policy)
        controller_ms = (perf_counter() - began_s) * 1e3 + drafter.take_deciding_ms()
        memory.learned(self.clock.last, self.verdicts, policy, self.ledger.distributions, controller_ms)

    # ---- drafted

    def count_drafting(self, spent: list[tuple[int, float]], policy: Policy, memory: Memory) -> None:
        """spent: num_tokens and ms of each draft step."""
        counts = self.ledger.counts
        counts.draft_steps += len(spent)
        counts.shallow_blocks += policy.depth * sum(num_tokens for num_tokens, _ in spent)
        shared = self.clock.shared_times(spent)
        for num_tokens, ms in shared:
            policy.on_draft_step(policy.depth, num_tokens, ms)
        memory.drafted(shared, self.ledger.distributions)

    def put_off(self, drafting: Callable[[], None]) -> None:
        """Until this step's tokens have left: no exit leaves with them."""
        self.later = drafting
        for request in self.requests:
            request.may_release = False

    # ---- committed

    def commit(self, requests: list[DraftRequest], model: DraftModel) -> None:
        request_ids = model.batch().request_ids
        for request in requests:
            request_id = request_ids[request.request_index]
            exits = self.ledger.requests[request_id]
            exits.held, exits.not_taken = request.held, request.not_taken
            if request.released:
                tokens = [exit_.token_id for exit_ in request.released]
                model.append(request.request_index, tokens)
                self.ledger.release(request_id, request.released)
                self.released[request_id] = tokens
            self.drafts[request.request_index] = [exit_.token_id for exit_ in request.held]
