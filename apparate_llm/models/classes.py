"""The model classes vLLM loads: its own, with early exits mixed in."""

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from apparate_llm.models.mixin import EarlyExitMixin


class EarlyExitLlama(EarlyExitMixin, LlamaForCausalLM):
    pass


class EarlyExitMistral(EarlyExitMixin, MistralForCausalLM):
    pass


class EarlyExitQwen2(EarlyExitMixin, Qwen2ForCausalLM):
    pass


class EarlyExitQwen3(EarlyExitMixin, Qwen3ForCausalLM):
    pass
