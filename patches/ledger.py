"""Every patch: what, why, and when it goes."""

from apparate_llm.patches import aot_load, cpu_expand_kernel
from apparate_llm.patches.guard import Patch

LEDGER: tuple[Patch, ...] = (
    Patch(
        file="cpu_expand_kernel",
        target="vllm.utils.cpu_triton_utils._expand_kernel_impl",
        mode="replace",
        source_sha256="b0d7df291932f1c3d0818bcba211d3c9b2a701de070dc888ff659948763e9559",
        what="temperature, top-k and top-p reach the rows of exits under check on the CPU backend",
        why="without it random sampling with held exits has another distribution than plain vLLM",
        upstream="https://github.com/vllm-project/vllm/pull/42638 (closed, other cause, same effect)",
        delete_when="the stock function writes its result back into `output` without changing its dtype",
        apply=cpu_expand_kernel.apply,
    ),
    Patch(
        file="aot_load",
        target="vllm.compilation.decorators._try_load_aot_compiled_fn",
        mode="wrap",
        source_sha256="3201ac0ee6146d20a006ef86948c47018625ff517c202f3bb18ca84167360cef",
        what="a compiled model is loaded from vLLM's cache at a second start on the CPU backend",
        why="without it every start compiles again, half a minute to two minutes",
        upstream="none known; the method came with https://github.com/vllm-project/vllm/pull/25205",
        delete_when="vLLM on a CPU says `Directly load AOT compilation` at a second start",
        apply=aot_load.apply,
    ),
)


def apply_all() -> list[str]:
    """Apply what this platform needs; returns the patched targets. Raises PatchMismatchError."""
    return [patch.target for patch in LEDGER if patch.apply(patch)]
