"""Which conversations are trained on, which choose and calibrate, and which the report is made from.

Split by conversation and by what it is about: a passage is asked about in the split it comes from only, and prompts of
the user that share a passage are in one split.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from apparate_llm.eval.prompts import text_of
from apparate_llm.prepare.chat import Chat
from apparate_llm.prepare.rows import TEST, TRAIN, VALIDATION

SHARES = {TRAIN: 14 / 16, VALIDATION: 1 / 16, TEST: 1 / 16}
BLOCK = 16  # sources, of which one is for validation and one for testing
SHARED_WORDS = 13  # in a row make two prompts one source (the n-gram of Brown et al. 2020, appendix C)
COMMON_FRAC = 0.2  # of all prompts: words that so many share are a form, not a passage


def split_of(number: int, seed: str) -> int:
    """Split of source `number`: at random, and the same share in every block."""
    block, place = divmod(number, BLOCK)
    splits = [VALIDATION, TEST] + [TRAIN] * (BLOCK - 2)
    random.Random(f"{seed}/splits/{block}").shuffle(splits)
    return splits[place]


def next_split(counts: Mapping[int, int]) -> int:
    """Of a new conversation, where there are `counts` of each: the split that has fewest for its share. The first three
    are one of each, as there may be time for no more."""
    if empty := [split for split in (TRAIN, VALIDATION, TEST) if not counts.get(split)]:
        return empty[0]
    total = sum(counts.values()) + 1
    return max((TRAIN, VALIDATION, TEST), key=lambda split: SHARES[split] * total - counts.get(split, 0))


def sources(texts: list[str]) -> list[int]:
    """Number of the source of each text; texts that share a passage, or are the same, have the same one."""
    shared: dict[int, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        words = text.split()
        pieces = {hash(tuple(words[i : i + SHARED_WORDS])) for i in range(max(1, len(words) - SHARED_WORDS + 1))}
        for piece in pieces:
            shared[piece].append(number)
    leader = list(range(len(texts)))

    def first_of(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    most = max(2, int(COMMON_FRAC * len(texts)))
    for numbers in shared.values():
        if len(numbers) <= most:
            for other in numbers[1:]:
                low, high = sorted((first_of(numbers[0]), first_of(other)))
                leader[high] = low
    names: dict[int, int] = {}
    return [names.setdefault(first_of(number), len(names)) for number in range(len(texts))]


def splits_of_prompts(prompts: Sequence[Chat], seed: str) -> list[int]:
    """Split of each of the user's prompts; what a system prompt says does not make two of them alike."""
    texts = ["\n".join(text_of(turn) for turn in prompt if turn["role"] != "system") for prompt in prompts]
    return [split_of(source, f"{seed}/user") for source in sources(texts)]
