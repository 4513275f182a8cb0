"""A server and its clients, simulated: the policy of serving decides over recorded draft steps at measured costs.

One pass at a time, as in an engine. Clients of a closed loop ask in blocks, as `eval` has them ask: each begins with a
shorter or longer answer that does not count, so that they are not synchronised, and asks on until all that counts has
ended. Prompts that wait are read in the next pass, which all others wait for, with exits or without.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from apparate_llm.controller.adaptive import AdaptivePolicy
from apparate_llm.core import Decision, Exit
from apparate_llm.prepare.recorded import Recorded
from apparate_llm.ramps.lookup import lookup_confidence

MAX_PASS_TOKENS = 2048  # vLLM's max_num_batched_tokens of a server
APART_MS = 1.0  # between requests that begin together: the API reads one after another
TURNAROUND_MS = 3.0  # from an answer's last token until the client's next request is there


class Costs(Protocol):
    """ms on the machine that serves."""

    def pass_ms(self, requests: int, rows: int, prompt_tokens: int) -> float: ...

    def draft_step_ms(self, rows: int) -> float: ...


@dataclass(slots=True)
class Request:
    recorded: Recorded
    index: int
    max_tokens: int
    counts: bool = True
    arrived_ms: float = 0.0
    unread: int = field(init=False)  # tokens of the prompt
    emitted: int = 0
    first_ms: float = 0.0
    taken: list[Exit] = field(default_factory=list)  # held, to be checked by the next pass
    right: list[bool] = field(default_factory=list)  # of each of these
    not_taken: tuple[Exit, bool] | None = None
    joint_acceptance: float = 1.0  # probability that all held exits agree

    def __post_init__(self) -> None:
        self.unread = self.recorded.prompt_tokens

    @property
    def num_tokens(self) -> int:
        return min(self.recorded.num_tokens, self.max_tokens)

    @property
    def row(self) -> int:
        """Where the next exit is proposed."""
        return self.emitted + len(self.taken)

    @property
    def may_hold(self) -> bool:
        """A held exit in place of the longest answer's last token would save no pass."""
        return self.row + 1 < self.max_tokens and self.row < self.recorded.num_tokens


