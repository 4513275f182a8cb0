"""vLLM's methods that classes of ours override, or replace on an object of their own: with the source they were read
in. One that has changed stops the start; `python -m scripts.check_vllm` shows all that have."""

from apparate_llm.patches.guard import Overrides, check_overrides

OVERRIDES: tuple[Overrides, ...] = (
    Overrides(
        ours="engine.runner.EarlyExitRunner",
        theirs="vllm.v1.worker.cpu_model_runner.CPUModelRunner",
        sha256={
            "__init__": "26ba909a7737f3fb2baaf193632b862dcd5d95f6bd3f083e429a26b611e5d1e5",
            "load_model": "270bdfc6670d8cba1cd407cb903f5ef9dc94a1ea896ebf27bfeca2c8da2b1470",
        },
    ),
    Overrides(
        ours="engine.runner.EarlyExitRunner",
        theirs="vllm.v1.worker.gpu_model_runner.GPUModelRunner",
        sha256={
            "_dummy_sampler_run": "89f93aae52e8b58c60746c176afa72cfd7618aa3876dec44ba1995f5d4cb8373",
            "shutdown": "df740e359361e3c1f3b64ca3df7ac7f3ab6444cdf3a7438c1fdeb0d885039915",
            "_update_states": "326599f31b273b945fd7fc488f5e022c3b2d98d34fb74d2e9ce546e2abcdc892",
            "_prepare_inputs": "c31a77c123a09a04971543d691b8ecce045820a05578494fc58eea2d3c665662",
            "sample_tokens": "047e6a4738dead564fe9b997672e5737a9af3514a1b07fbc87c9f7df6a372d1b",
            "_sample": "5cb5c1da02cfdc689acb7bab51ca7eb56e2ef3b19bea4b92fc6ca4370be2cf5a",
            "_input_fits_in_drafter": "24d6a45dca3c60dcba5dd0075e7ab8b9855e96c0538deb5ca5c52c5ccb6eb80e",
            "propose_draft_token_ids": "a60269aca9de4e251b8132aa1d95de38497b65bfdb20fbb54596fe4d5600ad35",
            "take_draft_token_ids": "21e3697c8c5f9a817a05cb97c90c8c535eaf6b50ac15f532139457d4530096d8",
        },
    ),
    Overrides(
        ours="engine.fallback.FallbackRunner",
        theirs="vllm.v1.worker.cpu_model_runner.CPUModelRunner",
        sha256={
            "__init__": "26ba909a7737f3fb2baaf193632b862dcd5d95f6bd3f083e429a26b611e5d1e5",
        },
    ),
    Overrides(
        ours="engine.worker.EarlyExitWorker",
        theirs="vllm.v1.worker.cpu_worker.CPUWorker",
        sha256={
            "init_device": "11721464aeb0de34c17055fee454c78485fe0470af47cdbfe74ee7cd1a42474d",
            "compile_or_warm_up_model": "faf0a9720ca45d4a0aff2c3cedcc297f34bd61d19b6119ecb13f03f358d7d268",
        },
    ),
    Overrides(
        ours="engine.worker.EarlyExitWorker",
        theirs="vllm.v1.worker.gpu_worker.Worker",
        sha256={
            "execute_model": "782126ba48e7e116ab2aed81c9620fbd2dc9041556601f6a63ea060fd0db0fc5",
            "sample_tokens": "461564027b612c6094dddc0cc8ef15af217905f2a618b10a6138ef35716c83ba",
            "take_draft_token_ids": "e3c1b3ed9226301a8bff9a42787e768eb2e93d1fca1f87b0955a593ce3abb773",
        },
    ),
    Overrides(
        ours="engine.invariant_worker.BatchInvariantWorker",
        theirs="vllm.v1.worker.cpu_worker.CPUWorker",
        sha256={
            "init_device": "11721464aeb0de34c17055fee454c78485fe0470af47cdbfe74ee7cd1a42474d",
            "compile_or_warm_up_model": "faf0a9720ca45d4a0aff2c3cedcc297f34bd61d19b6119ecb13f03f358d7d268",
        },
    ),
    Overrides(
        ours="engine.invariant_worker.BatchInvariantWorker",
        theirs="vllm.v1.worker.gpu_worker.Worker",
        sha256={
            "load_model": "350a4fb01458c532555d8c00da77a8158e4bc72ac57f9073f52d833ff3257fc7",
        },
    ),
    Overrides(
        ours="engine.scheduler.EarlyExitScheduler",
        theirs="vllm.v1.core.sched.scheduler.Scheduler",
        sha256={
            "__init__": "c026802456720b432a00b7a4cc2dfb14e9e90d6a9a0711aa8c41c76bf0319703",
            "update_from_output": "85b29db96051135c2e8efcb26637eb46d30b8b7707e947ccf4f86f6fdc613c49",
            "update_draft_token_ids": "f05dcf1d78912b3633f794fddda0fdd5fa71675c168b261cc2e9358397f5a893",
            "_update_request_with_output": "ff6e3f664c996a8f17eefa1808b392ae97ff3c57ee996a6d21d17b26d298f062",
            "_preempt_request": "4113f5de8a84ec2532821578e8e3fb6ca4609b14d3d77b4a57d2b641ca427902",
        },
    ),
    Overrides(
        ours="models.classes.EarlyExitLlama",
        theirs="vllm.model_executor.models.llama.LlamaForCausalLM",
        sha256={
            "__init__": "defbaf7cd714f3475762d6b89236d6f42c68551790b363e5268a4b180d339df4",
            "compute_logits": "4ca44da9e3b22f1535f767bfbf9d4dd96ede35b77f44c220ab3dce724300ff9e",
            "load_weights": "d4d42b84a9a5efaf7dd4ece19912c68e194f5f56349e2fde781adc77173c9e74",
        },
    ),
    Overrides(
        ours="models.classes.EarlyExitMistral",
        theirs="vllm.model_executor.models.mistral.MistralForCausalLM",
        sha256={
            "__init__": "b305d2c3436e807869d8f388d301b15c18dbb791b3e76764c8cb32c5796f877f",
            "load_weights": "b371987c884fd25466511e64868e140e8a3d970b1e449d903b10b55567414f02",
        },
    ),
    Overrides(
        ours="models.classes.EarlyExitMistral",
        theirs="vllm.model_executor.models.llama.LlamaForCausalLM",
        sha256={
            "compute_logits": "4ca44da9e3b22f1535f767bfbf9d4dd96ede35b77f44c220ab3dce724300ff9e",
        },
    ),
    Overrides(
        ours="models.classes.EarlyExitQwen2",
        theirs="vllm.model_executor.models.qwen2.Qwen2ForCausalLM",
        sha256={
            "__init__": "27ae2e99eb41c8fb1784756e4d6d15b4edcb13c76f4cc769bd71d47eadf6a9b2",
            "compute_logits": "4ca44da9e3b22f1535f767bfbf9d4dd96ede35b77f44c220ab3dce724300ff9e",
            "load_weights": "d4d42b84a9a5efaf7dd4ece19912c68e194f5f56349e2fde781adc77173c9e74",
        },
    ),
    Overrides(
        ours="models.classes.EarlyExitQwen3",
        theirs="vllm.model_executor.models.qwen3.Qwen3ForCausalLM",
        sha256={
            "__init__": "0f64c8f839513b87a8482ca63335c8ab9f6440ed47d1990bdc1f00bb5bd7603c",
            "compute_logits": "4ca44da9e3b22f1535f767bfbf9d4dd96ede35b77f44c220ab3dce724300ff9e",
            "load_weights": "d4d42b84a9a5efaf7dd4ece19912c68e194f5f56349e2fde781adc77173c9e74",
        },
    ),
    Overrides(
        ours="api.plugin",
        theirs="vllm.v1.engine.async_llm.AsyncLLM",
        sha256={
            "generate": "5bd0ee90459b0e29348891b03548cdc31eef8c9218b3c416d5df4e5e14d1bca2",
        },
    ),
    Overrides(
        ours="api.requests",
        theirs="vllm.entrypoints.serve.utils.api_utils",
        sha256={
            "validate_json_request": "532f2efc794a94b7a12f054984be79bfc6a66057da48371954485d62d1178a0f",
        },
    ),
    Overrides(
        ours="engine.plain_pages",
        theirs="vllm.v1.worker.gpu_worker.Worker",
        sha256={
            "load_model": "350a4fb01458c532555d8c00da77a8158e4bc72ac57f9073f52d833ff3257fc7",
        },
    ),
    Overrides(
        ours="prepare.capture",
        theirs="vllm.v1.worker.gpu_model_runner.GPUModelRunner",
        sha256={
            "_model_forward": "a8f98588a4656ef66b79d7c763ab95e763b54b8d5b0af6ddde3ee85f02453113",
        },
    ),
    Overrides(
        ours="engine.batch_invariance",
        theirs="vllm.model_executor.layers.linear.UnquantizedLinearMethod",
        sha256={
            "apply": "f3498929dc9f03ee36adbf217cdc961d9d51f72ef6dfbe5a1b16ade31a374652",
        },
    ),
)


def check_those_of(*ours: str) -> None:
    """Of these modules of the package; raises PatchMismatchError."""
    for entry in OVERRIDES:
        if entry.ours.startswith(ours):
            check_overrides(entry)
