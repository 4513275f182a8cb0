#!/usr/bin/env python3
"""TPT of an evaluation by category of prompt: python -m scripts.tpt_by_category OUT PROMPTS

OUT is the evaluation's folder, PROMPTS what it asked. Mean TPT over requests, over plain vLLM's on the same ones, with
a 95 % interval (bootstrap over prompts).
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from apparate_llm.eval.prompts import load_prompts
from apparate_llm.eval.store import Store
from apparate_llm.eval.systems import BASELINE

RESAMPLES = 2000


def main() -> int:
    store, prompts = Store(Path(sys.argv[1])), load_prompts(Path(sys.argv[2]))
    loads = [name for name, _ in store.plan()["loads"]]
    tpt: dict[tuple[str, int, str], dict[int, float]] = defaultdict(dict)
    for block in store.blocks():
        for done in block.completions:
            if done.tpt_ms is not None:
                category = prompts[done.prompt_index].category or "all"
                tpt[category, block.key.load, block.key.system][done.prompt_index] = done.tpt_ms
    rng = np.random.default_rng(0)
    print("| prompts | load | system | requests | TPT mean, ms | TPT / plain (95 % CI) |\n|---|---|---|---|---|---|")
    for (category, load, system), ours in sorted(tpt.items()):
        plain = tpt[category, load, BASELINE]
        both = sorted(ours.keys() & plain.keys())
        pairs = np.array([(ours[index], plain[index]) for index in both])
        picked = pairs[rng.integers(len(both), size=(RESAMPLES, len(both)))].mean(axis=1)
        low, high = np.percentile(picked[:, 0] / picked[:, 1], [2.5, 97.5])
        mean, of_plain = pairs.mean(axis=0)
        ratio = f"{mean / of_plain:.2f} ({low:.2f}-{high:.2f})"
        print(f"| {category} | {loads[load]} | {system} | {len(both)} | {mean:.1f} | {ratio} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
