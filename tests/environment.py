"""The environment of processes that tests start: a user's, not what engines in the test's own process made of it."""

import os

# vLLM sets these in a process that has an engine, for its own children.
SET_BY_ENGINES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_WORKER_MULTIPROC_METHOD",
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
    "VLLM_SSM_CONV_STATE_LAYOUT",
    "NUMEXPR_MAX_THREADS",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS",
    "LOCAL_WORLD_SIZE",
    "LD_PRELOAD",
}


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SET_BY_ENGINES}
