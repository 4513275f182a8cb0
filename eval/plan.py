"""What one evaluation is to do: its flags, read once."""

import argparse
import hashlib
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apparate_llm.config import EarlyExitConfig, new_options
from apparate_llm.engine.vllm_settings import memory_flags
from apparate_llm.eval.asked_loads import asked_loads
from apparate_llm.eval.client import GREEDY, Sampling
from apparate_llm.eval.llama_cpp import demand_of, find_server, llama_cpp_systems, version_of
from apparate_llm.eval.prompt_lengths import loads_by_length, prompts_of_lengths
from apparate_llm.eval.prompts import Prompt, PromptSet, prompt_set
from apparate_llm.eval.systems import (
    BASELINE,
    GREEDY_ONLY,
    ModelChoice,
    System,
    baselines_of,
    check_names,
    early_exits,
    plain_alike,
    spelt_out,
    systems_of,
    tuned,
)
from apparate_llm.eval.workloads import Load, closed
from apparate_llm.flags import check_new_folder, options_from
from apparate_llm.host.dtype import asked_dtype, check_kernels
from apparate_llm.host.options import kept_tuning_from
from apparate_llm.launch import check_build
from apparate_llm.models.architectures import architecture_of, layers_of
from apparate_llm.named_model import model_of
from apparate_llm.naming import model_name
from apparate_llm.preflight import preflight_ramps
from apparate_llm.redact import redacted
from apparate_llm.renamed import OPTIONS
from apparate_llm.vllm_flags import given_value, normalised, one_spelling, split_flag

SET_HERE = ("model", "revision", "download-dir", "host", "port", "uds")
LEAST_TURN_S, MOST_TURN_S = 1.0, 300.0  # a client waits for an answer no longer than twice that
STEADY_RESULTS = "results.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPlan:
    choice: ModelChoice
    systems: list[System]
    baselines: tuple[str, ...] = (BASELINE,)  # what ratios are to; answers are compared with the first one's
    prompts: list[Prompt]
    loads: list[Load]
    settings: dict[str, object]  # shown, and equal in a run that goes on
    folder: Path
    repeat: int
    start_timeout_s: float
    fresh: bool = True  # whether to begin anew where the folder holds a run
    slo_ms: dict[str, float]
    sampling: Sampling = GREEDY
    phases: tuple[tuple[str, int], ...] = ()  # (name, number of its first prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyPlan:
    """What `eval steady` does."""

    choice: ModelChoice
    systems: list[System]
    baselines: tuple[str, ...]  # what ratios are to
    prompts: list[Prompt]
    levels: list[int]  # clients, one level after the other
    turns: int  # of each server or policy, at each level
    turn_s: float
    settle_s: float  # before what counts: once a level, or after every switch
    learn_s: float  # with exits, before the first switch
    max_tokens: int
    switch: bool  # whether one server's policy is switched
    limit: float | None  # of TPT / the first baseline's; above it the exit code is 1
    settings: dict[str, object]
    folder: Path
    start_timeout_s: float
    sampling: Sampling = GREEDY

    @property
    def level_s(self) -> float:
        """How long a level takes."""
        if self.switch:
            return self.learn_s + 2 * self.turns * (self.settle_s + self.turn_s)
        return len(self.systems) * (self.settle_s + self.turns * self.turn_s)


def quick_plan(args: argparse.Namespace) -> EvalPlan:
    """Plain vLLM against exits with the options given, in a folder that nobody asked for."""
    config = options_from(args)
    check_new_folder("--logs", args.logs)
    if config.policy != "off":
        check_build()
    asked = prompt_set(args.prompts, args.num_prompts)
    prompts = asked.prompts
    flags = tuple(server_flags(args.vllm_flag, num_servers=2))
    model = model_of(args, check_model)
    preflight_ramps(config, model, architecture_of(model))
    choice = tuned(ModelChoice(model, flags, tuple(option_flags(args)), api_key=args.api_key), kept_tuning_from(args))
    systems = [plain_alike(choice), early_exits(name_of(config), choice)]
    loads = [closed(len(prompts), n, max_tokens=args.max_tokens, length="free") for n in args.concurrency]
    return EvalPlan(
        choice=choice,
        systems=systems,
        baselines=(systems[0].name,),
        prompts=prompts,
        loads=loads,
        settings=_settings(args, choice, systems, prompts, loads) | _labels([asked]),
        folder=(args.logs or Path(tempfile.mkdtemp(prefix="apparate-eval-"))) / "run",
        repeat=args.repeat,
        start_timeout_s=args.start_timeout_s,
        slo_ms={},
    )


