"""Stage profile: what passes, prompts and draft steps of each depth cost on this machine, in ms.

Measured in a process of its own that is set up like a server's, so that the threads and libraries are those of serving.
What was measured stays on disk, size by size, and is not measured again by a run that goes on.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from apparate_llm.files import private_opener
from apparate_llm.host.choice import HUGE_PAGES
from apparate_llm.prepare.records import Profiled
from apparate_llm.prepare.servers import used_by_servers
from apparate_llm.prepare.timings import FEWEST_STEPS, WARM_UP, Measurements, kept_in, times_ms

BATCH_SIZES = (1, 4, 16, 2, 8, 32)  # the first ones always, the others while there is time
FEWEST_SIZES = 2
PLAIN_SIZES = 3  # of them
PLAIN_SHARE = 0.04  # of the time left, at most, for plain passes of one size
SIZE_S = 60.0  # of one size, with fewer steps where a pass takes long: what is not kept yet is lost with a kill
HELD = (1, 3, 7)  # exits checked per request, in passes of at most
MOST_ROWS = 64
PROMPTS = (32, 128, 512)  # tokens
TURNS = 3  # over all sizes, so that a machine that is slower for a while is slower for all
STEPS = 12  # of each kind and turn
BATCHED_TOKENS = 1024  # of a pass at most: while it starts, the engine reads as many, by itself four times these
PROMPT_TOKENS = 64
MAX_TOKENS = 400
BLOCK_TOKENS = 128  # of a KV cache's block at most, whatever the backend
BLOCKS_OF_REQUEST = -(-(PROMPT_TOKENS + MAX_TOKENS + max(HELD)) // BLOCK_TOKENS)
KV_CACHE_TOKENS = (max(BATCH_SIZES) + 2) * BLOCKS_OF_REQUEST * BLOCK_TOKENS  # all at once, and some to spare
THREADS_SET = "APPARATE_PROFILE_THREADS"


def profile(
    model: Path,
    ramps: Path,
    depths: tuple[int, ...],
    *,
    enforce_eager: bool,
    limit_s: float,
    log: Path | None = None,
    keep: Path | None = None,
    on_progress: Callable[[float, str], None] = lambda done, text: None,
) -> Profiled:
    """What a server pays in ms, medians of the quietest of TURNS turns:

    `verify_ms`: requests -> an engine step without draft steps, one row per request; `pass_ms`: requests -> rows ->
    the same with held exits to check; `plain_frac`: how much longer plain vLLM's pass takes, whose head is not screened
    and whose weights may be in small pages; `prompt_ms`: tokens -> a step that reads a prompt; `draft_step_ms`: depth
    -> requests -> one draft step; `error_frac`: of each kind, by how much of itself a median may be off (95 %).
    `threads` compute, as many as in a server.

    limit_s: for measuring, beside what the model takes to start; less where two turns agree, and with fewer sizes and
    steps for a slow model. log: what the engine prints. keep: file of what is measured so far; what it holds counts,
    the time included. Raises RuntimeError if it fails, ValueError where `keep` is damaged.
    """
    if keep:
        kept_in(keep)  # what is damaged is told here, in one line
    arguments = [str(model), str(ramps), ",".join(map(str, depths)), str(limit_s)]
    arguments += ["--eager"] if enforce_eager else []
    arguments += ["--keep", str(keep)] if keep else []
    with open(log or os.devnull, "a+", opener=private_opener) as file:
        began = file.tell()
        result, code = _result_of(_started(model, arguments, file), on_progress)
        if result is None:
            file.seek(began)
            output = file.read()[-2000:].strip() if log else ""
            raise RuntimeError(f"profile failed with exit code {code}" + (f", see {log}: {output}" if output else ""))
    return result


def _started(model: Path, arguments: list[str], log: IO[str]) -> "subprocess.Popen[str]":
    """The process that measures, with a server's threads and libraries."""
    chosen = used_by_servers(model)
    return subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.PIPE,  # its end tells the child that this process has died
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**chosen.given, **chosen.environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
    )


