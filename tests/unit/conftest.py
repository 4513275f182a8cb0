from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from apparate_llm.host import dtype
from apparate_llm.prepare import schedule, synthesise
from tests.preparation import Clock, FakeCapture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(autouse=True)
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers take the same dtype whatever CPU the tests run on."""
    monkeypatch.setattr(dtype, "has_16_bit_kernels", lambda *place: True)


@pytest.fixture
def synthesis_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of a Synthesiser that has no model."""
    clock = Clock()
    for module in (schedule, synthesise):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(synthesise, "Capture", FakeCapture)
    return clock


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_llama: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)