def check_model(folder: Path) -> None:
    """Raises UnsupportedModelError for a model that no report could be made of, ConfigError for one that cannot be
    served here."""
    check_kernels(folder)
    architecture_of(folder)
    layers_of(folder)


def tpt_plan(args: argparse.Namespace) -> EvalPlan:
    asked = prompt_set(args.prompts, args.num_prompts)
    prompts, loads = asked.prompts, asked_loads(args, asked.prompts)
    if args.prompt_tokens:
        loads = loads_by_length(loads, args.prompt_tokens, len(prompts))
        prompts = prompts_of_lengths(model_of(args, check_model), prompts, args.prompt_tokens)
    return _plan(args, prompts, loads, (), [asked])


def drift_plan(args: argparse.Namespace) -> EvalPlan:
    """One workload, another, and the first again, asked in order in the life of one server."""
    sets = [prompt_set(source, args.num_prompts) for source in args.workloads]
    if len(sets) != 2:
        raise ValueError(f"--workloads: two prompt sets wanted, A,B, got {len(sets)}")
    first, second = (each.prompts for each in sets)
    prompts = [*first, *second, *first]
    names = [source.stem for source in args.workloads]
    starts = (0, len(first), len(first) + len(second))
    phases = tuple(zip((names[0], names[1], f"{names[0]} again"), starts, strict=True))
    loads = [closed(len(prompts), args.clients, max_tokens=args.max_tokens, length="free")]
    return _plan(args, prompts, loads, phases, sets)


def steady_plan(args: argparse.Namespace) -> SteadyPlan:
    names = _names(args)
    check_new_folder("--out", args.out)
    choice = _choice(args, num_servers=len(names) + len(args.accuracy_bounds) + len(args.llama_cpp))
    asked, sampling = prompt_set(args.prompts, args.num_prompts), _sampling(args)
    systems = _that_sample(systems_of(names, [], choice), sampling)
    systems += _llama_cpp(args, choice.model, asked.prompts, args.clients)
    _check_systems(args, systems)
    _check_turns(args, systems)
    given = {name: getattr(args, name) for name in ("clients", "turns", "turn_s", "settle_s", "max_tokens", "switch")}
    return SteadyPlan(
        choice=choice,
        systems=systems,
        baselines=baselines_of(args.baseline, systems, systems[0].name),
        prompts=asked.prompts,
        levels=args.clients,
        turns=args.turns,
        turn_s=args.turn_s,
        settle_s=args.settle_s,
        learn_s=args.learn_s,
        max_tokens=args.max_tokens,
        switch=args.switch,
        limit=args.limit,
        settings=given
        | {
            "model": model_name(choice.model),
            "num_prompts": len(asked.prompts),
            "systems": [system.name for system in systems],
            "options": option_flags(args),
        }
        | {"vllm_flags": redacted(args.vllm_flag), "tuning": choice.used.model_dump()}
        | {**_sampling_settings(sampling), **_labels([asked])}
        | _llama_cpp_settings(args)
        | _dtype_settings(args, choice)
        | _request_fields(systems),
        folder=_new_folder(args.out, fresh=args.fresh),
        start_timeout_s=args.start_timeout_s,
        sampling=sampling,
    )


def _check_systems(args: argparse.Namespace, systems: list[System]) -> None:
    """Raises ValueError for one that cannot be measured with so many clients."""
    check_names(systems)
    if problems := [system.problem for system in systems if system.problem]:
        raise ValueError(problems[0])
    for system in systems:
        if system.max_concurrency is not None and max(args.clients) > system.max_concurrency:
            raise ValueError(
                f"--systems: {system.name} works on {system.max_concurrency} request at a time: --clients 1 only"
            )


