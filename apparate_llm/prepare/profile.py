"""Stage profile: what a completion pass and a round of each depth cost on this machine, in ms.

Measured in a process of its own that is set up like a server's, so that the threads and libraries are those of serving.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from apparate_llm.launch import server_environment

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
STEPS = 24
ROUNDS = 24
WARM_UP = 3
PROMPT_TOKENS = 64


def profile(
    model: Path,
    ramps: Path,
    depths: tuple[int, ...],
    *,
    enforce_eager: bool,
    on_progress: Callable[[float, str], None] = lambda done, text: None,
) -> dict[str, Any]:
    """`completion_ms`: batch size -> median ms of an engine step without rounds, one row per request; `round_ms`:
    depth -> batch size -> median ms of one round. Raises RuntimeError if the engine fails."""
    environment = server_environment()
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "KMP_BLOCKTIME"):  # preparation's, not a server's
        environment.pop(name, None)
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", __name__, str(model), str(ramps), ",".join(map(str, depths))]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *(["--eager"] if enforce_eager else [])],
            stdin=subprocess.PIPE,  # its end tells the child that this process has died
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        result = None
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    message = json.loads(line)
                    result = message.get("result", result)
                    if "done" in message:
                        on_progress(message["done"], message["text"])
        finally:
            if process.poll() is None and result is None:
                process.kill()
            code = process.wait()
        if result is None:
            log.seek(0)
            raise RuntimeError(f"profile failed with exit code {code}: {log.read()[-2000:].strip()}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("ramps", type=Path)
    parser.add_argument("depths")
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    depths = [int(depth) for depth in args.depths.split(",")]
    threading.Thread(target=_die_with_parent, daemon=True).start()
    print(json.dumps({"result": _measure(args.model, args.ramps, depths, eager=args.eager)}), flush=True)
    os._exit(0)  # nothing here needs vLLM's tidy end


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _measure(model: Path, ramps: Path, depths: list[int], *, eager: bool) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from apparate_llm.config import parse_config
    from apparate_llm.engine.settings import vllm_settings
    from apparate_llm.models.architectures import architecture_of
    from apparate_llm.prepare.engine import context_length, runner_of

    config = parse_config({"ramps": str(ramps), "policy": "static", "state": "none"})
    llm = LLM(
        str(model),
        **vllm_settings(config, architecture_of(model)),
        max_model_len=min(512, context_length(model)),
        max_num_seqs=max(BATCH_SIZES),
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        enforce_eager=eager,
    )
    engine: Any = llm.llm_engine
    runner = runner_of(llm)
    rounds, runner.rounds = runner.rounds, None
    for depth in depths:
        rounds.compile_blocks(depth)
    completion: dict[str, float] = {}
    round_ms: dict[str, dict[str, float]] = {str(depth): {} for depth in depths}
    vocab = runner.model_config.get_vocab_size()
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    for number, size in enumerate(BATCH_SIZES):
        print(json.dumps({"done": number / len(BATCH_SIZES), "text": f"batch {size}"}), flush=True)
        names = [f"{size}-{i}" for i in range(size)]
        for i, name in enumerate(names):
            ids = [(7 + 13 * i + 5 * j) % vocab for j in range(PROMPT_TOKENS)]
            engine.add_request(name, {"prompt_token_ids": ids}, params)
        while runner.input_batch.num_reqs < size or any(
            runner.input_batch.num_tokens_no_spec[i] <= PROMPT_TOKENS for i in range(size)
        ):
            engine.step()
        completion[str(size)] = _median_ms(engine.step, STEPS)
        for depth in depths:
            rounds.policy.depth = depth
            round_ms[str(depth)][str(size)] = _median_ms(_round(rounds, runner, size), ROUNDS)
        engine.abort_request(names)
        engine.step()
    return {"completion_ms": completion, "round_ms": round_ms}


def _median_ms(work: Callable[[], Any], times: int) -> float:
    """Of `times` calls, after some that are not counted: the first at a batch size makes its kernels."""
    for _ in range(WARM_UP):
        work()
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent.append((time.perf_counter() - began) * 1e3)
    return round(median(spent), 4)


def _round(rounds: Any, runner: Any, size: int) -> Callable[[], Any]:
    """One round over the engine's first `size` requests, without consequences: its KV slots are allocated already."""
    import torch

    from apparate_llm.controller.budget import Bucket
    from apparate_llm.engine.rounds import Row

    batch = runner.input_batch
    rows = [
        Row(
            request_index=i,
            newest_token=int(batch.token_ids_cpu[i, batch.num_tokens_no_spec[i] - 1]),
            newest_position=int(batch.num_tokens_no_spec[i]) - 1,
            state_row=i,
            max_released=1,
            max_held=1,
            may_release=False,
            greedy=True,
            bucket=Bucket.of_request(0.0),
            stop_token_ids=frozenset(),
        )
        for i in range(size)
    ]
    tokens = torch.tensor([row.newest_token for row in rows])
    state = torch.randn(size, rounds.runner.model_config.get_hidden_size()).to(rounds.runner.dtype)

    def run() -> None:
        with torch.inference_mode():
            rounds.predict(rows, tokens, state, 0)

    return run


if __name__ == "__main__":
    main()
