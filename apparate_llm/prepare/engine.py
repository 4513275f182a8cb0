"""The vLLM engine that preparation generates with, in this process so that its states can be recorded."""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apparate_llm.host import dtype
from apparate_llm.host.limits import cpu_limits

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 128
MAX_NUM_BATCHED_TOKENS = 2048
KV_CACHE_GIB = 2
CACHE_BLOCK = 32  # tokens of which a prefix cache holds all or none
CONTEXT_LENGTHS = ("max_position_embeddings", "model_max_length")  # in config.json


def environment() -> dict[str, str]:
    """Variables that must stand before vLLM is imported. All compute that may: nobody waits for single tokens here."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(cpu_limits().logical_threads),
        "KMP_BLOCKTIME": "1",  # ms a thread spins for work: spinning for longer would starve whatever runs beside us
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }


def import_vllm() -> None:
    """What an engine's first start in a process imports."""
    from vllm import LLM  # noqa: F401


@contextmanager
def generation_engine(model: Path, *, seed: int = 0, **settings: Any) -> Iterator[Any]:
    """A `vllm.LLM` fit for `Capture`; its memory is given back at the end."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        str(model),
        **{
            "dtype": dtype.dtype_of(model),
            "max_model_len": context_length(model),
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
            "kv_cache_memory_bytes": KV_CACHE_GIB << 30,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "block_size": CACHE_BLOCK,
            "seed": seed,
            **settings,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def runner_of(llm: Any) -> Any:
    """vLLM's model runner inside an engine of this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def kv_bytes_per_token(model: Path) -> int:
    """Of the KV cache."""
    return dtype.kv_bytes_per_token(json.loads((model / "config.json").read_text()), dtype.element_size(model))


def context_length(model: Path) -> int:
    """Of the engine: the model's own, where that is shorter than MAX_MODEL_LEN."""
    config = json.loads((model / "config.json").read_text())
    # Where both are there vLLM goes by the second.
    return min(MAX_MODEL_LEN, *(config.get(name) or MAX_MODEL_LEN for name in CONTEXT_LENGTHS))
