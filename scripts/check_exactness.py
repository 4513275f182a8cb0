#!/usr/bin/env python3
"""Exactness on a real model: greedy, lossless exits against plain vLLM, token by token.

    python -m scripts.check_exactness --model DIR --json exactness.json [--prompts FILE] [--num-prompts 40]
    python -m scripts.check_exactness --model DIR --json exactness.json --dtype bfloat16

From the repository's root. Runs plain vLLM one request at a time and eight at a time, then the same with exits, then
with exits under prefix caching, 64-token chunks, forced preemption and aborts of other requests. About half an hour on
two cores for a 135M model.

In float32 each run is held against plain vLLM's with as many requests at a time. In bfloat16, compiled, all are held
against one: `--policy off` with one request at a time, so that the load makes no difference either; plain vLLM's own
runs, which it does make a difference to, are shown beside. Exit code 1 if any token differs.
"""

import argparse
import json
import multiprocessing
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apparate_llm.eval.prompts import Messages
from tests import conftest  # noqa: F401 - sets vLLM's environment before it is imported

if TYPE_CHECKING:
    from multiprocessing import Queue

    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.v1.core.sched.output import SchedulerOutput

    from tests.harness import Engine

SYSTEM = (
    "You are a careful assistant. Answer the question that is asked, in the language it is asked in. Give the answer "
    "first and the reasons after it. Use short sentences and plain words. When a calculation is needed, show every "
    "step of it and check the result at the end. When you write code, write the whole function and explain it in one "
    "sentence. When you do not know something, say so and say what would help to find out. Never invent names, "
    "numbers or sources. If a text is to be summarized, keep to what it says."
)
BATCHED = {"max_num_seqs": 8, "block_size": 32}
# name -> (exits or plain, one request at a time, vLLM arguments, abort others meanwhile, reference)
RUNS: dict[str, tuple[bool, bool, dict[str, Any], bool, str | None]] = {
    "off, batch 1": (False, True, {"block_size": 32}, False, None),
    "off, batch 8": (False, False, BATCHED, False, None),
    "plain, batch 1": (False, True, {"block_size": 32}, False, None),
    "plain, batch 8": (False, False, BATCHED, False, None),
    "batch 1": (True, True, {"block_size": 32}, False, "plain, batch 1"),
    "batch 8": (True, False, BATCHED, False, "plain, batch 8"),
    "prefix caching": (True, False, {**BATCHED, "enable_prefix_caching": True}, False, "plain, batch 8"),
    "64-token chunks": (True, False, {**BATCHED, "max_num_batched_tokens": 64}, False, "plain, batch 8"),
    "preemption": (True, False, {**BATCHED, "num_gpu_blocks_override": 48}, False, "plain, batch 8"),
    "aborts": (True, False, BATCHED, True, "plain, batch 8"),
}


@dataclass(slots=True)
class Scheduled:
    """What an engine's scheduler has done."""

    preemptions: int = 0
    rows: list[int] = field(default_factory=list)  # of each step

    @classmethod
    def by(cls, engine: "Engine") -> "Scheduled":
        """From now on."""
        seen, scheduler = cls(), engine.scheduler
        preempt, schedule = scheduler._preempt_request, scheduler.schedule

        def preempt_and_count(*args: object, **kwargs: object) -> None:
            seen.preemptions += 1
            preempt(*args, **kwargs)

        def schedule_and_count(*args: object, **kwargs: object) -> "SchedulerOutput":
            scheduled: SchedulerOutput = schedule(*args, **kwargs)
            if scheduled.total_num_scheduled_tokens:
                seen.rows.append(scheduled.total_num_scheduled_tokens)
            return scheduled

        vars(scheduler).update(_preempt_request=preempt_and_count, schedule=schedule_and_count)
        return seen


def run(
    name: str,
    args: argparse.Namespace,
    prompts: list[Messages],
    options: dict[str, Any],
    queue: "Queue[dict[str, Any]]",
) -> None:
    from tests.harness import Engine, greedy

    exits, one_by_one, vllm, aborts, _ = RUNS[name]
    defaults = {"max_model_len": 1024, "kv_cache_memory_bytes": 2 << 30, "dtype": args.dtype}
    compiled = {"enforce_eager": args.dtype == "float32"}
    own = options if exits else {"policy": "off"} if name.startswith("off") else None
    with Engine(args.model, own, **{**defaults, **compiled, **vllm}) as engine:
        token_prompts = [engine.chat_prompt(chat) for chat in prompts]
        seen = Scheduled.by(engine)
        cached = 0
        if aborts:
            tokens = with_aborts(engine, token_prompts, greedy(128))
        else:
            groups = [[prompt] for prompt in token_prompts] if one_by_one else [token_prompts]
            outputs = [output for group in groups for output in engine.generate(group, greedy(128))]
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            cached = sum(output.num_cached_tokens or 0 for output in outputs)
        queue.put(
            {
                "tokens": tokens,
                "counts": engine.counts() if exits else None,
                "preemptions": seen.preemptions,
                "lone_row_frac": sum(number == 1 for number in seen.rows) / len(seen.rows),
                "cached_tokens": cached,
            }
        )


