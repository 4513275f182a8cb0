#!/usr/bin/env python3
"""What TPT of an evaluation is made of: python -m scripts.tpt_parts OUT...

OUT are folders of evaluations of the same kind, taken together. A request waits for its next token through the prompts
of others: that part is time between its chunks in which another's first token came. The rest is generation.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from apparate_llm.eval.client import Completion
from apparate_llm.eval.closed_loop import SAME_STEP_S
from apparate_llm.eval.store import Store
from apparate_llm.eval.systems import BASELINE


def parts(completions: list[Completion], uncounted: Sequence[Completion] = ()) -> Iterator[tuple[float, float, float]]:
    """Of each request (ms per token with others' prompts, without, ms to the first token). uncounted: others."""
    begun = [done for done in (*completions, *uncounted) if done.chunks]
    firsts = np.array([done.started_s + done.chunks[0].at_s for done in begun])
    for done, own in zip(begun[: sum(bool(one.chunks) for one in completions)], firsts, strict=False):
        if done.tpt_ms is None or done.output_tokens is None:
            continue
        others = firsts[firsts > own + SAME_STEP_S] - done.started_s
        gaps = [(left.at_s, right.at_s) for left, right in pairwise(done.chunks)]
        with_prompts = sum(
            right - left
            for left, right in gaps
            if np.any((others > left + SAME_STEP_S / 2) & (others <= right + SAME_STEP_S))
        )
        shared = with_prompts * 1e3 / (done.output_tokens - 1)
        yield shared, done.tpt_ms - shared, done.chunks[0].at_s * 1e3


def main() -> int:
    times: dict[tuple[str, int, str], list[tuple[float, float, float]]] = defaultdict(list)
    for folder in sys.argv[1:]:
        store = Store(Path(folder))
        loads = [name for name, _ in store.plan()["loads"]]
        for block in store.blocks():
            times[loads[block.key.load], block.key.repeat, block.key.system] += parts(
                block.completions, block.uncounted
            )
    print(
        "| load | repeat | system | requests | TPT, ms | with others' prompts | generation | TPT / plain "
        "| generation / plain | TTFT, ms |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for (load, repeat, system), requests in sorted(times.items()):
        prompts, generation, ttft = np.mean(requests, axis=0)
        plain_prompts, plain_generation, _ = np.mean(times[load, repeat, BASELINE], axis=0)
        tpt, plain = prompts + generation, plain_prompts + plain_generation
        print(
            f"| {load} | {repeat + 1} | {system} | {len(requests)} | {tpt:.1f} | {prompts:.1f} | {generation:.1f} | "
            f"{tpt / plain:.2f} | {generation / plain_generation:.2f} | {ttft:.0f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
