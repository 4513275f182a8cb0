"""Models as people name them: a folder, a GGUF file, a name on a hub, or none for the default one."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

from apparate_llm.config import ConfigError
from apparate_llm.default_model import NAME, default_model
from apparate_llm.gguf_model import check_gguf, gguf_folder
from apparate_llm.hub import Origin, fetch_gguf, fetch_model

# ORG/MODEL, MODEL of old times, and :KIND for one of its GGUF files.
HUB_NAME = re.compile(r"([A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?)(?::([\w.-]+))?")
GGUF = ".gguf"
HELP = f"folder, GGUF file, or name on the Hugging Face hub, ORG/MODEL or ORG/MODEL:Q4_K_M (default: {NAME})"


def add_model(parser: argparse.ArgumentParser, *, as_flag: bool = False) -> None:
    """The model of a command, and its revision."""
    if as_flag:
        parser.add_argument("--model", metavar="MODEL", help=HELP)
    else:
        parser.add_argument("model", nargs="?", help=HELP)
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a model on the hub")


def model_of(
    args: argparse.Namespace, check: Callable[[Path], None] = lambda folder: None, *, load_format: str = "auto"
) -> Path:
    """Folder of the model that a command was given, see `model_folder`."""
    if args.revision is not None and (args.model is None or folder_here(args.model) or is_file(args.model)):
        raise ConfigError(f"--revision is of a model on the hub, and {args.model or 'the default model'} is here")
    return model_folder(args.model, Origin(revision=args.revision, load_format=load_format), check)


def model_folder(
    name: str | Path | None, origin: Origin | None = None, check: Callable[[Path], None] = lambda folder: None
) -> Path:
    """The folder of the model named. One of a hub is downloaded, a GGUF file converted where that was not done before.
    check: is given a folder with the model's configuration as soon as there is one, and may raise. Raises ConfigError
    or GgufError, one line each."""
    if name is None:
        folder = default_model()
    elif (here := folder_here(name)) is not None:
        folder = here
    elif is_file(name):
        folder = gguf_folder(_path(name))
    else:
        repository, kind = _hub_name(name)
        origin = origin or Origin()
        if kind is None:
            return fetch_model(repository, origin, check)
        folder = gguf_folder(fetch_gguf(repository, kind, origin))
    check(folder)
    return folder


def folder_here(name: str | Path) -> Path | None:
    """The model's folder; None for what must be downloaded or converted first. Raises ConfigError or GgufError for
    what is no model at a first look."""
    path = _path(name)
    if str(name) and path.is_dir():
        return path
    if is_file(name):
        check_gguf(path)
    else:
        _hub_name(name)
    return None


def is_file(name: str | Path) -> bool:
    return _path(name).is_file()


def _hub_name(name: str | Path) -> tuple[str, str | None]:
    """(repository, kind of its GGUF files or None)."""
    if str(name).endswith(GGUF):
        raise ConfigError(f"model file not found: {name}")
    match = HUB_NAME.fullmatch(str(name).rstrip("/"))
    if match is None:
        raise ConfigError(f"model folder not found: {name}")
    return match[1], match[2]


def _path(name: str | Path) -> Path:
    return Path(os.path.expanduser(name))
