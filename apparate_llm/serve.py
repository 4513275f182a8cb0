"""`apparate-llm serve`: check everything cheap first, then hand over to vLLM's own `serve`."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apparate_llm.admin import KEY_VARIABLE, check_admin_keys, pass_on_admin_keys
from apparate_llm.config import ADDITIONAL_CONFIG_KEY, ConfigError, EarlyExitConfig
from apparate_llm.controller.state import NONE as NO_STATE
from apparate_llm.default_model import ARCHITECTURE as DEFAULT_ARCHITECTURE
from apparate_llm.default_model import NAME
from apparate_llm.engine.vllm_settings import DEFAULTS, SPECULATION, as_flags, memory_flags, own_options, settings_of
from apparate_llm.engine.vllm_start import start_vllm, vllm_parser
from apparate_llm.flags import Commands, OneLineParser, add_options, options_from
from apparate_llm.host.chosen import choose
from apparate_llm.host.dtype import asked_dtype, dtype_flags, dtype_line
from apparate_llm.host.limits import cpu_limits
from apparate_llm.host.options import Tuning, add_tuning, check_tuning, tuning_from
from apparate_llm.hub import Origin
from apparate_llm.launch import check_build, port_problem, reexec_with_libraries, vllm_build
from apparate_llm.machine import cache_folder, writable_cache
from apparate_llm.named_model import HELP, folder_here, model_folder
from apparate_llm.preflight import announce, load_format, preflight, preflight_config
from apparate_llm.quiet_log import log_of_engines
from apparate_llm.redact import redacted
from apparate_llm.serve_lines import NOTE, ServeLines, hides_log, log_file
from apparate_llm.vllm_flags import given_value, without
from apparate_llm.w8a8 import LOAD_FORMAT as QUANTISABLE_FORMAT
from apparate_llm.w8a8 import check_config, check_quantisable, int8_model

if TYPE_CHECKING:
    from apparate_llm.ramps.fitting import Fitting

NAMING_FLAGS = ("revision", "download-dir")  # of the model
ADDRESS_FLAGS = ("uds", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers")  # who asks how
NAMED_ELSEWHERE = ("tokenizer", "hf-config-path", "generation-config")  # vLLM may look for these on the hub
AS_STORED, INT8 = "bf16", "int8"  # weights to serve


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
    _add_help(parser)
    parser.add_argument("--model", metavar="MODEL", help=f"may stand first without --model: {HELP}")
    parser.add_argument(
        "--weights",
        choices=(AS_STORED, INT8),
        default=AS_STORED,
        help=f"{AS_STORED}: as they are stored; {INT8}: quantised (W8A8) once, into the cache folder, and served with "
        f"the same ramps: another model, nearly the same (default: {AS_STORED})",
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
        help="show vLLM's log on a terminal, and write no file; elsewhere it always is on stderr and stdout",
    )
    add_options(parser)
    add_tuning(parser)
    parser.set_defaults(run=run_serve)


def _add_help(parser: OneLineParser) -> None:
    """-h has our own flags, --help can tell of vLLM's as well."""
    parser.add_argument("-h", action="help", help="show this help and exit")
    parser.add_argument(
        "--help",
        nargs="?",
        action=Help,
        metavar="SECTION",
        help="the same; with =all or a section's name: vLLM's flags",
    )


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
    tuning = tuning_from(args)
    check_given(args, config, tuning, vllm_flags)
    model, architecture, fitting = model_here(args, config, vllm_flags)
    wanted, rest = settings_of(config, architecture, vllm_flags)  # what contradicts them is said before a download
    if given_value(rest, "uds") is None and (problem := port_problem(args.host or "", args.port)):
        raise ConfigError(problem)
    reexec_with_libraries()  # before anything heavy is imported
    lines: list[str] = []  # on what is started, and how
    if model is None or args.weights == INT8:
        model, names, lines = bring_model(args, model, config, vllm_flags)
        architecture, fitting = preflight(config, model, vllm_flags)
        wanted, rest = settings_of(config, architecture, vllm_flags)
        if given_value(rest, "served-model-name") is None:
            rest = [*rest, "--served-model-name", *names]
    announce(fitting)
    if asked_dtype(rest) == "auto":
        dtype = dtype_flags(model, rest)
        vllm_flags, rest = [*vllm_flags, *dtype], [*rest, *dtype]
        if line := dtype_line(model, rest):
            print(line, file=sys.stderr, flush=True)
    lines += use_machine(tuning, model, vllm_flags, config, wanted)
    return start(args, model, config, wanted, rest, lines)


