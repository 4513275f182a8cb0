"""The machine we are on."""

import os
import platform
from pathlib import Path


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """`$APPARATE_CACHE`, else `$XDG_CACHE_HOME/apparate-llm`, else `~/.cache/apparate-llm`."""
    if chosen := os.environ.get("APPARATE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apparate-llm"
