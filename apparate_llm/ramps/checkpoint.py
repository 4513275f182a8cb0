"""The ramp folder: `ramps.json` (what, for which model) and `ramps.safetensors` (weights, vocabulary map). What its
siblings are told by is beside them, see sketch.py."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from apparate_llm.files import write_atomically
from apparate_llm.renamed import OLD_AUX_LAYERS

if TYPE_CHECKING:
    import torch

MANIFEST = "ramps.json"
WEIGHTS = "ramps.safetensors"
SHAPE = ("hidden_size", "num_hidden_layers", "vocab_size")  # fields of BaseModelInfo and of config.json
VOCABULARY = "vocabulary"  # tensor [ramp_vocab] int64: ramp token -> token id of the base model


class RampError(ValueError):
    """A ramp folder that cannot be used. The message is one line for the user."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    hidden_size: int
    ramp_vocab: int
    eps: float
    intermediate_size: int = 0
    num_aux_layers: int = 0  # auxiliary hidden states of the full pass that `enter` reads beside the final one


class BaseModelInfo(BaseModel):
    model_config = ConfigDict(extra="forbid")

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    rms_norm_eps: float
    fingerprint: str

    @classmethod
    def of(cls, model_dir: Path) -> "BaseModelInfo":
        """Describe a model folder from its config.json and its weights; raises RampError or WeightsError."""
        from apparate_llm.ramps.fingerprint import fingerprint_of

        path = model_dir / "config.json"
        try:
            config = json.loads(path.read_text())
            described = {
                "architecture": config["architectures"][0],
                "hidden_size": config["hidden_size"],
                "num_hidden_layers": config["num_hidden_layers"],
                "vocab_size": config["vocab_size"],
                "rms_norm_eps": config["rms_norm_eps"],
            }
            return cls(**described, fingerprint=fingerprint_of(model_dir))
        except KeyError as error:
            raise RampError(f"{path} does not say {error.args[0]}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, IndexError, ValidationError) as error:
            raise RampError(f"damaged {path}: {' '.join(str(error).split())}") from None


class RampManifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["lens", "fused"]
    base_model: BaseModelInfo
    depths: list[int] = Field(min_length=1)
    default_depth: int
    ramp_vocab: int = Field(gt=0)
    intermediate_size: int = Field(ge=0)
    # blocks before each auxiliary hidden state that the first draft step's state joins to the final one
    aux_layers: list[int] = Field(default_factory=list, validation_alias=AliasChoices("aux_layers", OLD_AUX_LAYERS))
    # depth -> one (scale, offset) per position: confidence = sigmoid(scale * logit(max probability) + offset)
    calibration: dict[int, list[tuple[float, float]]]
    weights_sha256: str
    training: dict[str, Any] = Field(default_factory=dict)

    def head_shape(self) -> HeadShape:
        return HeadShape(
            hidden_size=self.base_model.hidden_size,
            ramp_vocab=self.ramp_vocab,
            eps=self.base_model.rms_norm_eps,
            intermediate_size=self.intermediate_size,
            num_aux_layers=len(self.aux_layers),
        )

    def sha256(self) -> str:
        """Of all that decides what the ramps say: weights and calibration."""
        calibration = self.model_dump_json(include={"calibration"})
        return hashlib.sha256((self.weights_sha256 + calibration).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> RampManifest:
    """Parse and check a ramp folder without loading its weights; raises RampError."""
    manifest_path, weights_path = folder / MANIFEST, folder / WEIGHTS
    if not folder.is_dir():
        raise RampError(f"ramp folder not found: {folder}")
    for path in (manifest_path, weights_path):
        if not path.is_file():
            raise RampError(f"not a ramp folder (no {path.name}): {folder}")
    try:
        manifest = RampManifest.model_validate_json(manifest_path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise RampError(f"damaged {manifest_path}: {where}: {first['msg']}") from None
    if manifest.default_depth not in manifest.depths:
        raise RampError(f"damaged {manifest_path}: default depth {manifest.default_depth} not in {manifest.depths}")
    blocks = manifest.base_model.num_hidden_layers
    if manifest.aux_layers != sorted({depth for depth in manifest.aux_layers if 0 < depth < blocks}):
        raise RampError(
            f"damaged {manifest_path}: aux_layers {manifest.aux_layers} (allowed: rising, 1 to {blocks - 1})"
        )
    if wrong := [depth for depth in manifest.depths if not 0 <= depth <= blocks]:
        raise RampError(f"damaged {manifest_path}: a ramp at depth {wrong[0]} (allowed: 0 to {blocks})")
    if missing := [depth for depth in manifest.depths if not manifest.calibration.get(depth)]:
        raise RampError(f"damaged {manifest_path}: no calibration for depth {missing[0]}")
    if (sha256 := sha256_of(weights_path)) != manifest.weights_sha256:
        raise RampError(f"damaged {weights_path}: sha256 {sha256[:12]}..., expected {manifest.weights_sha256[:12]}...")
    return manifest


def check_fits(manifest: RampManifest, folder: Path, *, fingerprint: str) -> None:
    """Raise RampError unless the ramps were made for the model with this fingerprint."""
    if manifest.base_model.fingerprint != fingerprint:
        raise RampError(
            f"ramps in {folder} were made for another model: they need fingerprint "
            f"{manifest.base_model.fingerprint} ({manifest.base_model.architecture}, "
            f"{manifest.base_model.num_hidden_layers} blocks), this model has {fingerprint}"
        )


def shape_differences(manifest: RampManifest, model_dir: Path) -> list[str]:
    """Of the model that the ramps were made for and this one, by its config.json alone, in words; raises RampError."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
        pairs = [(name, config[name], getattr(manifest.base_model, name)) for name in SHAPE]
    except KeyError as error:
        raise RampError(f"{path} does not say {error.args[0]}") from None
    except (OSError, ValueError, TypeError) as error:
        raise RampError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return [f"its {name} is {has}, not {needed}" for name, has, needed in pairs if has != needed]


def choose_depth(manifest: RampManifest, depth: int | Literal["auto"]) -> int:
    """The depth to begin with."""
    if depth == "auto":
        return manifest.default_depth
    if depth not in manifest.depths:
        raise RampError(f"no ramp at depth {depth} (allowed: {', '.join(map(str, manifest.depths))})")
    return depth


def load_tensors(folder: Path) -> "dict[str, torch.Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise RampError(f"damaged {folder / WEIGHTS}: {error}") from None


def save_ramps(folder: Path, tensors: "dict[str, torch.Tensor]", **manifest_fields: Any) -> RampManifest:
    """Write a ramp folder; either both files are complete or the old folder stays valid or unreadable, never wrong:
    the manifest, written last, carries the weights' hash."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    data = save(tensors)
    manifest = RampManifest(**manifest_fields, weights_sha256=hashlib.sha256(data).hexdigest())
    write_atomically(folder / WEIGHTS, data)
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest


def shipped_folders() -> list[Path]:
    """Ramp folders that come with the package."""
    assets = Path(__file__).resolve().parent.parent / "assets"
    return sorted(path.parent for path in assets.glob(f"*/{MANIFEST}"))
