"""replace: where vLLM's engine and worker processes come from.

On CPUs vLLM starts them afresh, each importing everything again. Under `apparate-llm serve` they are forked from a
process that has imported it (prefork.py).
"""

from apparate_llm.patches.guard import Patch, check_target

from apparate_llm.prefork import Context

CONTEXT = Context()


def get_context() -> Context:
    return CONTEXT


def apply(patch: Patch) -> bool:
    from vllm.platforms import current_platform
    from vllm.utils import system_utils
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    if not current_platform.is_cpu():
        return False
    check_target(patch, system_utils.get_mp_context)
    for module in (utils, multiproc_executor):  # they hold the stock function by name
        vars(module)["get_mp_context"] = get_context
    return True
