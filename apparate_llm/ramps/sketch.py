"""`base_model.safetensors` in a ramp folder: what is known of the model that the ramps were made for, so that a sibling
of it, quantised or fine-tuned, can be told when the model itself is not at hand."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from apparate_llm.files import write_atomically
from apparate_llm.naming import model_name
from apparate_llm.ramps.base_weights import BaseWeights
from apparate_llm.ramps.checkpoint import RampError
from apparate_llm.ramps.tokens import TokenizerDigest, TokenizerError

SKETCH = "base_model.safetensors"
DESCRIPTION = "base_model"  # in the file's metadata
NUM_ROWS = 64  # sampled of the head and of the embedding
ROW_IDS, HEAD_ROWS, EMBEDDING_ROWS = "row_ids", "head", "embedding"


class Shapes(BaseModel):
    """What a model must have in common with another one for the same ramps."""

    model_config = ConfigDict(extra="forbid")

    architecture: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, model_dir: Path) -> "Shapes":
        """Out of a model folder's config.json; raises RampError."""
        config = read_config(model_dir)
        try:
            heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
            return cls(
                architecture=config["architectures"][0],
                num_hidden_layers=config["num_hidden_layers"],
                hidden_size=hidden_size,
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden_size // heads,
                vocab_size=config["vocab_size"],
            )
        except KeyError as error:
            raise RampError(f"{model_dir / 'config.json'} does not say {error.args[0]}") from None
        except (TypeError, IndexError, ZeroDivisionError, ValidationError) as error:
            raise RampError(f"damaged {model_dir / 'config.json'}: {' '.join(str(error).split())}") from None

    def differences(self, other: "Shapes") -> list[str]:
        """Of another model, in words."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"its {name} is {theirs[name]}, not {mine[name]}" for name in mine if mine[name] != theirs[name]]


class Description(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    fingerprint: str
    shapes: Shapes
    tokenizer: TokenizerDigest | None  # None: its files are of a kind that cannot be compared


class Sketch(NamedTuple):
    description: Description
    row_ids: torch.Tensor  # [num_rows] int64
    head: torch.Tensor  # [num_rows, hidden_size]
    embedding: torch.Tensor  # [num_rows, hidden_size]

    @classmethod
    def of(cls, model_dir: Path, *, name: str | None = None) -> "Sketch":
        """Of a model folder; raises RampError or WeightsError."""
        weights, shapes = BaseWeights.of(model_dir), Shapes.of(model_dir)
        try:
            tokenizer = TokenizerDigest.of(model_dir)
        except TokenizerError:
            tokenizer = None
        description = Description(
            name=name or model_name(model_dir.resolve()),
            fingerprint=weights.fingerprint,
            shapes=shapes,
            tokenizer=tokenizer,
        )
        ids = evenly_spread(shapes.vocab_size)
        return cls(description, ids, weights.head()[ids], weights.embedding()[ids])

    def save(self, folder: Path) -> None:
        from safetensors.torch import save

        tensors = {ROW_IDS: self.row_ids, HEAD_ROWS: self.head}
        if not torch.equal(self.head, self.embedding):  # else the two are tied
            tensors[EMBEDDING_ROWS] = self.embedding
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SKETCH, save(tensors, {DESCRIPTION: self.description.model_dump_json()}))

    @classmethod
    def read(cls, folder: Path, *, fingerprint: str) -> "Sketch | None":
        """Of a ramp folder for the model with this fingerprint; None where it has none. Raises RampError."""
        from safetensors import SafetensorError, safe_open

        path = folder / SKETCH
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                description = Description.model_validate_json((file.metadata() or {})[DESCRIPTION])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            head = tensors[HEAD_ROWS]
            sketch = cls(description, tensors[ROW_IDS], head, tensors.get(EMBEDDING_ROWS, head))
        except (SafetensorError, ValidationError, KeyError) as error:
            raise RampError(f"damaged {path}: {type(error).__name__}: {' '.join(str(error).split())}") from None
        if description.fingerprint != fingerprint:
            raise RampError(f"damaged {path}: it is of {description.fingerprint}, the ramps are for {fingerprint}")
        return sketch


def evenly_spread(vocab_size: int) -> torch.Tensor:
    """At most NUM_ROWS token ids, int64."""
    number = min(NUM_ROWS, vocab_size)
    return (2 * torch.arange(number) + 1) * vocab_size // (2 * number)


def read_config(model_dir: Path) -> dict[str, Any]:
    """Raises RampError."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RampError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise RampError(f"damaged {path}: an object is expected, got {type(config).__name__}")
    return config