def _result_of(
    process: "subprocess.Popen[str]", on_progress: Callable[[float, str], None]
) -> tuple[Profiled | None, int]:
    stdout: IO[str] | None = process.stdout
    assert stdout is not None
    result: Profiled | None = None
    try:
        for line in stdout:
            if line.startswith("{"):
                message = json.loads(line)
                result = message.get("result", result)
                if "done" in message:
                    on_progress(message["done"], message["text"])
    finally:
        if process.poll() is None and result is None:
            process.kill()
        code = process.wait()
    return result, code


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("ramps", type=Path)
    parser.add_argument("depths")
    parser.add_argument("limit_s", type=float)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    _begin_with_a_workers_threads()
    depths = [int(depth) for depth in args.depths.split(",")]
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch

    profiler = Profiler(args.model, args.ramps, depths, eager=args.eager)
    measured = Measurements(args.limit_s, keep=args.keep)
    profiler.run(measured)
    result: Profiled = {**measured.result(depths), "threads": torch.get_num_threads()}
    print(json.dumps({"result": result}), flush=True)
    os._exit(0)  # nothing here needs vLLM's tidy end


def _begin_with_a_workers_threads() -> None:
    """Start this process anew with the threads, and on the cores, that vLLM gives a server's worker: a library that is
    loaded reads them once. vLLM gives none to an engine that runs in the process it is called from."""
    if THREADS_SET in os.environ:
        return
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    parallel = SimpleNamespace(local_world_size=1, data_parallel_rank_local=None, _api_process_count=1)
    config: Any = SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)
    os.environ[THREADS_SET] = "1"
    with suppress(RuntimeError, AssertionError), OMPProcessManager(config).configure_omp_envs(0, 0):
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]])


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


