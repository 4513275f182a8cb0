"""llama.cpp's server as a system of an evaluation: its flags, and what requests to it say."""

import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from apparate_llm.eval.client import Fields
from apparate_llm.eval.prompt_lengths import tokenizer_of
from apparate_llm.eval.prompts import Prompt, text_of
from apparate_llm.eval.systems import System
from apparate_llm.host.limits import cpu_limits
from apparate_llm.launch import clean_environment

PROGRAM = "llama-server"
MAGIC = b"GGUF"
VERSION_TIMEOUT_S = 30.0
SET_HERE = ("-m", "--model", "--host", "--port", "--api-key", "--api-key-file", "--api-prefix")
THREADS = ("-t", "--threads")
SLOTS = ("-np", "--parallel")
CONTEXT = ("-c", "--ctx-size")  # tokens of all slots together
PROMPT_CACHE = ("-cram", "--cache-ram")  # MiB of prompts that have been answered
OPEN_LOOP_SLOTS = 16  # where requests arrive by time, and nobody knows how many at once
CONTEXT_STEP = 256  # a slot's context is a multiple of it
TEMPLATE_TOKENS, MESSAGE_TOKENS = 256, 16  # room for what a chat template adds


class Demand(NamedTuple):
    """What an evaluation will ask for."""

    num_slots: int  # requests at a time
    slot_tokens: int  # of the longest one, answer included


def llama_cpp_systems(given: Sequence[str], server: Path, demand: Demand, temperature: float = 0.0) -> list[System]:
    """Systems of `NAME=FILE.gguf FLAGS`. What the flags leave open is set so that llama.cpp has what the others have:
    all threads that may compute, a slot for each client and room in it, no prompt that was answered before. Raises
    ValueError."""
    return [_system(*_parsed(text), server, demand, temperature) for text in given]


def find_server(given: Path | None) -> Path:
    """Raises ValueError where there is none."""
    if given is None:
        path = shutil.which(PROGRAM)
        if path is None:
            raise ValueError(f"--llama-cpp: no {PROGRAM} on PATH: give --llama-server PATH")
        return Path(path)
    if not given.is_file() or not os.access(given, os.X_OK):
        raise ValueError(f"--llama-server: not a program that can be run: {given}")
    return given.absolute()  # a bare name would be looked for on PATH


def version_of(server: Path) -> str:
    """As it says itself. Raises ValueError where it cannot run."""
    try:
        done = subprocess.run(
            [server, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=VERSION_TIMEOUT_S,
            env=clean_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"--llama-server: {server} --version: {error}") from None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode or not lines:
        last_line = lines[-1] if lines else "nothing"
        raise ValueError(f"--llama-server: {server} --version ended with {done.returncode} and said: {last_line}")
    return next((line for line in lines if line.startswith("version")), lines[0])


def request_fields(temperature: float) -> Fields:
    """No tokens of an earlier prompt are taken over, and every chunk says how many tokens have come. Where tokens are
    drawn, they are drawn among all, as vLLM does unless it is told otherwise."""
    fields: dict[str, bool | int | float | str] = {"cache_prompt": False, "timings_per_token": True}
    if temperature > 0:
        fields |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return fields


def demand_of(model: Path, prompts: Sequence[Prompt], concurrencies: Sequence[int | None], max_tokens: int) -> Demand:
    """concurrencies: clients of each load, None where requests arrive by time."""
    num_slots = max(OPEN_LOOP_SLOTS if number is None else number for number in concurrencies)
    return Demand(num_slots, longest_prompt(model, prompts) + max_tokens)


def longest_prompt(model: Path, prompts: Sequence[Prompt]) -> int:
    """Tokens, and room for what a chat template adds. Without a tokenizer.json each byte counts as a token. Raises
    ValueError for a damaged one."""
    texts = ["\n".join(map(text_of, prompt.messages)) for prompt in prompts]
    if (tokenizer := tokenizer_of(model)) is not None:
        lengths = [len(encoded.ids) for encoded in tokenizer.encode_batch(texts)]
    else:
        lengths = [len(text.encode()) for text in texts]
    added = [MESSAGE_TOKENS * len(prompt.messages) + TEMPLATE_TOKENS for prompt in prompts]
    return max(map(sum, zip(lengths, added, strict=True)))


def _parsed(text: str) -> tuple[str, str, list[str]]:
    """Name, file, flags."""
    name, _, rest = text.partition("=")
    try:
        file, *flags = shlex.split(rest)
    except ValueError as error:
        wrong = f": {error}" if rest.strip() else ""
        raise ValueError(f'--llama-cpp: "NAME=FILE.gguf FLAGS" wanted, got {text!r}{wrong}') from None
    if not name or "/" in name:
        raise ValueError(f'--llama-cpp: "NAME=FILE.gguf FLAGS" wanted, the name without a slash, got {text!r}')
    for flag in map(_spelt, flags):
        if flag in SET_HERE:
            raise ValueError(f"--llama-cpp {name}: {flag} is set by the evaluation itself")
    return name, file, flags


def _system(name: str, file: str, flags: list[str], server: Path, demand: Demand, temperature: float) -> System:
    try:
        with open(file, "rb") as model:
            begins = model.read(len(MAGIC))
    except OSError as error:
        raise ValueError(f"--llama-cpp {name}: cannot read {file}: {error.strerror}") from None
    if begins != MAGIC:
        raise ValueError(f"--llama-cpp {name}: {file} is not a GGUF file")
    command = (str(server), "-m", file, *flags, *_left_open(flags, demand))
    return System(name, command, fields=request_fields(temperature), is_foreign=True, prefix_cache="none")


def _left_open(flags: list[str], demand: Demand) -> list[str]:
    """Settings that the flags do not have."""
    slot_tokens = CONTEXT_STEP * math.ceil(demand.slot_tokens / CONTEXT_STEP)
    num_slots = _number(flags, SLOTS) or demand.num_slots
    settings = {
        THREADS: cpu_limits().logical_threads,
        SLOTS: num_slots,
        CONTEXT: num_slots * slot_tokens,
        PROMPT_CACHE: 0,
    }
    given = {_spelt(flag) for flag in flags}
    return [part for names, value in settings.items() if not given & {*names} for part in (names[1], str(value))]


def _number(flags: list[str], names: tuple[str, ...]) -> int | None:
    """The value of a flag, the last one counts; None where it is not there, or says that llama.cpp should choose."""
    values = [value for flag, value in pairwise(flags) if _spelt(flag) in names]
    return int(values[-1]) if values and values[-1].isdecimal() else None


def _spelt(flag: str) -> str:
    """llama.cpp takes both dashes and underscores."""
    return flag.replace("_", "-") if flag.startswith("--") else flag
