"""Servers as a preparation starts them: without what it sets for its own engine, on this machine as `serve` uses it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apparate_llm.host.chosen import Chosen, choose
from apparate_llm.host.dtype import dtype_flags
from apparate_llm.host.options import kept_tuning_from
from apparate_llm.launch import server_environment
from apparate_llm.prepare.engine import environment


def used_by_servers(model: Path) -> Chosen:
    """How servers of the model, with exits, use this machine."""
    given = {name: value for name, value in server_environment().items() if name not in _of_our_engine()}
    return choose(kept_tuning_from(), model, dtype_flags(model, ()), given=given)


@contextmanager
def servers_environment() -> Iterator[None]:
    """Servers choose their threads by themselves."""
    kept = {name: os.environ.pop(name) for name in _of_our_engine() if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _of_our_engine() -> set[str]:
    return environment().keys() - {"VLLM_LOGGING_LEVEL"}
