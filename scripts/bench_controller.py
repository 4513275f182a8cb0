#!/usr/bin/env python3
"""What the controller's decisions cost per engine step: python -m scripts.bench_controller

A policy is asked and told all that an engine step asks and tells it (three draft steps, every request), without an
engine. The limits are 0.2 ms at batch 1 and 0.5 ms at batch 16. Exit code 1 if one is exceeded.
"""

import random
import sys
from statistics import median
from time import perf_counter

from apparate_llm.config import EarlyExitConfig, PolicyName
from apparate_llm.controller.budget import AccuracyBudget, Bucket
from apparate_llm.controller.policies import make_policy
from apparate_llm.controller.policy import Policy
from apparate_llm.core import Decision, Exit

DRAFT_STEPS = 3
STEPS = 2000
LIMITS_MS = {1: 0.2, 16: 0.5}


def step_ms(policy: Policy, budget: AccuracyBudget, buckets: list[Bucket], rng: random.Random) -> float:
    """Time of one step's decisions; the exits are made before it begins."""
    batch = len(buckets)
    proposed = [[Exit(0, 0, 0, number, rng.random() ** 0.3) for _ in buckets] for number in range(DRAFT_STEPS)]
    began = perf_counter()
    policy.start(batch)
    joint_acceptances, num_tokens, held = [1.0] * batch, batch, []
    for number, exits in enumerate(proposed):
        for i, exit_ in enumerate(exits):
            decision = policy.decide(
                exit_,
                joint_acceptance=joint_acceptances[i],
                may_release=budget.may_release(buckets[i]),
                num_tokens=num_tokens,
            )
            num_tokens += decision is not Decision.STOP
            joint_acceptances[i] *= exit_.probability
            held.append((i, exit_))
        policy.on_draft_step(0, batch, 1.0)
        policy.wants_another_step(number + 1, joint_acceptances, num_tokens)
    policy.on_decode_step(batch, num_tokens, 20.0 + 0.1 * num_tokens)
    for i, exit_ in held:
        agrees = exit_.confidence > 0.3
        if (
            not agrees
            and budget.verify_divergence(buckets[i], 0.5)
            and policy.verify_divergence(0.5, [], budget.fill_frac_of(buckets[i]))
        ):
            budget.accept(buckets[i], 0.5)
        policy.on_verdict(exit_, agrees)
    for bucket in buckets:
        budget.emit(bucket, 2)
    return (perf_counter() - began) * 1e3


def main() -> int:
    exceeded = False
    names: tuple[PolicyName, ...] = ("adaptive", "apparate", "static")
    for name in names:
        for batch, limit in LIMITS_MS.items():
            config = EarlyExitConfig(policy=name, accuracy_bound=0.05, max_batch_tokens=10**6)
            policy = make_policy(config, depth=0, depths=(0,), num_layers=30)
            budget, rng = AccuracyBudget(0.05), random.Random(0)
            buckets = [Bucket.of_request(0.05) for _ in range(batch)]
            times = sorted(step_ms(policy, budget, buckets, rng) for _ in range(STEPS))[: -STEPS // 100]
            exceeded |= median(times) > limit
            print(f"{name}, batch {batch}: median {median(times):.3f} ms, p99 {times[-1]:.3f} ms (limit {limit} ms)")
    return int(exceeded)


if __name__ == "__main__":
    sys.exit(main())
