"""Every patch: what, why, and when it goes."""

from apparate_llm.patches import (
    aot_load,
    cpu_expand_kernel,
    drafts_in_output,
    fork_engines,
    score_params,
    score_processors,
    stop_start,
)
from apparate_llm.patches.guard import Patch, Process

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
    Patch(
        file="fork_engines",
        target="vllm.platforms.cpu.CpuPlatform.check_and_update_config",
        mode="wrap",
        process="server",
        source_sha256="d2960ad5d183676793d6988a9a4ed50175d18dbf8baf70fc01f686d50887a0df",
        what="engine and worker are forks of the server's process on the CPU backend with Intel's OpenMP runtime",
        why="without it three processes import vLLM one after the other at every start",
        upstream="https://github.com/vllm-project/vllm/issues/27369 (why vLLM binds threads by variables)",
        delete_when="vLLM forks on a CPU, or its import takes less than a second",
        apply=fork_engines.apply,
    ),
    Patch(
        file="stop_start",
        target="vllm.entrypoints.launchers.api_server.entry.run_server",
        mode="wrap",
        process="server",
        source_sha256="cdd5eabbed79a4cd2df09c2e3912a4971c666cd1346b42b0a5370fea8aeba12d",
        what="SIGTERM and Ctrl-C end a server at once while it starts, without a trace",
        why="without it SIGTERM is caught and lost while engines start, and prints a trace before",
        upstream="none known; zmq_socket_ctx catches what the handler raises",
        delete_when="`vllm serve` ends by a SIGTERM that comes while its engines start",
        apply=stop_start.apply,
    ),
    Patch(
        file="drafts_in_output",
        target="vllm.v1.engine.core.EngineCore.post_step",
        mode="wrap",
        process="engine",
        source_sha256="dfda901ee36bf711011bb5dd2d029d2658983a3c15a64c475b2050a395620d7a",
        what="drafts that came with a step's output are not asked for once more",
        why="without it every step waits for one more message to the worker and back",
        upstream="none known",
        delete_when="vLLM takes drafts from the output of a step without asynchronous scheduling",
        apply=drafts_in_output.apply,
    ),
    Patch(
        file="score_params",
        target="vllm.sampling_params.SamplingParams._validate_spec_decode",
        mode="wrap",
        process="any",
        source_sha256="13f2065aad2612ade717adc0686c6097d241c6929d2e2fda1feac2616d146802",
        what="requests with min_p or logit_bias are served, without exits",
        why="without it they are refused, and clients exist that always send min_p",
        upstream='https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/sampling_params.py ("not yet supported")',
        delete_when="vLLM serves min_p and logit_bias with drafts",
        apply=score_params.apply,
    ),
    Patch(
        file="score_processors",
        target="vllm.v1.sample.logits_processor.build_logitsprocs",
        mode="wrap",
        source_sha256="82609dd72304afee0b373e975011c3a628f45da6f3f6ba87bce92c0003d55391",
        what="min_p, logit_bias and --logits-processors act on requests without exits",
        why="without it the first two do nothing, and a server with the third does not start",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/sample/logits_processor/__init__.py",
        delete_when="vLLM builds all processors with drafts",
        apply=score_processors.apply,
    ),
)


def apply_all(process: Process = "worker") -> list[str]:
    """Apply what such a process needs on this platform; returns the patched targets. Raises PatchMismatchError."""
    return [patch.target for patch in LEDGER if patch.process == process and patch.apply(patch)]
