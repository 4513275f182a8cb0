"""What a user says of the use of this machine: `--tuning`, and each part by hand."""

import argparse
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apparate_llm.config import ConfigError, EarlyExitConfig
from apparate_llm.flags import add_fields
from apparate_llm.host.choice import (
    BIND,
    HUGE_PAGES,
    KERNELS,
    OWN_PROCESS,
    QUEUES,
    RESERVED,
    WORKER,
    ZENTORCH,
    has_zentorch,
    takes_zentorch,
)
from apparate_llm.host.limits import CpuLimits
from apparate_llm.launch import is_cpu_build
from apparate_llm.machine import cpu_name
from apparate_llm.vllm_flags import given_value

TUNING_VARIABLE = "APPARATE_TUNING"  # what --tuning is where nobody gives it
SIZES = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
EXECUTOR = "distributed-executor-backend"
# Ours: part -> its variable, and what each of its values stands for.
VARIABLES: dict[str, tuple[str, dict[str, str | bool]]] = {
    "kernels": (KERNELS, {"stock": "stock", "zentorch": "zentorch"}),
    "huge_pages": (HUGE_PAGES, {"0": False, "1": True}),
    "queues": (QUEUES, {"spin": "spin", "block": "block"}),
    "worker": (WORKER, {"process": "process", "engine": "engine"}),
}


HOW_USED = (
    "how this machine is used: auto: as `apparate-llm tune` has found best for it and the model; where nothing was "
    "measured, all cores, huge pages and the worker in the engine's process; off: as vLLM does"
)


class Tuning(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tuning: Literal["auto", "off", "again"] = Field(
        "auto", description=f"{HOW_USED}; again: measure first, for minutes"
    )
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="how many threads compute, or auto"
    )
    kernels: Literal["auto", "stock", "zentorch"] = Field(
        "auto", description="what computes linear layers and attention: vLLM's stock kernels, or AMD's zentorch"
    )
    queues: Literal["auto", "spin", "block"] = Field(
        "auto", description="what engine and worker do while they wait for each other: spin for a second, or block"
    )
    worker: Literal["auto", "process", "engine"] = Field(
        "auto", description="where the model is computed: in a process of its own, or in the engine's"
    )

    @property
    def parts(self) -> dict[str, object]:
        """Those given by hand."""
        named = self.model_dump(exclude={"tuning"})
        return {name: value for name, value in named.items() if value != "auto"}

    def flags(self) -> tuple[str, ...]:
        """By which another command is told the same."""
        given = self.model_dump(exclude_unset=True)
        return tuple(part for name, value in given.items() for part in (f"--{name}", str(value)))


class KeptTuning(Tuning):
    """Of a command that measures something else: it goes by what is kept."""

    tuning: Literal["auto", "off"] = Field("auto", description=HOW_USED)


Schema = TypeVar("Schema", bound=Tuning)


def add_tuning(parser: argparse.ArgumentParser, schema: type[Tuning] = Tuning) -> None:
    add_fields(parser.add_argument_group("this machine"), schema)


def tuning_from(args: argparse.Namespace | None = None) -> Tuning:
    """What the flags say, and the variable where they say nothing; raises ConfigError that names the flag, what was
    got and what is allowed."""
    return _given(args, Tuning)


def kept_tuning_from(args: argparse.Namespace | None = None) -> KeptTuning:
    """The same for a command that measures something else."""
    return _given(args, KeptTuning)


def _given(args: argparse.Namespace | None, schema: type[Schema]) -> Schema:
    given = {name: value for name in schema.model_fields if (value := getattr(args, name, None)) is not None}
    if "tuning" not in given and (value := os.environ.get(TUNING_VARIABLE)):
        return _parsed(given | {"tuning": value}, schema, {"tuning": TUNING_VARIABLE})
    return _parsed(given, schema)


def parse_kept_tuning(given: Mapping[str, object]) -> KeptTuning:
    """By the names of fields; raises ConfigError as `tuning_from`."""
    return _parsed(given, KeptTuning)


