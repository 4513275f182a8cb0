"""The ramps and the model that a `ramps` command was given."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from apparate_llm.lifeline import exit_on_sigterm
from apparate_llm.named_model import model_of

if TYPE_CHECKING:
    from apparate_llm.ramps.checkpoint import RampManifest


def ramps_and_model(args: argparse.Namespace, *, siblings: bool = True) -> "tuple[RampManifest, Path]":
    """The checked manifest and the model folder it is for, or a sibling's where `siblings` will do; in a process with
    the performance libraries."""
    from apparate_llm.host.dtype import check_kernels
    from apparate_llm.launch import check_build, reexec_with_libraries
    from apparate_llm.preflight import announce
    from apparate_llm.prepare.engine import environment
    from apparate_llm.ramps.base_weights import BaseWeights
    from apparate_llm.ramps.checkpoint import check_fits, read_manifest
    from apparate_llm.ramps.fitting import check_might_fit, fitting_ramps

    manifest = read_manifest(args.folder)
    check_build()
    reexec_with_libraries(environment())
    exit_on_sigterm()

    def check(folder: Path) -> None:
        check_kernels(folder)
        check_might_fit(folder, args.folder)

    model = model_of(args, check)
    weights = BaseWeights.of(model)
    if siblings:
        announce(fitting_ramps(weights, model, args.folder))
    else:
        check_fits(manifest, args.folder, fingerprint=weights.fingerprint)
    return manifest, model
