"""What of a model and its ramps would stop an engine half a minute into its start, found out in a second."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from apparate_llm.config import EarlyExitConfig
from apparate_llm.host.dtype import check_kernels
from apparate_llm.launch import check_build
from apparate_llm.models.architectures import architecture_of, early_exit_architecture
from apparate_llm.ramps.checkpoint import choose_depth
from apparate_llm.vllm_flags import given_value

if TYPE_CHECKING:
    from apparate_llm.ramps.fitting import Fitting


def preflight(config: EarlyExitConfig, model: Path, vllm_flags: list[str]) -> "tuple[str, Fitting | None]":
    """The architecture of a model that is here and its ramps; nothing where nobody asks."""
    check_kernels(model)
    if config.policy == "off":
        return "", None
    architecture = architecture_of(model)
    return architecture, preflight_ramps(config, model, architecture, load_format(vllm_flags))


def preflight_config(config: EarlyExitConfig, folder: Path) -> str:
    """The architecture of a model whose weights need not be there yet, after a look whether there can be ramps for it;
    empty where nobody asks."""
    from apparate_llm.ramps.fitting import check_might_fit

    check_kernels(folder)
    if config.policy == "off":
        return ""
    architecture = architecture_of(folder)
    early_exit_architecture(architecture)
    check_might_fit(folder, None if config.ramps is None else Path(config.ramps))
    return architecture


def preflight_ramps(
    config: EarlyExitConfig, model: Path, architecture: str, load_format: str = "auto"
) -> "Fitting | None":
    """Find out here, in a second, what would otherwise stop the engine half a minute into its start. None: no ramps
    are asked for."""
    from apparate_llm.ramps.base_weights import BaseWeights
    from apparate_llm.ramps.fitting import fitting_ramps

    if config.policy == "off":
        return None
    check_build()
    early_exit_architecture(architecture)
    fitting = fitting_ramps(
        BaseWeights.of(model, load_format), model, None if config.ramps is None else Path(config.ramps)
    )
    choose_depth(fitting.manifest, config.depth)
    return fitting


def load_format(vllm_flags: list[str]) -> str:
    return given_value(vllm_flags, "load-format") or "auto"


def announce(fitting: "Fitting | None") -> None:
    """Say so where the ramps were made for another model than the one that is served."""
    if fitting is not None and fitting.sibling is not None:
        text = str(fitting.sibling)
        print(text[0].upper() + text[1:], file=sys.stderr, flush=True)
