"""Ways to serve a model that an evaluation can compare, by name."""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import httpx

from apparate_llm.address import authorization, server_url
from apparate_llm.config import parse_config
from apparate_llm.controller.policies import POLICIES
from apparate_llm.eval.client import Fields
from apparate_llm.eval.store import file_name
from apparate_llm.flags import config_of
from apparate_llm.host.choice import AS_VLLM, RESERVED, Choice, Worker, environment
from apparate_llm.host.chosen import choose
from apparate_llm.host.dtype import asked_dtype, dtype_flags
from apparate_llm.host.limits import cpu_limits
from apparate_llm.host.options import KeptTuning, num_ranks, parse_kept_tuning
from apparate_llm.launch import clean_environment, is_cpu_build, server_environment
from apparate_llm.models.architectures import architecture_of, layers_of
from apparate_llm.preflight import preflight_ramps
from apparate_llm.redact import redacted
from apparate_llm.renamed import OPTIONS as OLD_OPTIONS
from apparate_llm.renamed import SYSTEMS as OLD_SYSTEMS
from apparate_llm.renamed import warn
from apparate_llm.vllm_flags import given_value, normalised

BASELINE = "vllm"
TUNED = "-tuned"  # behind the name of a system that vLLM has: with this machine used as ours use it, or on all cores
PLAIN = {BASELINE: "plain vLLM", f"{BASELINE}{TUNED}": "plain vLLM tuned alike"}  # a token takes all layers, once
PLAIN_SERVER = "vllm.entrypoints.launchers.api_server.entry"  # vLLM's own server, as a module
OFF = "off"
SPECULATION = ("ngram", "suffix", f"ngram{TUNED}", f"suffix{TUNED}")  # vLLM's own
LONGEST_NGRAM, SHORTEST_NGRAM = 4, 2  # tokens that n-gram speculation looks for
LONGEST_NAME = 100  # letters of a system's, by which its log is called
SUFFIX_PACKAGE = "arctic_inference"
GREEDY_ONLY = ("hf", "hf-early-exit")
SHARES = (BASELINE, "+threads", "+worker", "+pages", "+head", "+exits")  # each has all that those before it have
NAMES = {
    "vllm": "plain vLLM as it starts, in our servers' dtype: the baseline",
    "lossless": "early exits, accuracy bound 0",
    "early-exit": "early exits, once for each of --accuracy-bounds",
    "off": "our server with --policy off",
    "ramps-only": "ramps run, and no exit is ever taken: what a ramp costs",
    "ngram": "vLLM's n-gram speculation, with as many drafts as --max-exits",
    "suffix": "vLLM's suffix decoding; needs the extra `suffix`",
    **{
        f"{name}{TUNED}": f"{name} that uses this machine as our servers do; with --tuning off, on all cores"
        for name in ("vllm", "ngram", "suffix")
    },
    "shares": "vllm and those that follow, each with one more part of our gain: what each part brings",
    "+threads": "plain vLLM that computes on all cores",
    "+worker": "the same in the engine's process",
    "+pages": "our server used alike, weights in huge pages, no exit ever tried",
    "+head": "the same, the head screened",
    "+exits": "the same with lossless exits",
    "hf": "Hugging Face generate",
    "hf-early-exit": "Hugging Face generate with assistant_early_exit",
    **{
        str(name): f"early exits with policy {name}, once for each bound"
        for name in POLICIES
        if name not in ("off", "adaptive")
    },
}

# What a request may find of earlier ones: nothing, as each has a `cache_salt`; nothing, as there is none; or prompts.
PrefixCache = Literal["salted", "none", "warm"]


