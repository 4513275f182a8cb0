"""wrap: vLLM's refusal of min_p and logit_bias where there are drafts.

Our runner makes no drafts for such requests, so they are sampled as without speculation.
"""

from functools import wraps

from apparate_llm.patches.guard import Patch, Target, check_target, is_ours


def wrapped(original: Target) -> Target:
    """`_validate_spec_decode(self, speculative_config)` that leaves our server's requests alone."""

    @wraps(original)
    def _validate_spec_decode(self: object, speculative_config: object) -> None:
        if not is_ours(speculative_config):
            original(self, speculative_config)

    return _validate_spec_decode


def apply(patch: Patch) -> bool:
    from vllm.sampling_params import SamplingParams

    original = SamplingParams._validate_spec_decode
    if hasattr(original, "__wrapped__"):
        return False
    check_target(patch, original)
    SamplingParams._validate_spec_decode = wrapped(original)  # type: ignore[method-assign]
    return True
