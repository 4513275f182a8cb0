"""wrap: vLLM's loading of a compiled model from its cache.

On the CPU backend what torch loads is a plain function, ready to run; vLLM then calls a method on it that only its own
backend's functions have, takes the failure for a damaged cache, and compiles anew at every start.
"""

from functools import wraps
from typing import Any

import torch

from apparate_llm.patches.guard import Patch, Target, check_target


def wrapped(original: Target) -> Target:
    """`_try_load_aot_compiled_fn(model, path)`, during which loaded plain functions have the method: nothing is left to
    do for them."""

    @wraps(original)
    def load(model: object, aot_compilation_path: str) -> object:
        torch_load = torch.compiler.load_compiled_function

        def load_with_method(*args: Any, **kwargs: Any) -> Any:
            loaded: Any = torch_load(*args, **kwargs)
            compiled = loaded._artifacts.compiled_fn
            if not hasattr(compiled, "finalize_loading"):
                compiled.finalize_loading = lambda vllm_config: None
            return loaded

        torch.compiler.load_compiled_function = load_with_method
        try:
            return original(model, aot_compilation_path)
        finally:
            torch.compiler.load_compiled_function = torch_load

    return load


def apply(patch: Patch) -> bool:
    from vllm.compilation import decorators
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    original = decorators._try_load_aot_compiled_fn
    if hasattr(original, "__wrapped__"):
        return False  # by an earlier engine in this process
    check_target(patch, original)
    decorators._try_load_aot_compiled_fn = wrapped(original)
    return True