@dataclass(frozen=True, slots=True)
class System:
    """A way to serve the model."""

    name: str
    command: tuple[str, ...] = ()  # without --port; empty for a server that is running already
    base_url: str | None = None  # of that one
    api_key: str | None = field(default=None, repr=False)  # that it wants
    has_exits: bool = False
    bound: float | None = None  # accuracy bound, of a system with exits
    max_concurrency: int | None = None  # requests it works on at a time
    problem: str | None = None  # why it cannot run here
    prefix_cache: PrefixCache = "warm"
    fields: Fields = field(default_factory=dict, hash=False)  # of every request to it
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)  # of its environment, set for it
    tpt_target_ms: float | None = None  # of its requests; None: as fast as the bound allows
    is_foreign: bool = False  # neither ours nor vLLM's: nothing of our environment is for it

    @property
    def started_by(self) -> str:
        if not self.command:
            return f"at {self.base_url}"
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        return " ".join([*variables, *redacted(self.command)]).replace(sys.executable, "python")

    @property
    def environment(self) -> dict[str, str]:
        return (clean_environment() if self.is_foreign else server_environment()) | dict(self.variables)


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What all systems of one evaluation have in common."""

    model: Path
    vllm_flags: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of every system with early exits
    bounds: tuple[float, ...] = (0.05,)
    hf_layer: int | None = None  # blocks of the draft of hf-early-exit; None: half of them
    api_key: str | None = field(default=None, repr=False)  # that the user has given us
    tuning: tuple[str, ...] = ()  # flags of our servers
    used: Choice = AS_VLLM  # how servers use this machine
    alike: Mapping[str, str] = field(default_factory=dict, hash=False)  # variables by which plain vLLM does so, too

    @property
    def own_key(self) -> str | None:
        """That servers started here want, if any."""
        asked = given_value(normalised(list(self.vllm_flags)), "api-key") or os.environ.get("VLLM_API_KEY")
        return asked or self.api_key


def tuned(choice: ModelChoice, tuning: KeptTuning) -> ModelChoice:
    """For servers that all use this machine as `serve` does, in one dtype; raises ConfigError."""
    choice = replace(
        choice,
        vllm_flags=(*choice.vllm_flags, *dtype_flags(choice.model, normalised([*choice.vllm_flags]), num_servers=2)),
    )
    flags, config = normalised([*choice.vllm_flags]), config_of(choice.options)
    without_pages = parse_config(config.model_dump(exclude_unset=True, exclude={"huge_pages"}))
    chosen = choose(tuning, choice.model, flags, without_pages)
    if chosen.choice != AS_VLLM:  # by themselves pages are an option of exits, and no tuning
        chosen = choose(tuning, choice.model, flags, config)
    return replace(choice, tuning=tuning.flags(), used=chosen.choice, alike=chosen.environment)


def tells_of_exits(base_url: str, api_key: str | None = None) -> bool:
    """Whether the server has early exits and answers for them, not for one tenant only; what does not answer
    at all is found out later."""
    status = _document(f"{base_url}/early_exit/status", api_key)
    return isinstance(status.get("counts"), dict) and not {"tenant", "class"} & status.keys()


def prefix_cache_of(base_url: str, api_key: str | None = None) -> PrefixCache:
    """Of a server that is running: vLLM's takes a salt, which others may refuse."""
    return "salted" if "version" in _document(f"{base_url}/version", api_key) else "warm"


def _document(url: str, api_key: str | None) -> dict[str, Any]:
    """The JSON object that is there; empty where there is none, as at other servers."""
    try:
        answer = httpx.get(url, headers=authorization(api_key), timeout=10.0)
        document = answer.json() if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def systems_of(names: list[str], base_urls: list[str], choice: ModelChoice) -> list[System]:
    """The systems by their names, plain vLLM first; raises ValueError for a name that is none."""
    systems = []
    for given in names:
        if given in OLD_SYSTEMS:
            warn(given, OLD_SYSTEMS[given])
    for name in dict.fromkeys(OLD_SYSTEMS.get(name, name) for name in spelt_out(names)):
        if name not in NAMES:
            raise ValueError(f"unknown system {name!r}; there are {', '.join(NAMES)}")
        systems += _named(name, choice)
    for text in base_urls:
        name, _, url = text.partition("=")
        if not name or not url:
            raise ValueError(f"--base-url: NAME=http://HOST:PORT wanted, got {text!r}")
        base_url, key = server_url(url, f"--base-url {name}"), choice.api_key
        has_exits, cache = tells_of_exits(base_url, key), prefix_cache_of(base_url, key)
        systems.append(System(name, base_url=base_url, has_exits=has_exits, api_key=key, prefix_cache=cache))
    check_names(systems)
    return sorted(systems, key=lambda system: system.name != BASELINE)


