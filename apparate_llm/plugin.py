"""vLLM entry point `vllm.general_plugins`: makes our model classes known. Runs in every vLLM process."""


def register() -> None:
    from vllm import ModelRegistry

    from apparate_llm.models.architectures import ARCHITECTURES

    known = ModelRegistry.get_supported_archs()
    for name, class_path in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, class_path)
