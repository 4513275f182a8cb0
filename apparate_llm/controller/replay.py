"""Any policy on a feedback log, offline: what it would have emitted, with how many divergences and how fast.

The log's engine steps are taken one after another, each with the exits that were proposed in it and their verdicts. A
policy that takes fewer exits than the log's would go on from an earlier token than the log's next step does; that is
ignored, as the next step is still a fair sample of what follows. What a log does not hold (draft steps it did not run)
cannot be taken. Verdicts come at the end of their step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from apparate_llm.config import BoundKind
from apparate_llm.controller.budget import AccuracyBudget, Bucket
from apparate_llm.controller.costs import ROWS, CostCurve
from apparate_llm.controller.feedback import LoggedExit, LoggedStep
from apparate_llm.controller.policy import Policy
from apparate_llm.core import Decision, Exit


class LogCosts:
    """What passes and draft steps took in a log: medians by rows, between them linear."""

    def __init__(self, steps: Sequence[LoggedStep]) -> None:
        """Raises ValueError where the log has no verification pass or no draft step."""
        passes: dict[int, list[float]] = {}
        draft_steps: dict[int, dict[int, list[float]]] = {}
        for step in steps:
            passes.setdefault(step.num_tokens, []).append(step.verify_ms)
            if step.exits:
                by_rows = draft_steps.setdefault(step.exits[0].depth, {})
                for num_tokens, ms in step.draft_steps:
                    by_rows.setdefault(num_tokens, []).append(ms)
        self.verify_ms = _curve(passes)
        self.draft_steps = {depth: _curve(by_rows) for depth, by_rows in draft_steps.items()}
        if not self.draft_steps:
            raise ValueError("the log holds no exits")


def _curve(samples: dict[int, list[float]]) -> CostCurve:
    import numpy as np

    if not samples:
        raise ValueError("the log holds no times")
    rows = sorted(samples)
    values = np.interp(ROWS, rows, [median(samples[count]) for count in rows])
    return CostCurve(tuple(float(value) for value in values))


@dataclass(slots=True)
class Replayed:
    """Totals of one policy over one log."""

    steps: int = 0  # of the engine
    emitted: int = 0
    draft_steps: int = 0
    held: int = 0
    accepted: int = 0
    released: int = 0
    divergences: int = 0
    regret_nats: float = 0.0
    request_ms: float = 0.0  # sum over steps of their time x requests that waited for it
    plain_request_ms: float = 0.0  # the same had every step been a plain pass, per token it then emits
    plain_emitted: int = 0
    worst_share: float = 0.0  # largest share of divergent tokens over any prefix beyond 500 tokens
    buckets: dict[int, Bucket] = field(default_factory=dict)

    @property
    def tpt_ms(self) -> float:
        return self.request_ms / self.emitted

    @property
    def tpt_ratio(self) -> float:
        return self.tpt_ms / (self.plain_request_ms / self.plain_emitted)

    @property
    def divergence_frac(self) -> float:
        return self.divergences / self.emitted

    @property
    def regret_per_token(self) -> float:
        return self.regret_nats / self.emitted

    @property
    def tokens_per_pass(self) -> float:
        return self.emitted / self.plain_emitted


@dataclass(slots=True)
class _Answer:
    """One request in one step."""

    bucket: Bucket
    proposed: list[LoggedExit]  # by draft step
    taken: list[Exit] = field(default_factory=list)
    not_taken: Exit | None = None
    joint_acceptance: float = 1.0

    @property
    def holds(self) -> bool:
        return bool(self.taken) and self.taken[-1].decision is Decision.HOLD


def replay(
    steps: Iterable[LoggedStep], costs: LogCosts, policy: Policy, *, accuracy_bound: float, kind: BoundKind
) -> Replayed:
    result, budget = Replayed(), AccuracyBudget(accuracy_bound, kind)
    for step in steps:
        answers = _answers(step, policy.depth, result.buckets, accuracy_bound)
        num_tokens, ms = _draft(step, answers, costs, policy, budget, result)
        verify_ms = costs.verify_ms(num_tokens)
        emitted = step.num_requests  # one checked token each
        for answer in answers:
            emitted += _verdicts(answer, policy, budget, result)
        for _ in range(step.num_requests - len(answers)):
            budget.emit(Bucket.of_request(accuracy_bound), 1)
        policy.on_decode_step(step.num_requests, num_tokens, verify_ms)
        result.steps += 1
        result.emitted += emitted
        result.request_ms += (ms + verify_ms) * step.num_requests
        result.plain_request_ms += costs.verify_ms(step.num_requests) * step.num_requests
        result.plain_emitted += step.num_requests
        if result.emitted > 500:
            result.worst_share = max(result.worst_share, result.divergences / result.emitted)
    return result


def _answers(step: LoggedStep, depth: int, buckets: dict[int, Bucket], accuracy_bound: float) -> list[_Answer]:
    proposed: dict[int, dict[int, LoggedExit]] = {}
    for exit_ in step.exits:
        if exit_.depth == depth:
            proposed.setdefault(exit_.request, {})[exit_.draft_step] = exit_
    answers = []
    for request, by_draft_step in proposed.items():
        if request not in buckets:
            buckets[request] = Bucket.of_request(accuracy_bound)
        in_order: list[LoggedExit] = []
        while len(in_order) in by_draft_step:
            in_order.append(by_draft_step[len(in_order)])
        answers.append(_Answer(buckets[request], in_order))
    return answers


def _draft(
    step: LoggedStep,
    answers: list[_Answer],
    costs: LogCosts,
    policy: Policy,
    budget: AccuracyBudget,
    result: Replayed,
) -> tuple[int, float]:
    """Tokens of the verification pass that follows, and ms of the draft steps."""
    num_tokens, ms, live = step.num_requests, 0.0, [answer for answer in answers if answer.proposed]
    for number in range(policy.start(step.num_requests)):
        live = [answer for answer in live if number < len(answer.proposed)]
        if not live:
            break
        took = costs.draft_steps[policy.depth](len(live))
        policy.on_draft_step(policy.depth, len(live), took)
        ms += took
        result.draft_steps += 1
        going = []
        for answer in live:
            if _takes_exit(answer, number, policy, budget, num_tokens):
                num_tokens += 1
                going.append(answer)
        live = going
        if not live or not policy.wants_another_step(
            number + 1, [answer.joint_acceptance for answer in live], num_tokens
        ):
            break
    return num_tokens, ms


def _takes_exit(answer: _Answer, number: int, policy: Policy, budget: AccuracyBudget, num_tokens: int) -> bool:
    """Whether a request takes what the log proposed to it in draft step `number`. num_tokens: rows of the verification
    pass so far."""
    logged = answer.proposed[number]
    exit_ = Exit(0, 0, logged.depth, number, logged.confidence)
    may_release = not answer.holds and budget.may_release(answer.bucket)
    decision = policy.decide(
        exit_, joint_acceptance=answer.joint_acceptance, may_release=may_release, num_tokens=num_tokens
    )
    if decision is Decision.STOP:
        answer.not_taken = exit_
        return False
    if decision is Decision.RELEASE:
        budget.release(answer.bucket)
    else:
        answer.joint_acceptance *= exit_.probability
    exit_.decision = decision
    answer.taken.append(exit_)
    return True


def _verdicts(answer: _Answer, policy: Policy, budget: AccuracyBudget, result: Replayed) -> int:
    """Exits that are emitted."""
    emitted = 0
    for number, exit_ in enumerate(answer.taken):
        logged = answer.proposed[number]
        regret = logged.regret_nats or 0.0
        policy.on_verdict(exit_, logged.agrees)
        if exit_.decision is Decision.RELEASE:
            result.released += 1
            if logged.agrees:
                budget.prove_right(answer.bucket)
        else:
            result.held += 1
            if not logged.agrees:
                later = answer.taken[number + 1 :]
                may = logged.regret_nats is not None and budget.verify_divergence(answer.bucket, regret)
                if not (may and policy.verify_divergence(regret, later, budget.fill_frac_of(answer.bucket))):
                    break
                budget.accept(answer.bucket, regret)
            result.accepted += 1
        emitted += 1
        if not logged.agrees:
            result.divergences += 1
            result.regret_nats += regret
    else:
        if answer.not_taken is not None:
            policy.on_verdict(answer.not_taken, answer.proposed[len(answer.taken)].agrees)
    budget.emit(answer.bucket, emitted + 1)
    return emitted


def oracle(steps: Iterable[LoggedStep], costs: LogCosts, *, depth: int) -> Replayed:
    """A perfect ramp of the same proposals: it knows the verdicts, takes every right exit and never runs a draft step
    in vain."""
    result = Replayed()
    for step in steps:
        lengths = []
        for answer in _answers(step, depth, result.buckets, 0.0):
            first = next((i for i, exit_ in enumerate(answer.proposed) if not exit_.agrees), len(answer.proposed))
            lengths.append(first)
        ms = sum(
            costs.draft_steps[depth](sum(length > number for length in lengths))
            for number in range(max(lengths, default=0))
        )
        num_tokens = step.num_requests + sum(lengths)
        result.steps += 1
        result.accepted += sum(lengths)
        result.held += sum(lengths)
        result.emitted += num_tokens
        result.request_ms += (ms + costs.verify_ms(num_tokens)) * step.num_requests
        result.plain_request_ms += costs.verify_ms(step.num_requests) * step.num_requests
        result.plain_emitted += step.num_requests
    return result