class Simulation:
    """One server; `policy` None: without exits. It keeps what it has learned from load to load."""

    def __init__(self, costs: Costs, policy: AdaptivePolicy | None = None) -> None:
        self.costs = costs
        self.policy = policy
        self.now_ms = 0.0
        self._passed_ms = 0.0  # when the last pass ended: tokens that begin or end an answer leave then
        self._num_tokens = 0  # of the next pass, as of now

    def serve(
        self, blocks: Sequence[Sequence[int]], conversations: Sequence[Recorded], clients: int, *, max_tokens: int
    ) -> dict[int, list[float]]:
        """Ask block by block; returns the times per output token, in ms, by index of the conversation."""
        times: dict[int, list[float]] = {}
        for number, block in enumerate(blocks):
            before = blocks[number - 1]
            lead_in = [
                Request(conversations[i], i, math.ceil(max_tokens * client / clients), counts=False)
                for client, i in zip(range(1, clients), itertools.cycle(before), strict=False)
            ]
            counted = [Request(conversations[i], i, max_tokens) for i in block]
            run_out = (Request(conversations[i], i, max_tokens, counts=False) for i in itertools.cycle(block))
            for index, tpt_ms in self._serve(counted, lead_in, run_out):
                times.setdefault(index, []).append(tpt_ms)
        return times

    def _serve(
        self, counted: list[Request], lead_in: list[Request], run_out: Iterator[Request]
    ) -> Iterator[tuple[int, float]]:
        """One block. lead_in: first requests of all clients but one."""
        waiting, active = deque[Request](), list[Request]()
        left, coming = len(counted), itertools.chain(counted, run_out)

        def ask(request: Request, at_ms: float) -> None:
            waiting.append(request)
            request.arrived_ms = at_ms

        for client, request in enumerate([next(coming), *lead_in]):
            ask(request, self.now_ms + client * APART_MS)
        while left:
            if not active:
                self.now_ms = max(self.now_ms, waiting[0].arrived_ms)
            while waiting and waiting[0].arrived_ms <= self.now_ms:
                active.append(waiting.popleft())
                if self.policy is not None:
                    self.policy.on_request()
            for request, tpt_ms in self._step(active):
                active.remove(request)
                ask(next(coming), self._passed_ms + TURNAROUND_MS)
                left -= request.counts
                if request.counts and tpt_ms is not None:
                    yield request.index, tpt_ms

    def _step(self, active: list[Request]) -> list[tuple[Request, float | None]]:
        """One pass and its draft steps; the requests that end, with their time per output token."""
        going = [request for request in active if not request.unread]
        rows = sum(1 + len(request.taken) for request in going)
        left, prompt_tokens, began = MAX_PASS_TOKENS - rows, 0, list[Request]()
        for request in active:
            if request.unread and left:
                read = min(request.unread, left)
                request.unread, left, prompt_tokens = request.unread - read, left - read, prompt_tokens + read
                if not request.unread:
                    began.append(request)
        took_ms = self.costs.pass_ms(len(going), rows, prompt_tokens)
        self.now_ms += took_ms
        self._passed_ms = self.now_ms
        ended: list[tuple[Request, float | None]] = []
        for request in going:
            self._check(request)
        for request in (*going, *began):
            request.emitted = min(request.emitted + 1, request.num_tokens)
            if request.emitted == 1:
                request.first_ms = self.now_ms
            if request.emitted >= request.num_tokens:
                more = request.num_tokens - 1
                ended.append((request, (self.now_ms - request.first_ms) / more if more else None))
        if self.policy is not None:
            self.policy.on_step(took_ms)
            if not prompt_tokens:
                self.policy.on_decode_step(len(active), rows, took_ms)
            over = {id(request) for request, _ in ended}
            self._draft([request for request in (*going, *began) if id(request) not in over], len(active))
        return ended

    def _check(self, request: Request) -> None:
        """Verdicts on a request's held exits; those that are emitted are counted."""
        if self.policy is None:
            return
        for exit_, right in zip(request.taken, request.right, strict=True):
            self.policy.on_verdict(exit_, right)
            if not right:
                break
            request.emitted += 1
        else:
            if request.not_taken is not None:
                self.policy.on_verdict(*request.not_taken)
        request.taken, request.right, request.not_taken, request.joint_acceptance = [], [], None, 1.0

    # ---- as exits/draft.py does

    def _draft(self, requests: list[Request], num_requests: int) -> None:
        policy = self.policy
        assert policy is not None
        if not requests:
            return
        num_steps = min(policy.start(num_requests), policy.max_exits)
        if not num_steps and not policy.looks_up:
            return
        self._num_tokens = num_requests
        live = [
            request
            for request in requests
            if request.emitted + 1 < request.max_tokens and not self._takes_lookup(request)
        ]
        for number in range(num_steps if live else 0):
            took_ms = self.costs.draft_step_ms(len(live))
            self.now_ms += took_ms
            policy.on_draft_step(policy.depth, len(live), took_ms)
            going = [request for request in live if self._proposes(request) and not self._takes_lookup(request)]
            joint_acceptances = [request.joint_acceptance for request in going]
            if (
                not going
                or number + 1 == num_steps
                or not policy.wants_another_step(number + 1, joint_acceptances, self._num_tokens)
            ):
                break
            live = going

    def _proposes(self, request: Request) -> bool:
        """Whether a request goes on after a draft step's exit."""
        proposal = request.recorded.proposal(request.row, len(request.taken))
        return self._decide(request, proposal.confidence, proposal.agrees)

    def _takes_lookup(self, request: Request) -> bool:
        """Whether a request's text repeats itself at length, so that no ramp is asked."""
        policy, recorded, row = self.policy, request.recorded, request.row
        assert policy is not None
        if not policy.looks_up or not recorded.lookup_lengths or row >= recorded.num_tokens or not all(request.right):
            return False
        repeated = recorded.lookup_lengths[row]
        if not repeated or not policy.wants_lookup(repeated, True):
            return False
        for place in range(policy.max_exits - len(request.taken)):
            right, length = place < recorded.lookups_right[row], repeated + place
            if not self._decide(request, lookup_confidence(length), right, lookup_length=length):
                break
        return True

    def _decide(self, request: Request, confidence: float, agrees: bool, *, lookup_length: int = 0) -> bool:
        policy = self.policy
        assert policy is not None
        right = agrees and all(request.right)
        depth = 0 if lookup_length else policy.depth
        exit_ = Exit(request.row, 0, depth, len(request.taken), confidence, lookup_length=lookup_length)
        decision = policy.decide(
            exit_, joint_acceptance=request.joint_acceptance, may_release=False, num_tokens=self._num_tokens
        )
        if decision is Decision.STOP or not request.may_hold:
            request.not_taken = (exit_, right)
            return False
        exit_.decision = decision
        request.taken.append(exit_)
        request.right.append(right)
        request.joint_acceptance *= exit_.probability
        self._num_tokens += 1
        return request.row < request.recorded.num_tokens