def _check_turns(args: argparse.Namespace, systems: list[System]) -> None:
    """Raises ValueError for what cannot be measured."""
    if args.max_tokens < 2:
        raise ValueError("--max-tokens: at least 2, as a single token has no time per output token, got 1")
    if not LEAST_TURN_S <= args.turn_s <= MOST_TURN_S:
        raise ValueError(f"--turn-s: {LEAST_TURN_S:g} to {MOST_TURN_S:g} s, got {args.turn_s:g}")
    if args.switch and (len(systems) != 1 or not systems[0].has_exits):
        named = ", ".join(system.name for system in systems)
        raise ValueError(f"--switch: --systems must name one system with exits, e.g. lossless, got {named}")
    if args.switch and args.baseline:
        raise ValueError("--switch compares a server with itself: no --baseline")
    if not args.switch and len(systems) < 2:
        raise ValueError(f"--systems must name two or more, e.g. {BASELINE},lossless, got {systems[0].name}")


def _new_folder(folder: Path, *, fresh: bool) -> Path:
    """Raises ValueError where it holds something else than what a measurement leaves that came to nothing; `fresh`
    allows for results of another one."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    results = folder / STEADY_RESULTS
    if held - {STEADY_RESULTS, "logs"} or (results.exists() and '"levels"' not in results.read_text()):
        raise ValueError(f"--out: {folder} holds something else: choose another --out")
    if results.exists() and not fresh:
        raise ValueError(f"--out: {folder} holds results: choose another --out, or give --fresh to throw them away")
    return folder


def _plan(
    args: argparse.Namespace,
    prompts: list[Prompt],
    loads: list[Load],
    phases: tuple[tuple[str, int], ...],
    sets: list[PromptSet],
) -> EvalPlan:
    names = _names(args)
    check_new_folder("--out", args.out)
    num_servers = len(names) + len(args.system) + len(args.accuracy_bounds) + len(args.llama_cpp)
    choice = _choice(args, num_servers=num_servers)
    sampling = _sampling(args)
    systems = _that_sample(systems_of(names, args.base_url, choice), sampling)
    systems += [_own_system(text, choice) for text in args.system]
    systems += _llama_cpp(args, choice.model, prompts, [load.concurrency for load in loads])
    check_names(systems)
    if not args.baseline and BASELINE not in (system.name for system in systems):
        raise ValueError(f"--systems must name {BASELINE}, which all others are compared with, or --baseline another")
    baselines = baselines_of(args.baseline, systems, BASELINE)
    return EvalPlan(
        choice=choice,
        systems=sorted(systems, key=lambda system: system.name != baselines[0]),
        baselines=baselines,
        prompts=prompts,
        loads=loads,
        settings=_settings(args, choice, systems, prompts, loads) | _labels(sets),
        folder=args.out,
        repeat=args.repeat,
        start_timeout_s=args.start_timeout_s,
        fresh=args.fresh,
        slo_ms=args.slo or {},
        sampling=sampling,
        phases=phases,
    )


def _choice(args: argparse.Namespace, *, num_servers: int) -> ModelChoice:
    """What all servers have in common. Raises ValueError for a value that is not allowed."""
    options_from(args)
    flags = tuple(server_flags(args.vllm_flag, num_servers))  # bad ones are found before a model is brought
    choice = ModelChoice(
        model=model_of(args, check_model),
        vllm_flags=flags,
        options=tuple(option_flags(args)),
        bounds=tuple(args.accuracy_bounds),
        hf_layer=getattr(args, "hf_layer", None),
        api_key=args.api_key,
    )
    return tuned(choice, kept_tuning_from(args))


def _names(args: argparse.Namespace) -> list[str]:
    return spelt_out([name.strip() for name in args.systems.split(",")])


def _sampling(args: argparse.Namespace) -> Sampling:
    """Greedy where the command does not ask."""
    temperature, seed = getattr(args, "temperature", 0.0), getattr(args, "sampling_seed", None)
    if seed is not None and not temperature:
        raise ValueError("--sampling-seed is about a --temperature above 0, and none is given")
    return Sampling(temperature, seed)


def _sampling_settings(sampling: Sampling) -> dict[str, float | int | None]:
    return {"temperature": sampling.temperature, "sampling_seed": sampling.seed}


def _that_sample(systems: list[System], sampling: Sampling) -> list[System]:
    if not sampling.temperature:
        return systems
    problem = f"it decodes greedily, so not at --temperature {sampling.temperature:g}"
    return [replace(system, problem=problem) if system.name in GREEDY_ONLY else system for system in systems]


def _own_system(text: str, choice: ModelChoice) -> System:
    name, _, flags = text.partition("=")
    options = [part for text in shlex.split(flags) for part in (text.split("=", 1) if text[:2] == "--" else [text])]
    if not name or not options or len(options) % 2:
        raise ValueError(f'--system: "NAME=--option value ..." wanted, got {text!r}')
    return early_exits(name, choice, *options)


def _llama_cpp(
    args: argparse.Namespace, model: Path, prompts: list[Prompt], concurrencies: Sequence[int | None]
) -> list[System]:
    if not args.llama_cpp:
        if args.llama_server is not None:
            raise ValueError("--llama-server is for --llama-cpp, and none is given")
        return []
    demand = demand_of(model, prompts, concurrencies, args.max_tokens)
    return llama_cpp_systems(args.llama_cpp, find_server(args.llama_server), demand, _sampling(args).temperature)


def _llama_cpp_settings(args: argparse.Namespace) -> dict[str, object]:
    given = getattr(args, "llama_cpp", [])
    return {"llama_cpp": given, "llama_server": version_of(find_server(args.llama_server))} if given else {}


def _request_fields(systems: list[System]) -> dict[str, object]:
    """What requests to some systems say besides."""
    fields = {system.name: dict(system.fields) for system in systems if system.fields}
    return {"request_fields": fields} if fields else {}


def _settings(
    args: argparse.Namespace, choice: ModelChoice, systems: list[System], prompts: list[Prompt], loads: list[Load]
) -> dict[str, object]:
    """What a run that goes on must share with the one that began."""
    asked = json.dumps([prompt.messages for prompt in prompts]).encode()
    return {
        "loads": [[load.name, load.fixed_length] for load in loads],
        "num_prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(asked).hexdigest()[:16],
        "arrivals_sha256": hashlib.sha256(repr(loads).encode()).hexdigest()[:16],
        "max_tokens": args.max_tokens,
        "repeat": args.repeat,
        "model": model_name(choice.model),
        "tuning": choice.used.model_dump(),
        "systems": [system.name for system in systems],
        "options": option_flags(args) + getattr(args, "system", []),
        "vllm_flags": redacted(args.vllm_flag),
        **_dtype_settings(args, choice),
        "hf_layer": getattr(args, "hf_layer", None),
        **_sampling_settings(_sampling(args)),
        **_llama_cpp_settings(args),
        **_request_fields(systems),
    }


def _dtype_settings(args: argparse.Namespace, choice: ModelChoice) -> dict[str, object]:
    """Where nobody asked for the one that servers have."""
    given = asked_dtype(normalised([part for text in args.vllm_flag for part in split_flag(text)]))
    taken = asked_dtype(normalised([*choice.vllm_flags]))
    return {} if taken == given else {"dtype": taken}


def _labels(sets: list[PromptSet]) -> dict[str, object]:
    """Which prompts they are, for all that shows results."""
    return {"prompts": {each.name: each.described() for each in sets}}


def server_flags(given: list[str], num_servers: int) -> list[str]:
    flags = [part for text in given for part in split_flag(text)]
    for name in SET_HERE:
        if given_value(one_spelling(flags), name) is not None:
            raise ValueError(f"--vllm-flag: --{name} is set by the evaluation itself")
    return flags + memory_flags(flags, num_servers=num_servers)


def name_of(config: EarlyExitConfig) -> str:
    if config.policy == "off":
        return "off"
    bound = "lossless" if config.accuracy_bound == 0 else f"{config.accuracy_bound:g}"
    if config.policy != "adaptive":
        return f"{config.policy} {bound}"
    return bound if bound == "lossless" else f"early-exit-{bound}"


def option_flags(args: argparse.Namespace) -> list[str]:
    """The options given on the command line, as flags."""
    named = {name: getattr(args, name, None) for name in (*EarlyExitConfig.model_fields, *OPTIONS)}
    given = new_options({name: value for name, value in named.items() if value is not None})
    return [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), value)]