def with_aborts(engine: "Engine", prompts: "list[TokensPrompt]", params: "SamplingParams") -> list[list[int]]:
    """Every fourth step another request joins; it is aborted five steps later."""
    for index, prompt in enumerate(prompts):
        engine.add(f"keep-{index}", prompt, params)
    answers: dict[str, list[int]] = {}
    step, joined = 0, []
    while len(answers) < len(prompts) or engine.llm.llm_engine.has_unfinished_requests():
        if step % 4 == 0 and step < 400:
            name = f"drop-{step}"
            # In front of the waiting ones, so that it really runs beside the others.
            engine.add(name, prompts[step % len(prompts)], params)
            engine.scheduler.waiting.prepend_request(engine.scheduler.waiting.pop())
            joined.append((step, name))
        if joined and step - joined[0][0] >= 5:
            engine.abort(joined.pop(0)[1])
        for name, tokens in engine.step().items():
            if name.startswith("keep-"):
                answers[name] = tokens
        step += 1
        if not engine.llm.llm_engine.has_unfinished_requests():
            break
    engine.idle()
    return [answers[f"keep-{index}"] for index in range(len(prompts))]


def reference_of(name: str, dtype: str) -> str | None:
    if dtype == "float32":
        return RUNS[name][-1]
    return None if name == "off, batch 1" else "off, batch 1"


def wanted_runs(args: argparse.Namespace) -> dict[str, str | None]:
    """Runs in their order, those that others are held against included -> what each is held against."""
    wanted = set(args.only.split(",")) if args.only else set(RUNS)
    if args.dtype == "float32":
        wanted -= {"off, batch 1", "off, batch 8"}
    references = {name: reference_of(name, args.dtype) for name in wanted}
    wanted |= {reference for reference in references.values() if reference is not None}
    return {name: references.get(name) for name in RUNS if name in wanted}


def run_alone(name: str, args: argparse.Namespace, chats: list[Messages], options: dict[str, Any]) -> dict[str, Any]:
    """`run` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=run, args=(name, args, chats, options, queue))
    process.start()
    result: dict[str, Any] = queue.get(timeout=3600)
    process.join()
    return result


def line_of(name: str, result: dict[str, Any], dtype: str, reference: str | None) -> str:
    """What is shown of a run, `identical` being in its result where it was held against another."""
    line = f"{name}: {len(result['tokens'])} answers, {result['preemptions']} preemptions"
    line += f", {result['cached_tokens']} prompt tokens from the prefix cache"
    if name.startswith("plain") and dtype != "float32":
        line += f", {result['lone_row_frac']:.0%} of the steps of a single row, which plain vLLM rounds another way"
    if reference is not None:
        line += f", {result['identical']} identical to '{reference}'"
        if counts := result["counts"]:
            line += f", {counts['accepted']} of {counts['held']} held exits accepted"
    return line


def chats_of(args: argparse.Namespace) -> list[Messages]:
    from apparate_llm.eval.prompts import load_prompts

    chats = [prompt.messages for prompt in load_prompts(args.prompts)]
    chats = [chat for chat in chats if sum(len(m["content"]) for m in chat) < 1200][: args.num_prompts]
    return [[{"role": "system", "content": SYSTEM}, *chat] for chat in chats]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--hold-threshold", type=float, default=0.0)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--policy", default="static")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", help="comma-separated runs besides the plain ones: " + ", ".join(RUNS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chats = chats_of(args)
    options: dict[str, Any] = {"policy": args.policy, "hold_threshold": args.hold_threshold}
    if args.depth is not None:
        options["depth"] = args.depth
    outcome: dict[str, Any] = {}
    failed = False
    for name, reference in wanted_runs(args).items():
        result = outcome[name] = run_alone(name, args, chats, options)
        if reference is not None:
            same = sum(a == b for a, b in zip(result["tokens"], outcome[reference]["tokens"], strict=True))
            result["identical"] = same
            failed |= same != len(result["tokens"]) and not name.startswith("plain")
        print(line_of(name, result, args.dtype, reference), flush=True)
    if args.json:
        args.json.write_text(json.dumps(outcome))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
