"""Policy `adaptive`: as many exits as pay at the measured costs, divergences where they bring most."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from apparate_llm.controller.calibration import MEMORY_VERDICTS, PRIOR_VERDICTS, OnlineCalibration
from apparate_llm.controller.costs import CostCurve, CostModel
from apparate_llm.controller.depth import DepthChoice
from apparate_llm.controller.plan import LoadPlan, LookedUp, load_of
from apparate_llm.controller.policy import (
    CALIBRATED_DRAFT_STEPS,
    LOOKED_UP,
    ExitKind,
    Policy,
    kind_of,
    shared_draft_step,
)
from apparate_llm.controller.waiting import Waiting
from apparate_llm.core import Decision, Exit
from apparate_llm.ramps.lookup import lookup_confidence
from apparate_llm.renamed import CONTROLLER_STATE

LOOKUP_PROBABILITY = 0.85  # of being right, from which exits are looked up instead of asked for
LOOKUP_EVERY = 16  # times that they are less likely right, so that a change is noticed
MIN_SAVED = 0.03  # share of the engine's time that exits must save where a step has many requests
PASS_MEMORY = 1 / 128  # of the moving average of a pass's time


@dataclass(slots=True)
class DraftStepStatistics:
    """Moving averages over exits proposed in one draft step."""

    taken_frac: float = 0.9
    agreement: float = 0.6  # probability of those taken
    memory: float = 0.02

    def __post_init__(self) -> None:
        """Raises ValueError for what is no share, as a state file may hold it."""
        if not (0.0 <= self.taken_frac <= 1.0 and 0.0 <= self.agreement <= 1.0 and 0.0 <= self.memory <= 1.0):
            raise ValueError(f"shares must be in [0, 1], got {self}")

    def observe(self, taken: bool, probability: float) -> None:
        self.taken_frac += self.memory * (taken - self.taken_frac)
        if taken:
            self.agreement += self.memory * (probability - self.agreement)


@dataclass(slots=True, kw_only=True)
class AdaptivePolicy(Policy):
    depth: int
    depths: tuple[int, ...]
    num_layers: int
    max_exits: int
    looks_up: bool = False
    release_confidence: float = 0.98
    max_regret_nats: float = 1.0
    memory_verdicts: float = MEMORY_VERDICTS
    ttft_weight: float = 1.0
    sibling: bool = False
    costs: CostModel = field(init=False)
    calibrations: dict[ExitKind, OnlineCalibration] = field(default_factory=dict)
    statistics: dict[tuple[int, int], DraftStepStatistics] = field(default_factory=dict)
    depth_choice: DepthChoice = field(init=False)
    _plans: dict[int, LoadPlan] = field(default_factory=dict)
    _looked_up: LookedUp = field(default_factory=LookedUp)  # in the step under way
    _pass_ms: float = 0.0
    _passes: int = 0
    _warm: set[int] = field(default_factory=set)  # depths of which a draft step has run
    _min_tokens_per_ms: float = 0.0  # in the step under way
    _waiting: Waiting = field(default_factory=Waiting)
    _not_looked_up: int = 0  # times

    def __post_init__(self) -> None:
        self.costs = CostModel(self.num_layers)
        self.depth_choice = DepthChoice(active=self.depth)

    # ---- drafting

    def start(self, num_requests: int) -> int:
        self._waiting.next_step()
        self._count_looked_up()
        plan = self._plan_of(num_requests)
        if plan.next_step():
            rate, num_draft_steps = self.best_rate(self.depth, num_requests)
            min_tokens_per_ms = rate * self._weight_of_time(num_requests)
            plan.renew(num_draft_steps, min_tokens_per_ms, pays=self._pays(plan, num_requests, rate))
        self._min_tokens_per_ms = plan.min_tokens_per_ms
        self.looks_up = plan.looks_up and not plan.is_plain_step
        self._looked_up = LookedUp(num_requests)
        if plan.num_draft_steps == 0:
            return 1 if plan.is_probed(self._extra_frac(num_requests)) else 0
        plan.draft_steps_pay()
        return self.max_exits if self.looks_up else 0

    def _plan_of(self, num_requests: int) -> LoadPlan:
        load = load_of(num_requests)
        plan = self._plans.get(load)
        if plan is None:
            plan = self._plans[load] = LoadPlan()
        return plan

    def _pays(self, plan: LoadPlan, num_requests: int, rate: float) -> bool:
        """Whether exits save a share of the engine's time that is worth a step's being uneven: who gets none waits for
        those of others, and for the prompts that come the sooner. Prompts take the time they take, with exits or
        without; and nobody else is in a lone request's step."""
        plain_ms = self.costs.verify_ms(num_requests)
        saved = 1.0 - num_requests / plain_ms / rate
        lookup_ms = self.costs.verify_ms(num_requests * (1.0 + plan.lookup.rows))
        saved += max(0.0, 1.0 - lookup_ms / plain_ms / (1.0 + plan.lookup.tokens))
        generating = min(1.0, plain_ms * self.costs.slowdown / self._pass_ms) if self._pass_ms else 1.0
        return saved * generating >= MIN_SAVED * (1.0 - 1.0 / num_requests)

    def _count_looked_up(self) -> None:
        if self.looks_up and self._looked_up.num_requests:
            self._plan_of(self._looked_up.num_requests).lookup.observe(self._looked_up)

    def on_request(self) -> None:
        self._waiting.join()

    def _weight_of_time(self, num_requests: int) -> float:
        """Who waits for a first token waits through all of a step, whatever it brings to others. So a ms counts once
        for the step's requests together and once for each who waits; a lone request keeps nobody waiting."""
        return 1.0 + self.ttft_weight * self._waiting.num_requests * (1.0 - 1.0 / num_requests)

    def best_rate(self, depth: int, num_requests: int) -> tuple[float, int]:
        """(tokens per ms, number) of the best number of draft steps at this load, by what was measured."""
        weight = self._weight_of_time(num_requests)
        plain_ms = self.costs.verify_ms(num_requests)
        best, best_value = (num_requests / plain_ms, 0), float(num_requests)
        tokens = rows = float(num_requests)
        going, joint_acceptance, drafting_ms = float(num_requests), 1.0, 0.0
        for number in range(self.max_exits):
            statistics = self._statistics(number)
            drafting_ms += self.costs.draft_step_ms(depth, max(going, 1.0))
            going *= statistics.taken_frac
            joint_acceptance *= self.depth_choice.relative(depth, statistics.agreement)
            rows += going
            tokens += going * joint_acceptance
            step_ms = self.costs.verify_ms(rows) + drafting_ms
            value = tokens * (plain_ms / step_ms) ** weight
            if value > best_value:
                best, best_value = (tokens / step_ms, number + 1), value
        return best

    def _extra_frac(self, num_requests: int) -> float:
        """What a single draft step and its exits take, of a step without."""
        plain_ms = self.costs.verify_ms(num_requests)
        extra_ms = (
            self.costs.draft_step_ms(self.depth, num_requests) + self.costs.verify_ms(2 * num_requests) - plain_ms
        )
        return extra_ms / plain_ms

    def wants_lookup(self, length: int, greedy: bool) -> bool:
        calibration = self._calibration_of(ExitKind(LOOKED_UP, 0, greedy))
        if calibration.probability(lookup_confidence(length)) >= LOOKUP_PROBABILITY:
            return True
        self._not_looked_up += 1
        return self._not_looked_up % LOOKUP_EVERY == 0

    def wants_another_step(self, number: int, joint_acceptances: Sequence[float], num_tokens: int) -> bool:
        statistics, live = self._statistics(number), len(joint_acceptances)
        gain = sum(joint_acceptances) * statistics.taken_frac * statistics.agreement
        rows_ms = self.costs.verify_ms(num_tokens + live * statistics.taken_frac) - self.costs.verify_ms(num_tokens)
        return gain >= self._min_tokens_per_ms * (self.costs.draft_step_ms(self.depth, live) + rows_ms)

    def decide(self, exit_: Exit, *, joint_acceptance: float, may_release: bool, num_tokens: int) -> Decision:
        p = exit_.probability = self._calibration(exit_).probability(exit_.confidence)
        if joint_acceptance * p < self._min_tokens_per_ms * self.costs.verify_ms.of_another(num_tokens):
            decision = Decision.STOP
        else:
            decision = Decision.RELEASE if may_release and p >= self.release_confidence else Decision.HOLD
        if not exit_.lookup_length:
            self._statistics(exit_.draft_step).observe(decision is not Decision.STOP, p)
        elif decision is not Decision.STOP:
            self._looked_up.tokens += joint_acceptance * p
            self._looked_up.rows += 1
        return decision

    # ---- divergences

    def verify_divergence(self, regret_nats: float, later: Sequence[Exit], fill_frac: float) -> bool:
        """Worth it if it costs little against the tokens it saves: itself and what may follow. The fuller the budget,
        the more a token may cost, so that spending settles where the budget is earned."""
        gain, joint_acceptance = 1.0, 1.0
        for exit_ in later:
            joint_acceptance *= exit_.probability
            gain += joint_acceptance
        return regret_nats <= self.max_regret_nats * min(1.0, 4.0 * fill_frac) * gain

    # ---- feedback

    def on_verdict(self, exit_: Exit, agrees: bool) -> None:
        self._calibration(exit_).observe(exit_.confidence, agrees)

    def on_shadow(self, depth: int, active_agrees: bool, agrees: bool) -> None:
        self.depth_choice.observe(depth, active_agrees, agrees)

    def wants_shadow(self) -> bool:
        return len(self.depths) > 1

    def on_draft_step(self, depth: int, num_tokens: int, ms: float) -> None:
        if depth in self._warm:
            self.costs.observe_draft_step(depth, num_tokens, ms)
        else:  # takes several times as long as others, and would count for long
            self._warm.add(depth)

    def on_step(self, ms: float) -> None:
        self._passes += 1
        self._pass_ms += (ms - self._pass_ms) * max(PASS_MEMORY, 1.0 / self._passes)

    def on_decode_step(self, num_requests: int, num_tokens: int, ms: float) -> None:
        self.costs.observe_verification(num_tokens, ms)
        if self.wants_shadow():
            before, self.depth = self.depth, self.depth_choice.choose(lambda d: self.best_rate(d, num_requests)[0])
            if self.depth != before:
                for plan in self._plans.values():
                    plan.grow_old()
                for number in range(CALIBRATED_DRAFT_STEPS):  # until it has its own
                    if (known := self.statistics.get((before, number))) is not None:
                        self.statistics.setdefault((self.depth, number), replace(known))

    def num_verdicts(self, exit_: Exit) -> int:
        return self._calibration(exit_).num_verdicts

    def _calibration(self, exit_: Exit) -> OnlineCalibration:
        return self._calibration_of(kind_of(exit_))

    def _calibration_of(self, kind: ExitKind) -> OnlineCalibration:
        calibration = self.calibrations.get(kind)
        if calibration is None:
            memory = self.memory_verdicts
            prior = min(memory, PRIOR_VERDICTS) if self.sibling else memory
            calibration = OnlineCalibration(memory_verdicts=memory, prior_verdicts=prior)
            self.calibrations[kind] = calibration
        return calibration

    def _statistics(self, number: int) -> DraftStepStatistics:
        """Of the active depth; another one's are relative to them."""
        key = (self.depth_choice.active, shared_draft_step(number))
        statistics = self.statistics.get(key)
        if statistics is None:
            statistics = self.statistics[key] = DraftStepStatistics()
        return statistics

    # ---- outside

    def status(self) -> dict[str, object]:
        slowdown = self.costs.slowdown
        return {
            "verify_ms": {str(rows): round(ms * slowdown, 3) for rows, ms in self.costs.verify_ms.measured().items()},
            "draft_step_ms": {
                str(depth): {str(rows): round(ms * slowdown, 3) for rows, ms in curve.measured().items()}
                for depth, curve in self.costs.draft_steps.items()
            },
            "pass_ms": round(self._pass_ms, 3),
            "waiting_requests": round(self._waiting.num_requests, 2),
            "draft_steps_planned": {str(load): plan.num_draft_steps for load, plan in sorted(self._plans.items())},
            "calibration": {
                f"{_name(depth, number)}, {'greedy' if greedy else 'sampled'}": {
                    "scale": round(item.scale, 3),
                    "offset": round(item.offset, 3),
                    "verdicts": item.num_verdicts,
                }
                for (depth, number, greedy), item in sorted(self.calibrations.items())
            },
        }

    def state(self) -> dict[str, object]:
        return {
            "depth": self.depth,
            "calibrations": [[*key, asdict(item)] for key, item in self.calibrations.items()],
            "statistics": [[*key, asdict(item)] for key, item in self.statistics.items()],
            "verify_ms": self.costs.verify_ms.state(),
            "draft_steps": [[depth, curve.state()] for depth, curve in self.costs.draft_steps.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        state = {CONTROLLER_STATE.get(name, name): value for name, value in state.items()}
        if state["depth"] not in self.depths:
            raise ValueError(f"no ramp at depth {state['depth']}")
        calibrations = {ExitKind(d, n, bool(g)): OnlineCalibration(**item) for d, n, g, item in state["calibrations"]}
        statistics = {(d, n): DraftStepStatistics(**item) for d, n, item in state["statistics"]}
        verify_ms = CostCurve.from_state(state["verify_ms"])
        draft_steps = {depth: CostCurve.from_state(curve) for depth, curve in state["draft_steps"]}
        self.calibrations, self.statistics = calibrations, statistics
        self.costs.verify_ms, self.costs.draft_steps = verify_ms, draft_steps
        self.depth = self.depth_choice.active = state["depth"]


def _name(depth: int, number: int) -> str:
    return "prompt lookup" if depth == LOOKED_UP else f"depth {depth}, position {number}"
