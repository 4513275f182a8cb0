"""The part of the runner that keeps serving when a part of ours fails: as plain vLLM, with all in order.

vLLM's own state is never approximate (see runner.py), so there is little to put right: exits released in the step
under way are withdrawn, its drafts are emptied, and the ledger forgets what is outstanding. Tokens that are out
already are ordinary tokens of their requests, drafts that the scheduler has are checked by vLLM's sampler.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from apparate_llm.config import ConfigError, EarlyExitConfig, config_from_vllm
from apparate_llm.controller.budget import AccuracyBudget
from apparate_llm.engine.batch import batch_of, shorten
from apparate_llm.engine.parallel import Peers
from apparate_llm.engine.runtime_config import PolicySwitch, apply_changes, apply_to_requests, learned_of, plain_exits
from apparate_llm.exits.draft import Drafter
from apparate_llm.exits.ledger import VerdictLedger
from apparate_llm.exits.recount import drop_exits
from apparate_llm.exits.safety import Safety
from apparate_llm.exits.step import ExitStep
from apparate_llm.exits.step_clock import StepClock
from apparate_llm.exits.tenants import shares_of

logger = init_logger("vllm.apparate")
T = TypeVar("T")


class FallbackRunner(CPUModelRunner):
    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.exit_config = config_from_vllm(vllm_config)
        self.peers = Peers(get_tp_group())
        self.clock = StepClock(self.peers)
        self.step = ExitStep(self._new_ledger(), self.clock)
        self.safety = Safety()
        self.exit_drafter: Drafter | None = None  # None: no exits
        self.switch: PolicySwitch | None = None  # None: started without exits
        self._parked: Drafter | None = None  # after a failure, until exits come back
        self._noted: tuple[str, Exception] | None = None  # a failure that the other ranks have not heard of

    @property
    def ledger(self) -> VerdictLedger:
        return self.step.ledger

    @ledger.setter
    def ledger(self, ledger: VerdictLedger) -> None:
        self.step.ledger = ledger

    def _new_ledger(self) -> VerdictLedger:
        config = self.exit_config
        return VerdictLedger(AccuracyBudget(config.accuracy_bound, config.bound_kind), shares_of(config))

    def _guarded(self, part: str, work: Callable[[], T], default: T) -> T:
        """What a part of ours gives, run on all ranks alike; where it fails on one of them, serving goes on without
        exits and `default`. Not to be nested."""

        def heard() -> T:
            if self._noted is not None:
                raise self._noted[1]
            return work()

        try:
            return self.peers.together(heard)
        except Exception as error:
            self._fall_back(part, error)
            return default

    def _attempt(self, part: str, work: Callable[[], T], default: T) -> T:
        """A part of ours without any exchange, and `default` where it fails. It is treated as a failure where the
        ranks meet next, within the same step or at the beginning of the next."""
        try:
            return work()
        except Exception as error:
            self._noted = self._noted or (part, error)
            return default

    def _fall_back(self, part: str, error: Exception) -> None:
        """On all ranks at the same place."""
        if self._noted is not None:
            part, self._noted = self._noted[0], None
        self.safety.failed(part, error, self.clock.now_s)
        if self.exit_drafter is not None:
            self._parked, self.exit_drafter = self.exit_drafter, None
        self.step.withdraw()
        try:
            self.peers.together(self._settle)
        except Exception:
            logger.exception("The exits do not add up any more, they are counted anew")
            self.ledger = self._new_ledger()
            self._know_requests()
        self.step.requests, self.step.released = [], {}
        if self._parked is not None:
            self._parked.budget = self.ledger.budget
        self._count_failures()

    def _settle(self) -> None:
        """Withdraw what the step under way released, and make the ledger add up; rank 0's is everybody's."""
        undone = {}
        for request in self.step.requests:
            if request.released:
                shorten(self, request.request_index, request.newest_position + 1)
                undone[batch_of(self).request_ids[request.request_index]] = request.released
        emitted = {request_id: len(state.output_token_ids) for request_id, state in self.requests.items()}
        drop_exits(self.ledger, undone=undone, emitted=emitted, now_s=self.clock.now_s)
        self._know_requests()
        self.ledger = self.peers.share_object(self.ledger)

    def _know_requests(self) -> None:
        """The ledger has vLLM's requests, no others; those it did not know take no exits."""
        known = self.ledger.requests
        self.ledger.requests = {
            request_id: known.get(request_id) or plain_exits(len(state.output_token_ids), state.sampling_params)
            for request_id, state in self.requests.items()
        }

    def _count_failures(self) -> None:
        self.ledger.counts.fallbacks, self.ledger.counts.recoveries = self.safety.num_failures, self.safety.num_returns

    def _come_back(self, *, by_hand: bool) -> None:
        """Exits again, by a policy that is the same on all ranks and has seen nothing of the failure."""
        drafter, switch = self._parked, self.switch
        if drafter is None or switch is None:
            return
        learned = learned_of(drafter.policy) if self.safety.trusts_policy and self.peers.is_first else {}
        switch.renew(drafter, self.exit_config, self.peers.share_object(learned))
        self.exit_drafter, self._parked = drafter, None
        self.safety.returned(self.clock.now_s, by_hand=by_hand)
        self._count_failures()

    def check_change(self, changes: object) -> None:
        """Raises ConfigError for options that `reconfigure` would refuse."""
        apply_changes(self.switch, self.exit_config, changes)

    def reconfigure(self, changes: object) -> None:
        """Serve with other options from the next step on, and with exits again after a failure; raises ConfigError if
        they are not allowed."""
        after = apply_changes(self.switch, self.exit_config, changes)
        if not self._guarded("change of options", lambda: self._take_up(after), False):
            raise ConfigError("early exits failed at this change and are off, the server's log says why")
        self.exit_config = after
        self._guarded("change of options", lambda: apply_to_requests(self.ledger, after), None)
        logger.info("Early exits go on with %s", self.exit_config)

    def _take_up(self, after: EarlyExitConfig) -> bool:
        if self.safety.is_off:
            self._come_back(by_hand=True)
        if self.switch is not None and self.exit_drafter is not None:
            self.switch.change(self.exit_drafter, self.exit_config, after)
        return True

    def forget(self) -> bool:
        """Drop what the controller has learned; False where there is nothing to drop it from."""
        return self._guarded("reset", self._forget, False)

    def _forget(self) -> bool:
        drafter = self.exit_drafter or self._parked
        if self.switch is None or drafter is None:
            return False
        self.switch.renew(drafter, self.exit_config, {})
        return True

    def check_integrity(self) -> None:
        """Raise AssertionError if the exits do not add up or KV is counted that was never computed."""
        self.ledger.check_integrity()
        self.ledger.check_requests(self.requests)
