import pytest

from apparate_llm.host import dtype


@pytest.fixture(autouse=True)
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers take the same dtype whatever CPU the tests run on."""
    monkeypatch.setattr(dtype, "has_16_bit_kernels", lambda *place: True)
