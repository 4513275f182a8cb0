"""What a model is called, by its folder."""

from pathlib import Path

SNAPSHOTS, OF_MODELS = "snapshots", "models--"  # in huggingface_hub's cache: models--ORG--MODEL/snapshots/COMMIT


def model_name(folder: Path) -> str:
    """`ORG/MODEL` for a snapshot of a hub, else the folder's own name."""
    repository = folder.parent.parent.name
    if folder.parent.name == SNAPSHOTS and repository.startswith(OF_MODELS):
        return repository.removeprefix(OF_MODELS).replace("--", "/")
    return folder.name
