"""Drafting exits: draft steps of the first `depth` blocks and the ramp, one row per live request, and prompt lookup."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from apparate_llm.controller.budget import AccuracyBudget, Bucket
from apparate_llm.controller.policy import Policy
from apparate_llm.core import Decision, Exit
from apparate_llm.exits.batch import Batch
from apparate_llm.exits.ranks import Ranks
from apparate_llm.ramps.load import Prediction, Proposals, RampSet
from apparate_llm.ramps.lookup import NO_LOOKUP, Lookup, TokenIds, look_up, lookup_confidence


class DraftModel(Protocol):
    """The model that is served, over the batch of the step under way."""

    def compile(self, depth: int) -> None:
        """Before serving: the first `depth` blocks, where the model is compiled."""
        ...

    def batch(self) -> Batch: ...

    def states(
        self, depth: int, request_indices: list[int], tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] residual stream after `depth` blocks of one token `tokens` [num_tokens] of each of
        these requests, at `positions` [num_tokens] of their texts; their keys and values go into the KV cache."""
        ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] of `tokens` [num_tokens]."""
        ...

    def num_slots(self, request_index: int) -> int:
        """Tokens of a request that have a place in the KV cache."""
        ...

    def append(self, request_index: int, tokens: list[int]) -> None:
        """Make `tokens` ordinary tokens at the end of a request's text."""
        ...


@dataclass(slots=True)
class DraftRequest:
    """One request taking part in this step's drafting."""

    request_index: int  # in vLLM's input batch
    newest_token: int
    newest_position: int
    state_row: int  # row of the verification pass that predicted the newest token
    max_released: int  # exits that may still be emitted
    max_held: int  # exits worth checking; a held one past this could not save a step
    may_release: bool
    greedy: bool
    bucket: Bucket
    stop_token_ids: frozenset[int]
    released: list[Exit] = field(default_factory=list)
    held: list[Exit] = field(default_factory=list)
    not_taken: Exit | None = None  # proposed and not taken
    joint_acceptance: float = 1.0  # probability that all held exits agree
    lookup: Lookup = NO_LOOKUP  # of its text with its exits

    @property
    def num_exits(self) -> int:
        return len(self.released) + len(self.held)


