"""Random streams of seeded requests."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept(generators: dict[int, torch.Generator], indices: Iterable[int]) -> Iterator[None]:
    """Within it, nothing is drawn from the generators of these requests, whose token is thrown away: they have read
    part of their prompt only. vLLM draws and then turns the generator back, which one of a CPU does not allow: the
    engine would end."""
    taken = {index: generators.pop(index) for index in indices if index in generators}
    try:
        yield
    finally:
        generators.update(taken)
