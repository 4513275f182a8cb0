"""replace: vLLM's CPU stand-in for the rejection sampler's `expand_kernel`.

The original one hands converted copies of its tensors to C++ and drops the copy that holds the result, so temperature,
top-k and top-p of rows under check are uninitialised memory, and a float temperature loses its fraction. Registered
through vLLM's own interface for kernel overrides.
"""

import torch

from apparate_llm.patches.guard import Patch, check_target

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Write each request's value [batch] once per token [num_tokens], `replace_from` turned into `replace_to`."""
    counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
    values = torch.where(input_val == replace_from, torch.as_tensor(replace_to, dtype=input_val.dtype), input_val)
    output.copy_(values.repeat_interleave(counts))


def apply(patch: Patch) -> bool:
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON or not current_platform.is_cpu():
        return False
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.utils import cpu_triton_utils

    check_target(patch, cpu_triton_utils._expand_kernel_impl)
    register_kernels({KERNEL: expand})
    return True
