#!/usr/bin/env python3
"""Makes a feedback log that `apparate-llm replay` can try any policy on: every request runs all draft steps.

    python -m scripts.make_replay_log --out LOG.jsonl.gz [--model DIR] [--prompts FILE ...] [--batches 1,2,4,8]

From the repository's root, on a machine that does nothing else. The first steps at each batch size run fewer draft
steps, so that passes of all sizes are in the log. Prompts of the files are interleaved.
"""

import argparse
import gzip
import itertools
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from apparate_llm.controller.policy import Policy

if TYPE_CHECKING:
    from vllm import LLM

MAX_EXITS = 4
PROBING_STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", default="1,2,4,8")
    parser.add_argument("--num-prompts", type=int, default=24, help="per batch size")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    from apparate_llm.launch import reexec_with_libraries

    reexec_with_libraries({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"})
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        record(args, log)
        data = log.read_bytes()
    args.out.write_bytes(gzip.compress(data, mtime=0))
    passes = len(data.splitlines()) - 1
    print(f"{args.out}: {passes} passes, {args.out.stat().st_size} bytes", flush=True)
    os._exit(0)  # nothing here needs vLLM's tidy end


def engine_with_log(model: Path, log: Path, max_num_seqs: int) -> "LLM":
    """Holds every exit there is, whatever it costs."""
    from vllm import LLM

    from apparate_llm.config import parse_config
    from apparate_llm.engine.vllm_args import vllm_args
    from apparate_llm.models.architectures import architecture_of

    options = {
        "policy": "static",
        "accuracy_bound": 0.0,
        "hold_threshold": 0.0,
        "max_exits": MAX_EXITS,
        "max_batch_tokens": 1024,
        "controller_state": "none",
        "feedback_log": str(log),
    }
    return LLM(
        str(model),
        **vllm_args(parse_config(options), architecture_of(model)),
        max_model_len=2048,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=2 << 30,
        enable_prefix_caching=False,
    )


def record(args: argparse.Namespace, log: Path) -> None:
    from vllm import SamplingParams
    from vllm.renderers.chat_utils import ChatCompletionMessageParam

    from apparate_llm.eval.prompts import load_prompts
    from apparate_llm.named_model import model_folder
    from apparate_llm.prepare.engine import runner_of

    batches = [int(size) for size in args.batches.split(",")]
    llm = engine_with_log(model_folder(args.model), log, max(batches))
    policy: Policy = runner_of(llm).exit_drafter.policy
    sets = [[prompt.messages for prompt in load_prompts(path)] for path in args.prompts or [None]]
    for prompts in sets:
        random.Random(0).shuffle(prompts)
    turns = itertools.cycle(prompt for group in itertools.zip_longest(*sets) for prompt in group if prompt is not None)
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    for size in batches:
        probe(policy)
        chats: list[list[ChatCompletionMessageParam]] = [[*chat] for chat in itertools.islice(turns, args.num_prompts)]
        for start in range(0, len(chats), size):
            llm.chat(chats[start : start + size], params, use_tqdm=False)
        print(f"batch {size} done", file=sys.stderr, flush=True)


def probe(policy: Policy) -> None:
    """Let the next steps run 0, 1, 2, ... draft steps, and all the ones after them the most there may be."""
    numbers = itertools.chain(
        itertools.islice(itertools.cycle(range(MAX_EXITS)), PROBING_STEPS), itertools.repeat(MAX_EXITS)
    )
    plain = type(policy).__mro__[1] if type(policy).__name__ == "Probing" else type(policy)
    policy.__class__ = type("Probing", (plain,), {"__slots__": (), "start": lambda self, num_requests: next(numbers)})


if __name__ == "__main__":
    main()
