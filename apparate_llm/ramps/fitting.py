"""Which ramps fit a model: those made for its very weights, else those of a sibling.

A sibling is a model quantised or fine-tuned out of the one that the ramps were made for. Its architecture, its shapes
and its tokenizer are the same, and a sample of its head's and its embedding's rows points the same way. How often ramps
are right may differ, so what was calibrated is only where a sibling's calibration begins (controller/).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch.nn import functional as F

from apparate_llm.naming import model_name
from apparate_llm.ramps.base_weights import BaseWeights
from apparate_llm.ramps.checkpoint import RampError, RampManifest, read_manifest, shape_differences, shipped_folders
from apparate_llm.ramps.sketch import SKETCH, Shapes, Sketch, read_config
from apparate_llm.ramps.tokens import TokenizerDigest, TokenizerError

# Mean cosine of the sampled rows. Codes of 4 bits leave 0.99, another training from scratch 0.
LEAST_COSINE = 0.9

_Looked = TypeVar("_Looked")


class Sibling(NamedTuple):
    """A model that is served with ramps of another one."""

    of: str  # the model that the ramps were made for
    stored: str  # how this one's weights are
    head_cosine: float
    embedding_cosine: float
    head_is_quantised: bool

    def __str__(self) -> str:
        read = ", the head read as dequantised" if self.head_is_quantised else ""
        return (
            f"ramps of {self.of} for a sibling: {self.stored} weights, rows alike by cosine {self.head_cosine:.3f} "
            f"(head) and {self.embedding_cosine:.3f} (embedding){read}; no divergences until its own verdicts suffice"
        )


class Fitting(NamedTuple):
    folder: Path
    manifest: RampManifest
    sibling: Sibling | None  # None: the model is the one that the ramps were made for


class NoSiblingError(RampError):
    """What differs."""


def fitting_ramps(weights: BaseWeights, model: Path, ramps: Path | None) -> Fitting:
    """The ramps of the folder `ramps`, or those shipped that fit; raises RampError with what differs. model: its
    folder; weights: those that were loaded of it."""
    return _first(
        ramps,
        str(model),
        lambda folder, manifest: _fitting(weights, model, folder, manifest),
        fingerprint=weights.fingerprint,
    )


def check_might_fit(model: Path, ramps: Path | None) -> None:
    """The same of a model whose weights need not be there yet: whether it may be the one that ramps were made for, or
    a sibling of it, by its configuration and its tokenizer. Raises RampError."""
    _first(ramps, model_name(model), lambda folder, manifest: _might_fit(model, folder, manifest))


def _first(
    ramps: Path | None, model: str, look: Callable[[Path, RampManifest], _Looked], *, fingerprint: str | None = None
) -> _Looked:
    """What `look` makes of the folder `ramps`, or of the first shipped one that it raises no NoSiblingError of. Those
    made for the model with this fingerprint are looked at before all others."""
    if ramps is not None:
        try:
            return look(ramps, read_manifest(ramps))
        except NoSiblingError as error:
            raise RampError(f"ramps in {ramps} were made for another model than {model}: {error}") from None
    shipped = [(folder, read_manifest(folder)) for folder in shipped_folders()]
    shipped.sort(key=lambda item: item[1].base_model.fingerprint != fingerprint)
    problems = []
    for folder, manifest in shipped:
        try:
            return look(folder, manifest)
        except NoSiblingError as error:
            problems.append(str(error))
    raise RampError(
        f"no shipped ramps fit {model} ({'; '.join(problems) or 'there are none'}): name a ramp folder (--ramps) or "
        "use --policy off"
    )


def _might_fit(model: Path, folder: Path, manifest: RampManifest) -> None:
    """Less than `sibling_of` asks: the very model serves, too, where its tokenizer is elsewhere or in another
    format."""
    sketch = Sketch.read(folder, fingerprint=manifest.base_model.fingerprint)
    if sketch is None:
        if differences := shape_differences(manifest, model):
            raise NoSiblingError(", ".join(differences))
        return
    if differences := sketch.description.shapes.differences(Shapes.of(model)):
        raise _no_sibling(sketch, ", ".join(differences))
    if (tokenizer := sketch.description.tokenizer) is None:
        return
    try:
        same_format = TokenizerDigest.of(model, tokenizer.num_tokens).num_tokens == tokenizer.num_tokens
        difference = tokenizer.difference(model) if same_format else None
    except TokenizerError:
        return
    if difference is not None:
        raise _no_sibling(sketch, difference)


def _fitting(weights: BaseWeights, model: Path, folder: Path, manifest: RampManifest) -> Fitting:
    if manifest.base_model.fingerprint == weights.fingerprint:
        return Fitting(folder, manifest, None)
    sketch = Sketch.read(folder, fingerprint=manifest.base_model.fingerprint)
    if sketch is None:
        base = manifest.base_model
        raise NoSiblingError(
            f"they need fingerprint {base.fingerprint} ({base.architecture}, {base.num_hidden_layers} blocks), it has "
            f"{weights.fingerprint}, and without {SKETCH} siblings cannot be told"
        )
    return Fitting(folder, manifest, sibling_of(sketch, weights, model))


def sibling_of(sketch: Sketch, weights: BaseWeights, model: Path) -> Sibling:
    """Raises NoSiblingError with what differs."""
    description = sketch.description
    if not model.is_dir():
        raise _no_sibling(sketch, "only a folder can be looked at")
    if differences := description.shapes.differences(Shapes.of(model)):
        raise _no_sibling(sketch, ", ".join(differences))
    if description.tokenizer is None:
        raise _no_sibling(sketch, "that one's tokenizer cannot be compared")
    try:
        difference = description.tokenizer.difference(model)
    except TokenizerError as error:
        difference = str(error)
    if difference is not None:
        raise _no_sibling(sketch, difference)
    head = _cosine(sketch, "head", sketch.head, weights.head())
    embedding = _cosine(sketch, "embedding", sketch.embedding, weights.embedding())
    quantisation = read_config(model).get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    stored = str(method or weights.norm.dtype).removeprefix("torch.")
    return Sibling(description.name, stored, head, embedding, weights.head_is_quantised)


def _cosine(sketch: Sketch, name: str, rows: torch.Tensor, table: torch.Tensor) -> float:
    """Mean, of the rows that were sampled of a table [vocab_size, hidden_size]; raises NoSiblingError where it is too
    low."""
    expected = (sketch.description.shapes.vocab_size, sketch.description.shapes.hidden_size)
    if table.shape != expected:
        raise _no_sibling(sketch, f"its {name} has shape {tuple(table.shape)}, not {expected}")
    cosine = mean_cosine(rows, table[sketch.row_ids])
    if not cosine >= LEAST_COSINE:  # NaN of a table that holds any
        raise _no_sibling(
            sketch,
            f"a sample of {len(sketch.row_ids)} rows of its {name} has a cosine of {cosine:.2f} with that one's, "
            f"at least {LEAST_COSINE:g} is needed",
        )
    return cosine


def mean_cosine(rows: torch.Tensor, others: torch.Tensor) -> float:
    """Of [num_rows, hidden_size] each, less their mean: what all rows of a table have in common makes none of them like
    its counterpart. Rows that are zero in both are left out."""
    rows, others = rows.float(), others.float()
    known = (rows != 0).any(1) | (others != 0).any(1)
    if not known.any():
        return 1.0
    rows, others = (values[known] - values[known].mean(0) for values in (rows, others))
    return float(F.cosine_similarity(rows, others, dim=1).mean())


def _no_sibling(sketch: Sketch, difference: str) -> NoSiblingError:
    return NoSiblingError(f"it is no sibling of {sketch.description.name}: {difference}")