def _parsed(
    given: Mapping[str, object], schema: type[Schema], names: Mapping[str, str] = MappingProxyType({})
) -> Schema:
    """names: what they are called, if not by their flags."""
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        allowed = _allowed(schema, name)
        raise ConfigError(f"{names.get(name, f'--{name}')}: must be {allowed}, got {given[name]!r}") from None


def _allowed(schema: type[Tuning], name: str) -> str:
    annotation = schema.model_fields[name].annotation
    if get_origin(annotation) is not Literal:
        return "auto or a whole number of at least 1"
    *others, last = get_args(annotation)
    return f"{', '.join(others)} or {last}"


def num_ranks(flags: Sequence[str]) -> int:
    """Workers of a server with these flags of vLLM's, which have one spelling."""
    ranks = 1
    for name in SIZES:
        text = given_value([*flags], name) or "1"
        ranks *= int(text) if text.isdigit() else 1  # vLLM says what is wrong with another
    return ranks


def parts_by_hand(tuning: Tuning, config: EarlyExitConfig) -> dict[str, object]:
    """Pages, an option of exits, among them."""
    pages = {"huge_pages": config.huge_pages} if "huge_pages" in config.model_fields_set else {}
    return tuning.parts | pages


def check_tuning(
    tuning: Tuning, limits: CpuLimits, flags: Sequence[str], given: Mapping[str, str], config: EarlyExitConfig
) -> None:
    """Raises ConfigError for parts given by hand that this machine, vLLM's flags or the variables `given` do not
    allow."""
    if not is_cpu_build():
        if tuning.parts:
            raise ConfigError(f"--{next(iter(tuning.parts))} is about vLLM's CPU backend, and this vLLM has none")
        return
    _check_ours(parts_by_hand(tuning, config), given)
    if isinstance(tuning.threads, int):
        if tuning.threads > limits.threads:
            raise ConfigError(f"--threads: at most {limits.threads} here ({limits.sentence()}), got {tuning.threads}")
        _check_not_both("--threads", (BIND, RESERVED), given)
        if num_ranks(flags) > 1:
            raise ConfigError(f"--threads: vLLM binds the threads of several workers itself, by {BIND}")
    if tuning.kernels == "zentorch" and not has_zentorch():
        raise ConfigError(f"--kernels zentorch: {_without_zentorch()}")
    if tuning.worker != "auto":
        _check_not_both("--worker", (OWN_PROCESS,), given)
    if tuning.worker == "engine":
        if num_ranks(flags) > 1:
            raise ConfigError("--worker engine: one worker is wanted, and vLLM's flags make several")
        if (backend := given_value([*flags], EXECUTOR)) not in (None, "uni"):
            raise ConfigError(f"--worker engine contradicts --{EXECUTOR} {backend}")


def _without_zentorch() -> str:
    if not takes_zentorch():
        return f"vLLM uses {ZENTORCH} on AMD's CPUs with AVX-512 only, got {cpu_name()} (allowed: auto or stock)"
    return f"the package {ZENTORCH} is not installed: apparate-llm doctor --fix"


def _check_ours(parts: Mapping[str, object], given: Mapping[str, str]) -> None:
    """Raises ConfigError for a variable of ours with a wrong value, or with another than the flag for the same part."""
    for part, (name, values) in VARIABLES.items():
        if name not in given:
            continue
        if given[name] not in values:
            raise ConfigError(f"{name}: must be {' or '.join(values)}, got {given[name]!r}")
        if part in parts and parts[part] != values[given[name]]:
            flag = f"--{part.replace('_', '-')} {str(parts[part]).lower()}"
            raise ConfigError(f"{flag} contradicts {name}={given[name]}: give one of them")


def _check_not_both(flag: str, names: tuple[str, ...], given: Mapping[str, str]) -> None:
    for name in names:
        if name in given:
            raise ConfigError(f"{flag} and {name}={given[name]} both say it: give one of them")
