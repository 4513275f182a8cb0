import os
from threading import get_native_id

import torch
from torch._inductor import codecache
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from apparate_llm.engine.background import run_in_background
from apparate_llm.engine.runner import EarlyExitRunner
from apparate_llm.engine.worker import hash_compilers


def test_the_compile_cache_finds_its_hashes_made(monkeypatch):
    hash_compilers()

    def again(*args):
        raise AssertionError("read all files again")

    monkeypatch.setattr(codecache, "build_code_hash", again)
    monkeypatch.setattr(codecache, "triton_key", again)
    assert codecache.torch_key()
    assert codecache.CacheBase.get_system()["hash"]


def test_sampling_is_warmed_up_by_one_row(monkeypatch):
    monkeypatch.setattr(GPUModelRunner, "_dummy_sampler_run", lambda self, hidden_states: hidden_states)
    states = torch.arange(12.0).view(3, 4)
    runner = object.__new__(EarlyExitRunner)
    assert runner._dummy_sampler_run(states).tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_work_beside_may_use_every_core(monkeypatch):
    seen = []
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        run_in_background(lambda: seen.append(os.sched_getaffinity(get_native_id())), "test").join()
    finally:
        os.sched_setaffinity(0, before)
    assert seen[0] >= before
