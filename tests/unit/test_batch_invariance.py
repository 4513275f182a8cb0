"""Linear layers whose rows depend on their batch are found, and their rows filled up."""

import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase

from apparate_llm.engine.batch_invariance import SPLIT_KEYS, LinearKind, cover, filled_up, least_rows


class Method:
    """A product that rounds differently for fewer than `alike` rows."""

    def __init__(self, alike: int) -> None:
        self.alike = alike

    def apply(self, layer, rows, bias=None):
        out = (rows[:, None] * layer.weight).sum(-1)  # torch's own product is another one for a single row, too
        return out if len(rows) >= self.alike else out + 1e-3 * len(rows)


class Layer(LinearBase):
    def __init__(self, alike: int, size_in: int = 8) -> None:
        torch.nn.Module.__init__(self)
        self.input_size_per_partition, self.output_size_per_partition = size_in, 4
        self.weight = torch.nn.Parameter(torch.ones(4, size_in), requires_grad=False)
        self.bias = None
        self.quant_method = Method(alike)


@pytest.fixture(autouse=True)
def whole_keys(monkeypatch):
    monkeypatch.setenv(SPLIT_KEYS, "0")


KIND = LinearKind(8, 4, "Method", False)


@pytest.mark.parametrize(("alike", "rows"), [(1, 1), (2, 2), (3, 4), (8, 8), (1000, None)])
def test_the_fewest_rows_are_those_from_which_all_batches_agree(alike, rows):
    assert least_rows(Layer(alike), KIND, torch.float32) == rows


def test_only_layers_that_need_it_are_filled_up():
    model = torch.nn.ModuleList([Layer(1, 8), Layer(2, 16), Layer(2, 16)])
    coverage = cover(model, torch.float32)
    assert coverage.holds and coverage.num_kinds == 2 and coverage.least_rows == {"16x4": 2}
    assert "16x4 at least 2 rows" in coverage.sentence()
    rows = torch.randn(5, 16)
    for layer in list(model)[1:]:
        together = layer.quant_method.apply(layer, rows)
        assert torch.equal(torch.cat([layer.quant_method.apply(layer, row[None]) for row in rows]), together)
    assert next(iter(model)).quant_method.apply.__func__ is Method.apply


def test_what_cannot_be_helped_is_said(monkeypatch):
    monkeypatch.setenv(SPLIT_KEYS, "1")
    coverage = cover(torch.nn.ModuleList([Layer(1000)]), torch.float32)
    assert not coverage.holds
    assert SPLIT_KEYS in coverage.sentence() and "linear layers 8x4" in coverage.sentence()


def test_rows_that_were_filled_in_are_taken_off_again():
    seen = []

    def linear(rows):
        seen.append(rows)
        return rows * 2

    rows = torch.ones(1, 3)
    assert torch.equal(filled_up(linear, 2)(rows), rows * 2)
    assert seen[0].shape == (2, 3) and not seen[0][1].any()
    assert torch.equal(filled_up(linear, 2)(torch.ones(7, 3)), torch.ones(7, 3) * 2) and seen[1].shape == (7, 3)


def test_doctor_says_what_the_last_start_of_each_model_found(tmp_path, monkeypatch):
    from apparate_llm import coverage, doctor

    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path))
    assert [finding.level for finding in doctor.check_batch_invariance()] == ["ok"]
    coverage.keep(tmp_path, "a-model", "bfloat16", 1, "all alike", True)
    coverage.keep(tmp_path, "b-model", "bfloat16", 2, "some differ", False)
    coverage.keep(tmp_path, "b-model", "bfloat16", 2, "others differ", False, kernels="zentorch")
    old = tmp_path / coverage.FOLDER / "a-model-bfloat16-1.json"
    old.write_text(old.read_text().replace(', "kernels": "stock"', ""))  # as an earlier version kept it
    (tmp_path / coverage.FOLDER / "damaged.json").write_text("{")
    findings = doctor.check_batch_invariance()
    levels = [("ok", True), ("note", False), ("note", False)]
    assert [(finding.level, "alike" in finding.what) for finding in findings] == levels
    texts = {finding.what for finding in findings}
    assert "batch invariance of b-model, bfloat16, 2 threads: some differ" in texts
    assert "batch invariance of b-model, bfloat16, 2 threads, zentorch: others differ" in texts