class Drafter:
    """Drafts the exits of one engine step after the other."""

    def __init__(
        self,
        model: DraftModel,
        *,
        ramps: dict[int, RampSet],
        policy: Policy,
        budget: AccuracyBudget,
        max_exits: int,
        peers: Ranks,
    ) -> None:
        self.model = model
        self.ramp_sets = ramps
        self.policy = policy
        self.budget = budget
        self.max_exits = max_exits
        self.peers = peers
        self._deciding_ms = 0.0
        self._num_tokens = 0  # of the next verification pass, as of now
        self._texts: Callable[[int, int], TokenIds]  # of the step under way

    def take_deciding_ms(self) -> float:
        """What the policy's decisions took since this was asked last."""
        took, self._deciding_ms = self._deciding_ms, 0.0
        return took

    @property
    def ramps(self) -> RampSet:
        """Of the depth in use."""
        return self.ramp_sets[self.policy.depth]

    def start(self) -> int | None:
        """Most draft steps that the policy wants in the step under way, 0 for lookups only; None: no exits."""
        num_steps = min(self.policy.start(self.model.batch().num_requests), self.max_exits)
        return num_steps if num_steps or self.policy.looks_up else None

    def run(
        self, requests: list[DraftRequest], num_steps: int, final_states: torch.Tensor, aux_states: list[torch.Tensor]
    ) -> list[tuple[int, float]]:
        """Fill in `released`, `held` and `not_taken` of the requests in up to `num_steps`; returns (num_tokens, ms) of
        each draft step. Requests whose text repeats itself at length take what prompt lookup finds, without one.

        final_states [num_tokens, hidden_size] are the verification pass's, after the final norm; aux_states, of the
        same shape each, its residual streams at the ramp's auxiliary depths.
        """
        began = perf_counter()
        batch = self.model.batch()
        self._texts, self._num_tokens = batch.text, batch.num_requests
        live = [request for request in requests if not self._takes_lookup(request)]
        if not live or not num_steps:
            return []
        tokens = torch.tensor([request.newest_token for request in live])
        state_rows = [request.state_row for request in live]
        state = self.ramps.head.enter(final_states[state_rows], [aux[state_rows] for aux in aux_states])
        spent: list[tuple[int, float]] = []
        for number in range(num_steps):
            prediction = self.peers.share_prediction(self.predict(live, tokens, state, number))
            going = self._take_predicted(live, prediction)
            now = perf_counter()
            spent.append((len(live), (now - began) * 1e3))
            began = now
            going = [i for i in going if not self._takes_lookup(live[i])]
            joint = [live[i].joint_acceptance for i in going]
            if (
                not going
                or number + 1 == num_steps
                or not self.policy.wants_another_step(number + 1, joint, self._num_tokens)
            ):
                break
            live = [live[i] for i in going]
            tokens, state = prediction.token_ids[going], prediction.state[going]
        return spent

    def _take_predicted(self, live: list[DraftRequest], prediction: Prediction) -> list[int]:
        """Have each request take or leave what the ramp predicted for it; those that took it and may go on."""
        began = perf_counter()
        predicted = zip(live, prediction.token_ids.tolist(), prediction.confidences, strict=True)
        going = [
            i
            for i, (request, token, confidence) in enumerate(predicted)
            if self._decide(request, token, confidence) and token not in request.stop_token_ids
        ]
        self._deciding_ms += (perf_counter() - began) * 1e3
        return going

    def _takes_lookup(self, request: DraftRequest) -> bool:
        """Whether a request's text repeats itself at length, so that what followed is taken without asking a ramp."""
        if not self.policy.looks_up and not self.ramps.head.reads_lookup:
            return False
        text = self._text(request)
        request.lookup = look_up(text)
        start, length = request.lookup.start, request.lookup.length
        if not length or not self.policy.looks_up or not self.policy.wants_lookup(length, request.greedy):
            return False
        tokens = text.tolist()
        while request.num_exits < self.max_exits:
            token = tokens[start]
            takes = self._decide(request, token, lookup_confidence(length), lookup_length=length)
            if not takes or token in request.stop_token_ids:
                break
            tokens.append(token)
            start, length = start + 1, length + 1
        return True

    def _text(self, request: DraftRequest) -> TokenIds:
        """Tokens of a request, its exits included."""
        text = self._texts(request.request_index, request.newest_position + 1)
        exits = [exit_.token_id for exit_ in (*request.released, *request.held)]
        return np.append(text, exits) if exits else text

    def _decide(self, request: DraftRequest, token: int, confidence: float, *, lookup_length: int = 0) -> bool:
        """Whether the request takes this exit; lookup_length: of one from prompt lookup."""
        if math.isnan(confidence):  # of scores that are no numbers: no exit, and nothing to learn from
            return False
        number = request.num_exits  # each draft step before has left one
        depth = 0 if lookup_length else self.ramps.depth
        position = request.newest_position + 1 + number
        exit_ = Exit(position, token, depth, number, confidence, request.greedy, lookup_length=lookup_length)
        may_release = (
            request.may_release
            and token not in request.stop_token_ids  # a divergence there would cut the answer off
            and not request.held  # a held exit blocks later releases
            and request.num_exits < request.max_released
            and self.budget.may_release(request.bucket)
            and self.policy.may_diverge(exit_)
        )
        decision = self.policy.decide(
            exit_, joint_acceptance=request.joint_acceptance, may_release=may_release, num_tokens=self._num_tokens
        )
        if decision is Decision.RELEASE:
            assert may_release, "the policy released an exit that it may not"
            self.budget.release(request.bucket)
            request.released.append(exit_)
        elif decision is Decision.HOLD and request.num_exits < request.max_held:
            request.held.append(exit_)
            request.joint_acceptance *= exit_.probability
        else:
            request.not_taken = exit_
            return False
        exit_.decision = decision
        self._num_tokens += 1
        return True

    def predict(self, live: list[DraftRequest], tokens: torch.Tensor, state: torch.Tensor, number: int) -> Prediction:
        """One draft step: `tokens` [num_tokens] are the newest, `state` [num_tokens, hidden_size] is the ramp's."""
        positions = torch.tensor([request.newest_position + number for request in live])
        hidden = self.model.states(self.ramps.depth, [request.request_index for request in live], tokens, positions)
        proposals = self._proposals(live) if self.ramps.head.reads_lookup else None
        return self.ramps.predict(hidden, state, proposals, draft_step=number)

    def _proposals(self, live: list[DraftRequest]) -> Proposals:
        """What the lookup feature makes of each request's text, its exits included."""
        tokens, lengths = torch.tensor([request.lookup[:2] for request in live]).unbind(1)
        return Proposals(tokens, lengths, self.model.embed(tokens))

    def free_slots(self, request_index: int, newest_position: int) -> int:
        """Draft steps whose KV slots (newest_position, newest_position + 1, ...) are allocated already."""
        if self.policy.depth == 0:
            return self.max_exits
        return int(np.clip(self.model.num_slots(request_index) - newest_position, 0, self.max_exits))
