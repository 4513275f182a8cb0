#!/usr/bin/env python3
"""One engine step, line by line: python -m scripts.profile_step [--model DIR] [--batch 1,4] [--json FILE]

From the repository's root. Runs plain vLLM, our server without exits (`off`) and exits in this process, without a
server, on the built-in prompts: what each part of a step takes by itself (the parts it calls taken off), per step, and
the least it could take: the bytes it must read over the bandwidth measured beside it. What a client sees on top of that
(processes, HTTP) is `eval`'s.
"""

import argparse
import json
import math
import multiprocessing
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from apparate_llm.launch import reexec_with_libraries
from apparate_llm.machine import machine
from apparate_llm.named_model import model_folder
from apparate_llm.ramps.fingerprint import weight_files

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    from tests.harness import Engine

WARM_TOKENS = 64
MAX_PROMPT_TOKENS = 1024
BANDWIDTH_BYTES = 256 << 20
DRAFTING = "draft steps: "
THRESHOLD = 0.5  # of exits at a given depth


@dataclass
class Profile:
    """Exclusive times of wrapped functions, by line."""

    ms: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    running: bool = False
    _inner: list[float] = field(default_factory=lambda: [0.0])  # time of wrapped functions called, by depth of the call

    def wrap(self, owner: Any, name: str, line: str) -> None:
        setattr(owner, name, self.timed(getattr(owner, name), line))

    def timed(self, function: Callable[..., Any], line: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.running:
                return function(*args, **kwargs)
            self._inner.append(0.0)
            began = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = (perf_counter() - began) * 1e3
                self.ms[line] += took - self._inner.pop()
                self.calls[line] += 1
                self._inner[-1] += took

        return timed


def instrument(engine: "Engine", profile: Profile) -> None:
    """All parts of a step, in the order they run."""
    runner, scheduler = engine.runner, engine.scheduler
    profile.wrap(engine.llm.llm_engine, "step", "engine: rest")
    profile.wrap(engine.llm.llm_engine.output_processor, "process_outputs", "engine: detokenise")
    profile.wrap(scheduler, "schedule", "scheduler: schedule")
    profile.wrap(scheduler, "update_from_output", "scheduler: take output")
    for name, line in {
        "execute_model": "worker: rest",
        "sample_tokens": "worker: rest",
        "_update_states": "worker: batch state",
        "_prepare_inputs": "worker: inputs",
        "_build_attention_metadata": "worker: attention metadata",
        "_model_forward": "worker: blocks",
        "_sample": "worker: sampling",
        "_bookkeeping_sync": "worker: bookkeeping",
    }.items():
        profile.wrap(runner, name, line)
    profile.wrap(runner.model, "compute_logits", "worker: lm_head")
    if engine.has_exits:
        instrument_exits(engine, profile)


def instrument_exits(engine: "Engine", profile: Profile) -> None:
    """Verdicts, the controller and draft steps."""
    from apparate_llm.controller.policy import Policy
    from apparate_llm.engine import shallow_pass

    runner = engine.runner
    for name in ("verify_released", "verify_held"):
        profile.wrap(runner.step, name, "verdicts")
    profile.wrap(runner, "propose_draft_token_ids", DRAFTING + "requests, commit")
    profile.wrap(runner.step, "learn", "controller")
    drafter = runner.exit_drafter
    assert drafter is not None, "exits are off"
    for name in (name for name in vars(Policy) if not name.startswith("_")):
        if callable(getattr(drafter.policy, name)):
            profile.wrap(type(drafter.policy), name, "controller")
    profile.wrap(runner.shadow, "maybe_run", DRAFTING + "shadow")
    profile.wrap(drafter, "run", DRAFTING + "rest")
    profile.wrap(drafter, "predict", DRAFTING + "rest")
    profile.wrap(drafter, "_proposals", DRAFTING + "lookup feature")
    profile.wrap(drafter.model, "states", DRAFTING + "embedding, blocks")
    profile.wrap(shallow_pass, "attention_of_rows", DRAFTING + "attention metadata")
    for ramps in drafter.ramp_sets.values():
        profile.wrap(ramps.head, "enter", DRAFTING + "first state")
        profile.wrap(ramps.head, "forward", DRAFTING + "head")
        profile.wrap(ramps, "predict", DRAFTING + "token, confidence")


def bytes_read(engine: "Engine", model: Path, bytes_per_weight: int) -> dict[str, float]:
    """Line -> bytes of weights that each of its calls reads."""
    from safetensors import safe_open
    from torch import nn

    size: dict[str, int] = {}
    for path in weight_files(model):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                size[name] = bytes_per_weight * math.prod(file.get_slice(name).get_shape())
    head = next(size[name] for name in ("lm_head.weight", "model.embed_tokens.weight") if name in size)
    read: dict[str, float] = {"worker: lm_head": head}
    read["worker: blocks"] = sum(value for name, value in size.items() if ".layers." in name)
    if engine.has_exits:
        assert engine.runner.exit_drafter is not None, "exits are off"
        ramps: nn.Module = engine.runner.exit_drafter.ramps
        children = ramps.get_submodule("head").named_children()
        parts: dict[str, int] = {
            name: vars(part)["weight_bytes"] for name, part in children if hasattr(part, "weight_bytes")
        }
        read[DRAFTING + "first state"] = parts.pop("enter_linear", 0)
        read[DRAFTING + "head"] = sum(parts.values())
    return read


def bandwidth() -> float:
    """Bytes per ms that the threads of this process read, best of several."""
    import torch

    data = torch.ones(BANDWIDTH_BYTES // 4)
    times = []
    for _ in range(5):
        began = perf_counter()
        data.sum()
        times.append(perf_counter() - began)
    return BANDWIDTH_BYTES / min(times) / 1e3


def options_of(system: str, args: argparse.Namespace) -> dict[str, object] | None:
    """Of early exits; None: plain vLLM."""
    if system == "plain":
        return None
    if system == "off":
        return {"policy": "off"}
    options = {"policy": "adaptive", "accuracy_bound": 0.0 if system == "lossless" else args.bound, "max_exits": 6}
    if args.depth is not None:
        options |= {"policy": "static", "depth": args.depth, "threshold": THRESHOLD}
    return options


class Ran(NamedTuple):
    """A batch of requests, from behind their first tokens to their last."""

    steps: int
    tokens: int
    ms: float


def run_batch(engine: "Engine", profile: Profile, prompts: "dict[str, TokensPrompt]", params: "SamplingParams") -> Ran:
    """prompts: by request."""
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, params)
    answers = engine.step()  # the prompts
    steps = 0
    profile.running, began = True, perf_counter()
    while engine.llm.llm_engine.has_unfinished_requests():
        answers |= engine.step()
        steps += 1
    profile.running = False
    ms = (perf_counter() - began) * 1e3
    engine.idle()
    return Ran(steps, sum(len(answer) - 1 for answer in answers.values()), ms)


def measure(system: str, batch: int, args: argparse.Namespace, queue: Any) -> None:
    """In a process of its own: put what was measured on the queue."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # as a server's worker is bound
    from apparate_llm.eval.prompts import load_prompts
    from tests import conftest  # noqa: F401 - sets vLLM's environment before it is imported
    from tests.harness import Engine, greedy

    vllm: dict[str, Any] = {"dtype": args.dtype, "enforce_eager": False, "max_model_len": 2048, "max_num_seqs": 64}
    with Engine(args.model, options_of(system, args), kv_cache_memory_bytes=1 << 30, **vllm) as engine:
        texts = [engine.chat_prompt(prompt.messages) for prompt in load_prompts(args.prompts)]
        fitting = [text for text in texts if len(text["prompt_token_ids"]) < MAX_PROMPT_TOKENS]
        prompts = fitting[: args.num_prompts]
        engine.generate(prompts[:batch], greedy(WARM_TOKENS))
        profile = Profile()
        instrument(engine, profile)
        named = {f"profiled-{index}": prompt for index, prompt in enumerate(prompts)}
        full = len(prompts) // batch * batch
        batches = [dict(islice(named.items(), first, first + batch)) for first in range(0, full, batch)]
        ran = [run_batch(engine, profile, one, greedy(args.max_tokens)) for one in batches]
        steps = sum(done.steps for done in ran)
        queue.put(
            {
                "system": system,
                "batch": batch,
                "steps": steps,
                "tokens": sum(done.tokens for done in ran),
                "step_ms": sum(done.ms for done in ran) / steps,
                "lines": {
                    line: {"ms": ms / steps, "calls": profile.calls[line] / steps} for line, ms in profile.ms.items()
                },
                "bytes_per_call": bytes_read(engine, args.model, 4 if args.dtype == "float32" else 2),
                "bytes_per_ms": bandwidth(),
            }
        )


def show(results: list[dict[str, Any]]) -> None:
    """One table per batch size, a column per system."""
    for batch in sorted({result["batch"] for result in results}):
        columns = [result for result in results if result["batch"] == batch]
        print(f"\nbatch {batch}; ms per step (calls), and the floor: bytes read / measured bandwidth")
        print("| line | " + " | ".join(f"{c['system']} | floor" for c in columns) + " |")
        print("|---" * (1 + 2 * len(columns)) + "|")
        for line in sorted({line for c in columns for line in c["lines"]}):
            cells = []
            for c in columns:
                item = c["lines"].get(line)
                read = c["bytes_per_call"].get(line)
                cells.append(f"{item['ms']:.3f} ({item['calls']:.2g})" if item else "")
                cells.append(f"{item['calls'] * read / c['bytes_per_ms']:.2f}" if item and read else "")
            print(f"| {line} | " + " | ".join(cells) + " |")
        print("| a step | " + " | ".join(f"{c['step_ms']:.2f} | " for c in columns) + "|")
        print("| tokens per step | " + " | ".join(f"{c['tokens'] / c['steps']:.2f} | " for c in columns) + "|")
        per_token = [c["step_ms"] * c["steps"] / c["tokens"] * batch for c in columns]
        print("| ms per token of a request | " + " | ".join(f"{value:.2f} | " for value in per_token) + "|")
        print("| GB/s | " + " | ".join(f"{c['bytes_per_ms'] / 1e6:.1f} | " for c in columns) + "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder (default: that of `serve`)")
    parser.add_argument("--batch", default="1", help="comma-separated numbers of requests at once")
    parser.add_argument("--systems", default="plain,lossless,early-exit")
    parser.add_argument("--bound", type=float, default=0.05, help="of `early-exit`")
    parser.add_argument(
        "--depth", type=int, help=f"all exits at this depth, by policy static with threshold {THRESHOLD}"
    )
    parser.add_argument("--threads", type=int, default=1, help="that compute, each on a core (default: 1)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=Path, default=Path("chat"), help="built-in set or file")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    reexec_with_libraries()
    args.model = model_folder(args.model)
    context = multiprocessing.get_context("spawn")
    results = []
    for batch in map(int, args.batch.split(",")):
        for system in args.systems.split(","):
            queue = context.Queue()
            process = context.Process(target=measure, args=(system, batch, args, queue))
            process.start()
            results.append(queue.get(timeout=3600))
            process.join()
    show(results)
    if args.json:
        command = shlex.join(["python", "-m", "scripts.profile_step", *sys.argv[1:]])
        document = {"command": command, "machine": machine(), "model": args.model.name, "results": results}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
