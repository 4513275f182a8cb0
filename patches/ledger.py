"""Every patch: what, why, and when it goes."""

from apparate_llm.patches import cpu_expand_kernel
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
)


def apply_all() -> list[str]:
    """Apply what this platform needs; returns the patched targets. Raises PatchMismatchError."""
    return [patch.target for patch in LEDGER if patch.apply(patch)]
