#!/usr/bin/env python3
"""Requests with a target between lossless and fastest, against both.

    python -m scripts.check_target [--accuracy-bound 0.2] [--repeat 30] [--json OUT] [vLLM flags]

From the repository's root. One server. Each repetition asks one prompt three times, one after the other: without a
divergence, as fast as the bound allows, and with a target halfway (geometrically) between what these two have just
taken, since on a shared machine a fixed one is out of their range a minute later. Exit code 1 if the targets are
missed by more than --limit in the mean, or no divergence was saved.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
from openai.types.chat import ChatCompletionChunk

from apparate_llm.eval.intervals import bootstrap
from apparate_llm.eval.prompts import Messages, load_prompts
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import ModelChoice, early_exits
from apparate_llm.machine import machine
from apparate_llm.serve import memory_flags, model_folder

LEARNING_REPEATS = 3  # not counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--accuracy-bound", type=float, default=0.2)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--limit", type=float, default=1.05)
    parser.add_argument("--json", type=Path)
    args, flags = parser.parse_known_args()
    choice = ModelChoice(model_folder(args.model), (*memory_flags(flags), *flags))
    system = early_exits("exits", choice, "--accuracy-bound", str(args.accuracy_bound))
    prompts, repeats = load_prompts(args.prompts), []
    with Server(system, log=Path(tempfile.mkdtemp()) / "server.log", start_timeout_s=900) as server:
        server.wait_ready()
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        for number in range(-LEARNING_REPEATS, args.repeat):
            messages = prompts[number % len(prompts)].messages
            repeat = ask_each(client, server.model_name(), messages, args.max_tokens, swapped=bool(number % 2))
            if number >= 0:
                repeats.append(repeat)
                print(json.dumps(repeat), flush=True)
    result = result_of(repeats)
    print(json.dumps(result))
    if args.json:
        command = "python -m scripts.check_target " + shlex.join(sys.argv[1:])
        args.json.write_text(json.dumps({"command": command, "machine": machine(), **result}, indent=1) + "\n")
    return int(
        result["tpt_over_target"] > args.limit
        or result["divergences_at_worst"]["target"] >= result["divergences_at_worst"]["fast"]
    )


def ask_each(
    client: openai.OpenAI, model: str, messages: Messages, max_tokens: int, *, swapped: bool
) -> dict[str, Any]:
    """(TPT in ms, divergences at worst) of `lossless`, `fast` and `target`, and the target in ms."""
    options: dict[str, dict[str, float]] = {"lossless": {"accuracy_bound": 0.0}, "fast": {}}
    repeat: dict[str, Any] = {}
    for name in sorted(options, reverse=swapped):
        repeat[name] = ask(client, model, messages, max_tokens, options[name])
    repeat["target_ms"] = float(np.sqrt(repeat["lossless"][0] * repeat["fast"][0]))
    repeat["target"] = ask(client, model, messages, max_tokens, {"tpt_target_ms": repeat["target_ms"]})
    return repeat


def ask(
    client: openai.OpenAI, model: str, messages: Messages, max_tokens: int, options: dict[str, float]
) -> tuple[float, int]:
    """(TPT in ms as the client sees it, divergences at worst) of one answer of `max_tokens` tokens."""
    stream = client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": {**options, "early_exit_report": 1}},
    )
    times, report = [], None
    for chunk in stream:
        assert isinstance(chunk, ChatCompletionChunk), f"got {chunk}"
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.monotonic())
        report = (chunk.model_extra or {}).get("early_exit", report)
    assert report is not None and sum(report[0]["tokens"].values()) == max_tokens, f"not a whole answer: {report}"
    return (times[-1] - times[0]) * 1e3 / (max_tokens - 1), report[0]["divergences_at_worst"]


def result_of(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("lossless", "fast", "target")
    tpt = {name: np.array([repeat[name][0] for repeat in repeats]) for name in names}
    targets = np.array([repeat["target_ms"] for repeat in repeats])
    logs = np.log([tpt["target"], targets])
    return {
        "repeat": len(repeats),
        "tpt_ms": {name: float(values.mean()) for name, values in tpt.items()},
        "target_ms": float(targets.mean()),
        "tpt_over_target": float(np.exp((logs[0] - logs[1]).mean())),
        "ci95": bootstrap(logs, lambda sample: np.exp((sample[0] - sample[1]).mean(-1))),
        "divergences_at_worst": {name: sum(repeat[name][1] for repeat in repeats) for name in names},
    }


if __name__ == "__main__":
    sys.exit(main())