def check_given(args: argparse.Namespace, config: EarlyExitConfig, tuning: Tuning, vllm_flags: list[str]) -> None:
    """All that can be checked without a model."""
    if config.policy != "off" or vllm_build() is None:
        check_build()
    check_files(config)
    check_tuning(tuning, cpu_limits(), vllm_flags, os.environ, config)
    if args.model is None and not (cache_folder() / NAME).is_dir():
        writable_cache()
    check_admin_keys(args.admin_key)


def model_here(
    args: argparse.Namespace, config: EarlyExitConfig, vllm_flags: list[str]
) -> "tuple[Path | None, str, Fitting | None]":
    """Folder, architecture and ramps of the model, as far as they can be known before anything is brought or made."""
    model = None if args.model is None else folder_here(args.model)
    if model is None:
        return None, DEFAULT_ARCHITECTURE, None
    if args.weights == INT8:
        check_quantisable(model)
        return model, preflight_config(config, model), None
    return model, *preflight(config, model, vllm_flags)


def start(
    args: argparse.Namespace,
    model: Path,
    config: EarlyExitConfig,
    wanted: dict[str, Any],
    rest: list[str],
    lines: list[str],
) -> int:
    """vLLM's server in this process. wanted: our settings of vLLM's; rest: its other flags; lines: on what is
    started, and how."""
    if SPECULATION in wanted:
        keep_state(wanted["additional_config"][ADDITIONAL_CONFIG_KEY])
    wanted["port"] = args.port
    if args.host not in (None, *DEFAULTS):
        wanted["host"] = args.host
    flags = [str(model), *as_flags(wanted), *rest, *memory_flags(rest)]
    if all(given_value(rest, name) is None for name in NAMED_ELSEWHERE):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is in the folder
    pass_on_admin_keys(args.admin_key)
    lines.append("Starting: vllm serve " + " ".join(map(quote, redacted(flags))))
    wanted["model_tag"] = str(model)
    shown = ServeLines(str(model), config, host=args.host, port=args.port, vllm_flags=rest)
    if hides_log(verbose=args.verbose, port=args.port, vllm_flags=rest):
        return start_quietly(lines, flags, wanted, shown)
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    return start_vllm(flags, wanted)


def start_quietly(lines: list[str], flags: list[str], wanted: Mapping[str, object], shown: ServeLines) -> int:
    """The same with vLLM's log in a file, `lines` at its beginning."""
    print(*shown.first(), sep="\n", file=sys.stderr, flush=True)
    with log_of_engines(log_file(shown.port), note=NOTE, beat=shown.beat) as console:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        code = start_vllm(flags, wanted)
        with suppress(OSError):  # the terminal is gone
            console.print("The server has ended.", highlight=False)
    return code


def bring_model(
    args: argparse.Namespace, here: Path | None, config: EarlyExitConfig, vllm_flags: list[str]
) -> tuple[Path, list[str], list[str]]:
    """Folder of a model that must be downloaded, converted or quantised first, the names that requests may call it by,
    and lines on it. here: its folder if that is there."""

    def check(folder: Path) -> None:
        preflight_config(config, folder)
        if args.weights == INT8:
            check_config(folder)

    model = here
    lines: list[str] = []
    if model is None:
        model = model_folder(args.model, origin_of(config, vllm_flags, args.weights), check)
        lines.append(f"{'Default model ' + NAME if args.model is None else 'Model ' + args.model}: using {model}")
    names = [NAME, str(model)] if args.model is None else [args.model.rstrip("/")]
    if args.weights == INT8:
        model = int8_model(model)
        lines.append(f"Int8 weights: using {model}")
    return model, names, lines


def origin_of(config: EarlyExitConfig, vllm_flags: list[str], weights: str = AS_STORED) -> Origin:
    """By vLLM's own flags."""
    token, wanted = given_value(vllm_flags, "hf-token"), load_format(vllm_flags)
    return Origin(
        revision=given_value(vllm_flags, "revision"),
        download_dir=given_value(vllm_flags, "download-dir"),
        hf_token=True if token is not None and (not token or token.startswith("--")) else token,  # it may stand alone
        load_format=QUANTISABLE_FORMAT if weights == INT8 and wanted == "auto" else wanted,
        with_exits=config.policy != "off" or weights == INT8,
    )


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
    flags = vllm_flags
    for name in (*NAMING_FLAGS, *ADDRESS_FLAGS):  # the folder is there by now, and servers that are measured have ports
        flags = without(flags, name)
    command += [f"--vllm-flag={flag}" for flag in flags]
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


def keep_state(options: dict[str, object]) -> None:
    """Without a place for what the controller learns, the server runs as well and begins anew at each start."""
    if options.get("controller_state") is None:
        try:
            writable_cache()
        except ConfigError as error:
            print(f"Note: what the controller learns is not kept: {error}", file=sys.stderr, flush=True)
            options["controller_state"] = NO_STATE


def quote(flag: str) -> str:
    import shlex

    return shlex.quote(flag)
