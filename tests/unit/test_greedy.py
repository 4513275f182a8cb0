"""Our check of greedy drafts gives what vLLM's rejection sampler gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apparate_llm.argmax import best_tokens
from apparate_llm.engine.greedy import is_plain_greedy, verify_greedy

VOCAB = 40


def metadata_of(drafts: list[list[int]]):
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    metadata = SpecDecodeMetadata.make_dummy(drafts, device=torch.device("cpu"))
    is_bonus = np.concatenate([np.arange(len(ids) + 1) == len(ids) for ids in drafts])
    metadata.target_logits_indices = torch.from_numpy(np.flatnonzero(~is_bonus))
    metadata.bonus_logits_indices = torch.from_numpy(np.flatnonzero(is_bonus))
    return metadata


@pytest.fixture
def sampling():
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    return SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.tensor([]),
        presence_penalties=torch.tensor([]),
        repetition_penalties=torch.tensor([]),
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_accepts_what_vllms_sampler_accepts(dtype, sampling):
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    current_platform.register_triton_kernel_overrides()
    rng = np.random.default_rng(0)
    sampler = RejectionSampler(Sampler(), None, torch.device("cpu"))
    accepted = set()
    for _ in range(60):
        counts = rng.integers(0, 5, size=4)
        counts[0] = max(counts[0], 1)
        # Few distinct values, so that many rows have several best tokens.
        logits = torch.from_numpy(rng.integers(0, 6, size=(int(counts.sum()) + 4, VOCAB))).to(dtype)
        best, row, drafts = logits.float().argmax(-1).tolist(), 0, []
        for count in counts:
            right = rng.random(count) < 0.7
            drafts.append([best[row + i] if right[i] else int(rng.integers(VOCAB)) for i in range(count)])
            row += count + 1
        metadata = metadata_of(drafts)
        expected = sampler(metadata, None, logits.clone(), sampling).sampled_token_ids
        got = verify_greedy(logits, metadata).sampled_token_ids
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        accepted |= set((got != -1).sum(1).tolist())
    assert accepted == {1, 2, 3, 4, 5}


def test_the_first_of_equals_is_best_as_in_plain_vllm():
    import vllm._custom_ops  # noqa: F401 - loads vLLM's kernels

    scores = torch.randint(0, 4, (20, 3000)).float()
    scores[:, 17] = scores[:, 2900] = 9.0
    assert best_tokens(scores).tolist() == [17] * 20 == torch.ops._C.greedy_argmax(scores).tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"all_greedy": False},
        {"no_penalties": False},
        {"max_num_logprobs": 0},
        {"logprob_token_ids": {0: [1]}},
        {"allowed_token_ids_mask": torch.zeros(1, VOCAB, dtype=torch.bool)},
        {"bad_words_token_ids": {0: [[1]]}},
        {"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: True)},
        {"logitsprocs": SimpleNamespace(non_argmax_invariant=[object()])},
    ],
)
def test_whatever_changes_or_reads_scores_is_left_to_vllm(change, sampling):
    assert is_plain_greedy(sampling)
    for name, value in change.items():
        setattr(sampling, name, value)
    assert not is_plain_greedy(sampling)