def spelt_out(names: list[str]) -> list[str]:
    """With those that `shares` stands for."""
    return [name for given in names for name in (SHARES if given == "shares" else (given,))]


def check_names(systems: Sequence[System]) -> None:
    """Raises ValueError where two are called the same, or one that is started as no log can be."""
    names = [system.name for system in systems]
    for name in (system.name for system in systems if system.command):
        if "/" in name or len(name) > LONGEST_NAME:
            raise ValueError(f"a system's name has no slash and {LONGEST_NAME} letters at most, got {name!r}")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two systems are called {', '.join(doubled)}")
    by_file: dict[str, str] = {}
    for name in names:
        if (other := by_file.setdefault(file_name(name), name)) != name:
            raise ValueError(f"systems {other!r} and {name!r} would have the same files: choose another name for one")


def baselines_of(given: Sequence[str], systems: Sequence[System], default: str) -> tuple[str, ...]:
    """What ratios are to, the one that comes first in all that is shown at the front; plain vLLM as it starts is one
    wherever it is measured. Raises ValueError for one that is not measured."""
    names = [system.name for system in systems]
    for name in given:
        if name not in names:
            raise ValueError(f"--baseline: {name} is not measured; there are {', '.join(names)}")
    baselines = tuple(dict.fromkeys([*(given or [default]), *(name for name in names if name == BASELINE)]))
    first = next(system for system in systems if system.name == baselines[0])
    if first.problem is not None:
        raise ValueError(f"the baseline {first.name} cannot run here: {first.problem}")
    return baselines


def on_all_cores(choice: ModelChoice, worker: Worker = "process") -> dict[str, str]:
    """Variables with which a server computes on all cores of this machine, and where."""
    if not is_cpu_build():
        return {}
    if num_ranks(normalised([*choice.vllm_flags])) > 1:  # vLLM binds the threads of several workers itself
        return {RESERVED: "0"}
    return environment(Choice(threads="all", worker=worker), cpu_limits(), os.environ)


def _named(name: str, choice: ModelChoice) -> list[System]:
    if name == "vllm":
        return [plain_vllm(choice)]
    if name in SHARES:
        return [_with_parts(name, choice)]
    if name.endswith(TUNED):
        (system,) = _named(name.removesuffix(TUNED), choice)
        variables = on_all_cores(choice) if choice.used == AS_VLLM else choice.alike
        return [replace(system, name=name, variables=variables)]
    if name in SPECULATION:
        return [_speculation(name, choice)]
    if name in GREEDY_ONLY:
        return [_hugging_face(name, choice)]
    if name == "lossless":
        return [early_exits(name, choice, "--accuracy-bound", "0")]
    if name == "off":
        return [early_exits(name, choice, "--policy", "off")]
    if name == "ramps-only":
        never = ("--policy", "static", "--accuracy-bound", "0", "--hold-threshold", "1", "--max-batch-tokens", "65536")
        return [early_exits(name, choice, *never)]
    policy, joined = ((), "-") if name == "early-exit" else (("--policy", name), " ")
    return [
        early_exits(f"{name}{joined}{bound:g}", choice, *policy, "--accuracy-bound", f"{bound:g}")
        for bound in choice.bounds
    ]


def _with_parts(name: str, choice: ModelChoice) -> System:
    """Pages are those of a server with exits; one whose batches may hold a single token tries none."""
    choice = replace(choice, tuning=("--tuning", "off"))
    lossless = ("--accuracy-bound", "0", "--huge-pages", "true")
    none = ("--policy", "static", "--max-batch-tokens", "1")
    if name in ("+threads", "+worker"):
        system = plain_vllm(choice, name)
    elif name == "+pages":
        system = early_exits(name, choice, *lossless, *none, "--screened-head", "false")
    elif name == "+head":
        system = early_exits(name, choice, *lossless, *none)
    else:
        system = early_exits(name, choice, *lossless)
    return replace(system, variables=on_all_cores(choice, "process" if name == "+threads" else "engine"))


