#!/usr/bin/env python3
"""The accuracy bound against an adversary: a ramp that is right until it is trusted, and then wrong while sure.

    python -m scripts.check_bound [--verdicts 1000000] [--bound 0.05]

From the repository's root. Exit code 1 if a prefix of the stream beyond 500 tokens holds more divergences than allowed.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from typing import NamedTuple

from apparate_llm.config import EarlyExitConfig, PolicyName
from apparate_llm.controller.feedback import LoggedStep
from apparate_llm.controller.policies import make_policy
from apparate_llm.controller.policy import Policy
from apparate_llm.controller.replay import LogCosts, replay
from apparate_llm.core import Exit
from tests import logs

RIGHT, WRONG = 90, 60  # engine steps


class Checked(NamedTuple):
    num_verdicts: int
    worst_share: float
    divergence_frac: float


def adversary(confidence: float, step: int, rng: random.Random) -> bool:
    return step % (RIGHT + WRONG) < RIGHT or rng.random() < 0.1


def check_bound(name: PolicyName, *, num_verdicts: int, accuracy_bound: float) -> Checked:
    """Until there were so many verdicts."""
    config = EarlyExitConfig(policy=name, accuracy_bound=accuracy_bound, max_exits=3)
    policy = make_policy(config, depth=0, depths=(0,), num_layers=30)
    verdicts, original = 0, policy.on_verdict

    def on_verdict(self: Policy, exit_: Exit, agrees: bool) -> None:
        nonlocal verdicts
        verdicts += 1
        original(exit_, agrees)

    def until_enough() -> Iterator[LoggedStep]:
        for step in logs.steps(10**9, agrees=adversary, length=600):
            if verdicts >= num_verdicts:
                return
            yield step

    costs = LogCosts(list(logs.steps(100)))
    policy.__class__ = type("Counted", (type(policy),), {"__slots__": (), "on_verdict": on_verdict})
    result = replay(until_enough(), costs, policy, accuracy_bound=accuracy_bound, kind="agreement")
    return Checked(verdicts, result.worst_share, result.divergence_frac)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verdicts", type=int, default=1_000_000)
    parser.add_argument("--bound", type=float, default=0.05)
    args = parser.parse_args()
    broken = False
    names: tuple[PolicyName, ...] = ("adaptive", "apparate", "static")
    for name in names:
        checked = check_bound(name, num_verdicts=args.verdicts, accuracy_bound=args.bound)
        broken |= checked.worst_share > args.bound
        print(
            f"{name}: {checked.num_verdicts} verdicts, worst prefix {checked.worst_share:.5f}, in all "
            f"{checked.divergence_frac:.5f} divergences (bound {args.bound:g})",
            flush=True,
        )
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
