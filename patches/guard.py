"""A patch, or an override of one of vLLM's methods, is made for one version of one piece of source: anything else stops
the start."""

import hashlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Target = Callable[..., Any]  # a function, a method or a class of vLLM's
VLLM_VERSION = "0.32.0"
Process = Literal["server", "engine", "worker", "any"]  # any: all of vLLM's, where it loads its plugins


class PatchMismatchError(RuntimeError):
    """The source a patch was made for is not the one installed. The message is one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One entry of the ledger."""

    file: str  # module under patches/
    target: str  # qualified name of what is patched
    mode: Literal["replace", "wrap"]
    source_sha256: str  # of the target's source
    what: str
    why: str
    upstream: str
    delete_when: str
    apply: Callable[["Patch"], bool]  # False where the target is not in use on this platform
    process: Process = "worker"  # in which it is applied


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """Methods of one class of vLLM's, or functions of one module."""

    ours: str  # class or module within the package that overrides them
    theirs: str  # qualified name of the class, or the module
    sha256: Mapping[str, str]  # by method, of its source


def check_target(patch: Patch, target: Target) -> None:
    """Raise PatchMismatchError unless vLLM's version and the target's source are those the patch was made for."""
    from vllm import __version__ as installed_version

    if installed_version.split("+")[0] != VLLM_VERSION:
        raise PatchMismatchError(f"patch of {patch.target} is for vLLM {VLLM_VERSION}, found {installed_version}")
    _check_source(f"patch of {patch.target}", patch.source_sha256, source_sha256(target))


def check_overrides(entry: Overrides) -> None:
    """Raise PatchMismatchError unless the source of each method is what ours was made for."""
    for name, expected in entry.sha256.items():
        target = named(f"{entry.theirs}.{name}")
        _check_source(f"{entry.ours}: its override of {entry.theirs}.{name}", expected, source_sha256(target))


def _check_source(what: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise PatchMismatchError(f"{what} is for source {expected[:12]}, found {actual[:12]}")


def named(target: str) -> Target:
    """What a qualified name of vLLM's stands for; raises PatchMismatchError where there is none."""
    try:
        resolved: Target = pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        raise PatchMismatchError(f"vLLM has no {target} any more") from None
    return resolved


def is_ours(speculative_config: object) -> bool:
    """Of a server with early exits; others keep vLLM's behaviour where our package is merely installed."""
    method, model = getattr(speculative_config, "method", None), getattr(speculative_config, "model", None)
    return method == "custom_class" and str(model).startswith("apparate_llm.")


def source_sha256(target: Target) -> str:
    return hashlib.sha256(inspect.getsource(target).encode()).hexdigest()
