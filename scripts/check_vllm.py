#!/usr/bin/env python3
"""What of vLLM's that we patch or override has changed since it was read: docs/bump-vllm.md.

    python -m scripts.check_vllm

A line for each function, method and class: alike, changed (with its new hash, and where it is) or gone. Exit code 1 if
any is not alike.
"""

import argparse
import inspect
from collections.abc import Iterator, Sequence

from apparate_llm.patches.guard import VLLM_VERSION, PatchMismatchError, named, source_sha256
from apparate_llm.patches.ledger import LEDGER
from apparate_llm.patches.overrides import OVERRIDES


def targets() -> Iterator[tuple[str, str, str]]:
    """(vLLM's name, hash of its source as it was read, where we rely on it)."""
    for patch in LEDGER:
        yield patch.target, patch.source_sha256, f"patches/{patch.file}.py"
    for entry in OVERRIDES:
        for name, sha256 in entry.sha256.items():
            yield f"{entry.theirs}.{name}", sha256, entry.ours


def finding(target: str, expected: str) -> str:
    try:
        resolved = named(target)
    except PatchMismatchError:
        return "gone"
    if (sha256 := source_sha256(resolved)) == expected:
        return "alike"
    file, line = inspect.getsourcefile(inspect.unwrap(resolved)), inspect.getsourcelines(inspect.unwrap(resolved))[1]
    return f"changed: {sha256} in {file}:{line}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    from vllm import __version__

    print(f"read in vLLM {VLLM_VERSION}, installed {__version__}")
    findings = [(target, ours, finding(target, expected)) for target, expected, ours in targets()]
    for target, ours, text in findings:
        print(f"{target}\n    for {ours}: {text}")
    different = sum(text != "alike" for _, _, text in findings)
    print(f"{len(findings) - different} alike, {different} to read again")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
