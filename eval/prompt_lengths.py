"""Prompts of given lengths, for how long first tokens take by the length of a prompt."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from apparate_llm.eval.client import PlannedRequest
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.workloads import Load

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
BETWEEN = "\n\n"
LENGTH = re.compile(r"\d+-token prompts$")  # in the name of a load


def prompts_of_lengths(model: Path, prompts: Sequence[Prompt], lengths: Sequence[int]) -> list[Prompt]:
    """For each length as many as there are prompts: their texts one after the other, each time from another one on,
    cut off at so many of the model's tokens. The chat template comes on top. Raises ValueError where a length comes
    twice, the model has no sound tokenizer.json, or the prompts have no tokens."""
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"--prompt-tokens: each length once, got {','.join(map(str, lengths))}")
    if (tokenizer := tokenizer_of(model)) is None:
        raise ValueError(f"--prompt-tokens: {model} has no {TOKENIZER}, by which tokens are counted")
    texts = [prompt.asked for prompt in prompts]
    whole = len(tokenizer.encode(BETWEEN.join(texts), add_special_tokens=False).ids)
    if not whole:
        raise ValueError(f"--prompt-tokens: the prompts have no tokens by {model / TOKENIZER}")
    times = 2 + max(lengths) // whole
    made = []
    for tokens in lengths:
        for start in range(len(texts)):
            text = BETWEEN.join((texts[start:] + texts[:start]) * times)
            _, end = tokenizer.encode(text, add_special_tokens=False).offsets[tokens - 1]
            made.append(Prompt([{"role": "user", "content": text[:end]}]))
    return made


def tokenizer_of(model: Path) -> "Tokenizer | None":
    """By its tokenizer.json; None where there is none. Raises ValueError for a damaged one."""
    from tokenizers import Tokenizer

    file = model / TOKENIZER
    if not file.is_file():
        return None
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"damaged {file}: {' '.join(str(error).split())}") from None
    return tokenizer


def loads_by_length(loads: Sequence[Load], lengths: Sequence[int], number: int) -> list[Load]:
    """Loads that ask `number` prompts, once for each length, with prompts as `prompts_of_lengths` has them."""
    return [
        _moved(load, place * number, number, len(lengths) * number, f"{load.name}, {tokens}-token prompts")
        for place, tokens in enumerate(lengths)
        for load in loads
    ]


def length_of(load: str) -> str:
    """What the name of a load says of its prompts' length; empty where they have their own."""
    match = LENGTH.search(load)
    return match[0] if match else ""


def _moved(load: Load, first: int, number: int, total: int, name: str) -> Load:
    """To the `number` prompts from `first` on, of `total`, which the held-out ones come behind."""

    def moved(asks: tuple[PlannedRequest, ...]) -> tuple[PlannedRequest, ...]:
        shifts = [first if ask.prompt_index < number else total - number for ask in asks]
        return tuple(ask._replace(prompt_index=ask.prompt_index + by) for ask, by in zip(asks, shifts, strict=True))

    uncounted = [
        around._replace(lead_in=moved(around.lead_in), run_out=moved(around.run_out)) for around in load.uncounted
    ]
    return replace(load, name=name, blocks=tuple(map(moved, load.blocks)), uncounted=tuple(uncounted))