def _speculation(name: str, choice: ModelChoice) -> System:
    """vLLM's own, with as many drafts as our systems have. Suffix decoding says itself how many it wants; it remembers
    no earlier answers, as prompts that are asked again would only be answered from them."""
    if name == "ngram":
        lengths = {"prompt_lookup_max": LONGEST_NGRAM, "prompt_lookup_min": SHORTEST_NGRAM}
        settings = {"method": name, "num_speculative_tokens": _most_drafts(choice), **lengths}
    else:
        settings = {"method": name, "suffix_decoding_max_cached_requests": 0}
    system = plain_vllm(choice, name, "--speculative-config", json.dumps(settings))
    if name == "suffix" and importlib.util.find_spec(SUFFIX_PACKAGE) is None:
        problem = f"the package {SUFFIX_PACKAGE} is not installed: pip install 'apparate-llm[suffix]'"
        return replace(system, problem=problem)
    return system


def _most_drafts(choice: ModelChoice) -> int:
    return config_of(choice.options).max_exits


def plain_vllm(choice: ModelChoice, name: str = BASELINE, *flags: str) -> System:
    """vLLM as it comes, in the same environment."""
    command = (sys.executable, "-m", PLAIN_SERVER, "--model", str(choice.model))
    return System(name, (*command, *choice.vllm_flags, *flags), api_key=choice.own_key, prefix_cache="salted")


def plain_alike(choice: ModelChoice) -> System:
    """Plain vLLM with this machine used as our servers use it."""
    (system,) = _named(BASELINE if choice.used == AS_VLLM else f"{BASELINE}{TUNED}", choice)
    return system


def early_exits(name: str, choice: ModelChoice, *options: str) -> System:
    """Our server. A later option wins over an earlier one; state is not kept unless an option says so, as what is
    measured should not depend on what was served before."""
    given, tuning = {"--controller-state": "none"}, {}
    flags = [*choice.tuning, *choice.options, *options]
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        old = flag[2:].replace("-", "_")
        if old in KeptTuning.model_fields:
            tuning[flag] = value
            continue
        if new := OLD_OPTIONS.get(old):
            warn(old, new)
        given[f"--{new.replace('_', '-')}" if new else flag] = value
    command = (sys.executable, "-m", "apparate_llm.cli", "serve", str(choice.model))
    own = [part for pair in given.items() for part in pair]
    config = config_of(own)
    parse_kept_tuning({key[2:]: value for key, value in tuning.items()})  # raises for a value that is not allowed
    has_exits = config.policy != "off"
    problem = None
    if has_exits:
        try:
            preflight_ramps(config, choice.model, architecture_of(choice.model))
        except ValueError as error:
            problem = str(error)
    return System(
        name,
        (*command, *own, *(part for pair in tuning.items() for part in pair), *choice.vllm_flags),
        has_exits=has_exits,
        bound=config.accuracy_bound if has_exits else None,
        tpt_target_ms=config.tpt_target_ms if has_exits else None,
        api_key=choice.own_key,
        problem=problem,
        prefix_cache="salted",
    )


def _hugging_face(name: str, choice: ModelChoice) -> System:
    command: tuple[str, ...] = (sys.executable, "-m", "apparate_llm.eval.hf_server", "--model", str(choice.model))
    if (dtype := asked_dtype(normalised([*choice.vllm_flags]))) != "auto":
        command = (*command, "--dtype", dtype)
    if name == "hf-early-exit":
        layer = choice.hf_layer or layers_of(choice.model) // 2
        command = (*command, "--early-exit", str(layer))
    return System(name, command, max_concurrency=1, prefix_cache="none")
