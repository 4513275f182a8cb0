"""In-process engines on tiny models, driven step by step."""

import gc
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apparate_llm.config import parse_config
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.models.architectures import architecture_of

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.inputs import PromptType, TokensPrompt
    from vllm.v1.engine.core import EngineCore

    from apparate_llm.engine.runner import EarlyExitRunner


def token_prompts(count: int, *, length: int = 6, shared: int = 0) -> "list[PromptType]":
    """Different prompts of `length`, `length` + 1, ... tokens after `shared` tokens common to all."""
    common = [5 + (j * 11) % 150 for j in range(shared)]
    return [
        {"prompt_token_ids": [1, *common, *(5 + (i * 7 + j * 3) % 150 for j in range(length + i))]}
        for i in range(count)
    ]


@cache
def hurry_vllm() -> None:
    """Leaves out what takes most of the time of a small engine: nine garbage collections, each over all that the
    imports left (5 of 9 seconds), and a Python process of its own to look at each model class (15 seconds)."""
    from vllm.model_executor.models import registry

    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    registry._run_in_subprocess = lambda fn: fn()


class Engine:
    """Context manager around one vLLM engine; `options=None` is plain vLLM. Checks integrity on leaving."""

    def __init__(self, model: Path, options: dict[str, Any] | None = None, **vllm: Any) -> None:
        from vllm import LLM

        hurry_vllm()
        # Fixed thresholds and no limit on the rows: exits whatever they cost, unless a test asks for something else.
        base = {
            "policy": "static",
            "accuracy_bound": 0.0,
            "max_exits": 3,
            "max_batch_tokens": 1024,
            "controller_state": "none",
        }
        settings = {} if options is None else vllm_args(parse_config({**base, **options}), architecture_of(model))
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 16 << 20,
            "max_num_seqs": 8,
            "enable_prefix_caching": False,
            "seed": 0,
        }
        self.has_exits = "speculative_config" in settings
        self.llm = LLM(str(model), **{**defaults, **settings, **vllm})

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *exc: object) -> None:
        import torch
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if self.has_exits and error_type is None:
            self.check_integrity()
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()
        torch.compiler.reset()  # or the next model meets this one's guards, of other layers

    def chat_prompt(self, messages: list[dict[str, str]]) -> "TokensPrompt":
        """A conversation up to where the answer begins."""
        ids = self.llm.get_tokenizer().apply_chat_template([*messages], add_generation_prompt=True, return_dict=False)
        assert isinstance(ids, list), f"got {ids!r}"
        return {"prompt_token_ids": ids}

    def generate(self, prompts: "Sequence[PromptType]", params: "SamplingParams") -> "list[RequestOutput]":
        """vLLM's request outputs, all prompts at once."""
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        self.idle()
        return outputs

    def tokens(
        self, prompts: "Sequence[PromptType]", params: "SamplingParams", *, one_by_one: bool = False
    ) -> list[list[int]]:
        groups = [[prompt] for prompt in prompts] if one_by_one else [prompts]
        return [list(out.outputs[0].token_ids) for group in groups for out in self.generate(group, params)]

    def status(self) -> dict[str, Any]:
        status = self.llm.collective_rpc("early_exit_status")[0]
        assert isinstance(status, dict), f"got {status!r}"
        return status

    def counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = self.status()["counts"]
        return counts

    def check_integrity(self) -> None:
        self.llm.collective_rpc("early_exit_check_integrity")
        assert self.scheduler.num_failures == 0

    @property
    def core(self) -> "EngineCore":
        from vllm.v1.engine.core_client import InprocClient

        client = self.llm.llm_engine.engine_core
        assert isinstance(client, InprocClient), "the engine is in a process of its own"
        return client.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def runner(self) -> "EarlyExitRunner":
        runner: EarlyExitRunner = self.core.model_executor.driver_worker.worker.model_runner
        return runner

    def add(self, request_id: str, prompt: "PromptType", params: "SamplingParams") -> None:
        self.llm.llm_engine.add_request(request_id, prompt, params)

    def abort(self, request_id: str) -> None:
        self.llm.llm_engine.abort_request([request_id])

    def step(self) -> dict[str, list[int]]:
        """One engine step; all tokens so far of the requests that got new ones."""
        from vllm import RequestOutput

        outputs = [out for out in self.llm.llm_engine.step() if isinstance(out, RequestOutput)]
        return {out.request_id: list(out.outputs[0].token_ids) for out in outputs}

    def run(self) -> dict[str, list[int]]:
        """Steps until nothing is left; tokens per request."""
        tokens: dict[str, list[int]] = defaultdict(list)
        while self.llm.llm_engine.has_unfinished_requests():
            tokens.update(self.step())
        self.idle()
        return dict(tokens)

    def idle(self) -> None:
        """The step without work that a serving engine makes next: it tells the worker who has finished."""
        self.llm.llm_engine.step()


def greedy(max_tokens: int = 40, **kwargs: Any) -> "SamplingParams":
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **kwargs)