class Profiler:
    def __init__(self, model: Path, ramps: Path, depths: list[int], *, eager: bool) -> None:
        from vllm import LLM

        from apparate_llm.config import parse_config
        from apparate_llm.engine.vllm_args import vllm_args
        from apparate_llm.host.dtype import dtype_of
        from apparate_llm.models.architectures import architecture_of
        from apparate_llm.prepare.engine import context_length, kv_bytes_per_token, runner_of

        # Static with these thresholds holds every exit, as many as `max_exits` says.
        options = {"ramps": str(ramps), "policy": "static", "controller_state": "none", "accuracy_bound": 0.0}
        # The weights go to huge pages when plain vLLM's passes are measured.
        config = parse_config({**options, "hold_threshold": 0.0, "max_batch_tokens": 65536, "huge_pages": False})
        self.longest = min(max(PROMPTS) + PROMPT_TOKENS + MAX_TOKENS, context_length(model))
        self.prompt_tokens = min(PROMPT_TOKENS, self.longest // 4)
        self.free_tokens = min(MAX_TOKENS, self.longest - self.prompt_tokens) - 2  # tokens that a request can generate
        self.llm = LLM(
            str(model),
            **vllm_args(config, architecture_of(model)) | {"dtype": dtype_of(model)},
            max_model_len=self.longest,
            max_num_seqs=max(BATCH_SIZES),
            max_num_batched_tokens=BATCHED_TOKENS,
            kv_cache_memory_bytes=KV_CACHE_TOKENS * kv_bytes_per_token(model),
            enable_prefix_caching=False,
            enforce_eager=eager,
        )
        self.engine = self.llm.llm_engine
        self.runner = runner_of(self.llm)
        self.drafter = self.runner.exit_drafter
        self.vocab = self.runner.model_config.get_vocab_size()
        self.depths = depths
        for depth in depths:
            self.drafter.model.compile(depth)
        self._number = 0
        self.pass_ms = 0.0  # the last one known
        self.plain_ms: dict[int, list[float]] = {}  # by size, of this start
        self.has_plain_pages = os.environ.get(HUGE_PAGES) == "1"  # plain vLLM's weights are in huge pages as well

    def run(self, measured: Measurements) -> None:
        """Turn by turn over the sizes that are not known yet; some are left out, and steps, when there is no time. The
        first sizes come before all but plain passes, which have to be first."""
        self.plain_ms = self._plain(measured)
        for turn in range(TURNS):
            sizes = BATCH_SIZES[: measured.num_sizes][:: 1 if turn % 2 == 0 else -1]
            first = min(FEWEST_SIZES, len(sizes)) if turn == 0 else 0
            self._sizes(measured, turn, sizes, range(first))
            self._prompts(measured, turn)
            self._sizes(measured, turn, sizes, range(first, len(sizes)))

    def _sizes(self, measured: Measurements, turn: int, sizes: tuple[int, ...], places: range) -> None:
        for place in places:
            if not self._is_due(measured, turn, size := sizes[place]):
                continue
            done_frac, before_s = (turn + place / len(sizes)) / TURNS, measured.spent_s
            print(json.dumps({"done": done_frac, "text": f"{size} at once"}), flush=True)
            self._size(measured, size, self._steps_in(measured))
            self.pass_ms = measured.of("verify", size)
            if not turn:
                if size in self.plain_ms:
                    measured.add_plain(size, self.plain_ms[size])
                if (measured.spent_s - before_s) * TURNS > measured.left_s:  # a larger one would take longer
                    measured.num_sizes = max(FEWEST_SIZES, place + 1)
            measured.keep()

    def _is_due(self, measured: Measurements, turn: int, size: int) -> bool:
        place = BATCH_SIZES.index(size)
        if measured.num_sizes is not None and place >= measured.num_sizes:
            return False
        if measured.left_s <= 0 and (turn or place >= FEWEST_SIZES):
            return False
        return not measured.has(turn, "verify", size) and not (turn and measured.size_is_known(size))

    def _steps_in(self, measured: Measurements) -> int:
        """Of each kind: the first sizes are to fit in what is left, by what a pass takes."""
        size_s = min(SIZE_S, measured.left_s / FEWEST_SIZES)
        passes = len(HELD) + len(self.depths)
        return int(min(STEPS, max(FEWEST_STEPS, size_s * 1e3 / max(1e-6, self.pass_ms) / passes - WARM_UP)))

    # ---- what is measured

    def _plain(self, measured: Measurements) -> dict[int, list[float]]:
        """ms by size, of those whose first turn is still to come; as many as leave time for that. Then the weights go
        to huge pages, for good. Where plain vLLM's weights are there as well, its passes have turns like all others,
        and this only says how long a pass is."""
        from apparate_llm.engine.huge_pages import use_huge_pages

        if self.has_plain_pages and (moving := use_huge_pages()):
            moving.join()
        plain_ms: dict[int, list[float]] = {}
        for size in BATCH_SIZES[: 1 if self.has_plain_pages else PLAIN_SIZES]:
            if not self._is_due(measured, 0, size):
                continue
            most_s, before_s = PLAIN_SHARE * measured.left_s, measured.spent_s
            names = self._begin(size)
            plain_ms[size] = self._plain_ms(STEPS, most_s)
            self._end(names)
            self.pass_ms = max(plain_ms[size])
            if measured.spent_s - before_s > most_s:
                break
        if moving := use_huge_pages():
            moving.join()
        return {} if self.has_plain_pages else plain_ms

    def _size(self, measured: Measurements, size: int, steps: int) -> None:
        names, left = self._begin(size), self.free_tokens
        if self.has_plain_pages and size in BATCH_SIZES[:PLAIN_SIZES]:
            measured.add(("plain", size), self._plain_ms(steps))
            left -= WARM_UP + steps
            if WARM_UP + steps > left:
                self._end(names)
                names, left = self._begin(size), self.free_tokens
        with self._without_drafting():
            measured.add(("verify", size), times_ms(self.engine.step, self._steps(1, steps)))
        left -= WARM_UP + steps
        for depth in self.depths:
            self.drafter.policy.depth = depth
            drafting_ms: list[float] = []
            for held in _held(size) if depth == self.depths[0] else HELD[:1]:
                if drafting_ms and measured.left_s <= 0:
                    break
                most = (WARM_UP + steps) * (1 + held)  # tokens, if all exits are right
                if most > left:
                    self._end(names)
                    names, left = self._begin(size), self.free_tokens
                passes_ms, spent_ms = self._held_ms(size, held, self._steps(1 + held, steps))
                left -= most
                drafting_ms += spent_ms
                measured.add(("pass", size, size * (1 + held)), passes_ms)
            measured.add(("draft_step", depth, size), drafting_ms)
            if self.runner.safety.num_failures or not drafting_ms:
                raise RuntimeError(f"draft steps at depth {depth} with {size} requests do not run")
        self._end(names)

    def _plain_ms(self, steps: int, most_s: float = math.inf) -> list[float]:
        """Without drafting, and with the whole head."""
        screened, self.runner.screened_head = self.runner.screened_head, None
        with self._without_drafting():
            spent = times_ms(self.engine.step, self._steps(1, steps), most_s)
        self.runner.screened_head = screened
        return spent

    def _steps(self, tokens: int, steps: int) -> int:
        """As many as new requests have room for, with so many tokens each."""
        return max(1, min(steps, self.free_tokens // tokens - WARM_UP))

    def _prompts(self, measured: Measurements, turn: int) -> None:
        for tokens, before in zip(PROMPTS, (None, *PROMPTS), strict=False):
            is_done = measured.has(turn, "prompt", tokens) or measured.is_known("prompt", tokens)
            if tokens + 2 > self.longest or is_done or not self._prompt_fits(measured, tokens, before):
                continue
            spent: list[float] = []
            while len(spent) < 1 + FEWEST_STEPS and (len(spent) < 2 or measured.left_s > 0):
                with self._without_drafting():
                    names = self._add(1, tokens)
                    began = time.perf_counter()
                    self.engine.step()
                    spent.append((time.perf_counter() - began) * 1e3)
                self._end(names)
            measured.add(("prompt", tokens), spent[1:])
            measured.keep()

    def _prompt_fits(self, measured: Measurements, tokens: int, before: int | None) -> bool:
        """By the length before, as each token of it took."""
        if before is None:
            return measured.left_s > 0
        if not measured.has(0, "prompt", before):
            return False
        return measured.of("prompt", before) * tokens / before * (1 + FEWEST_STEPS) <= 1e3 * measured.left_s

    def _held_ms(self, size: int, held: int, steps: int) -> tuple[list[float], list[float]]:
        """Steps that check `held` exits of every request, less their draft steps; and those, of all requests."""
        passes_ms: list[float] = []
        drafting_ms: list[float] = []
        spent: list[tuple[int, float]] = []
        original, self.drafter.max_exits = self.drafter.run, held

        def run(*args: object) -> list[tuple[int, float]]:
            spent.extend(original(*args))
            return spent

        self.drafter.run = run
        try:
            for number in range(WARM_UP + steps):
                spent.clear()
                before = self._checked()
                began = time.perf_counter()
                self.engine.step()
                took_ms = (time.perf_counter() - began) * 1e3 - sum(ms for _, ms in spent)
                if number >= WARM_UP and self._checked() - before == size * held:
                    passes_ms.append(took_ms)
                    drafting_ms += [ms for rows, ms in spent if rows == size]
        finally:
            self.drafter.run = original
            self.drafter.max_exits = self.runner.num_spec_tokens
        return passes_ms, drafting_ms

    def _checked(self) -> int:
        return int(self.runner.ledger.counts.held)

    # ---- requests

    def _begin(self, size: int) -> list[str]:
        """Requests that all generate."""
        from apparate_llm.engine.batch import batch_of

        with self._without_drafting():
            names = self._add(size, self.prompt_tokens)
            while (batch := batch_of(self.runner)).num_requests < size or batch.num_tokens.min() <= self.prompt_tokens:
                self.engine.step()
        return names

    def _end(self, names: list[str]) -> None:
        self.engine.abort_request(names)
        self.engine.step()

    def _add(self, size: int, tokens: int) -> list[str]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=min(MAX_TOKENS, self.longest - tokens), ignore_eos=True)
        names = []
        for i in range(size):
            self._number += 1
            names.append(f"{self._number}")
            ids = [(7 + 13 * i + 5 * j + self._number) % self.vocab for j in range(tokens)]
            self.engine.add_request(names[-1], {"prompt_token_ids": ids}, params)
        return names

    @contextmanager
    def _without_drafting(self) -> Iterator[None]:
        drafter, self.runner.exit_drafter = self.runner.exit_drafter, None
        try:
            yield
        finally:
            self.runner.exit_drafter = drafter


def _held(size: int) -> list[int]:
    return [held for held in HELD if size * (1 + held) <= MOST_ROWS]


if __name__ == "__main__":
    main()
