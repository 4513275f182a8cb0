"""How near a model made out of another one stays to it, token by token, by transformers' forward passes.

The original answers prompts greedily. Both models then read its answers, and at each of their tokens it is compared
which token each finds best, and how far apart their distributions are. So one difference does not lead to others.
"""

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from apparate_llm.prepare.chat import ChatFormat
from apparate_llm.prepare.engine import context_length
from apparate_llm.progress import Progress

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 32  # of an answer
Messages = list[dict[str, str]]


class NothingToAskError(ValueError):
    """Why the original can be asked none of the prompts. The message is one line for the user."""


class Agreement(NamedTuple):
    num_prompts: int
    left_out: dict[str, int]  # reason -> prompts that cannot be asked
    num_tokens: int
    same_frac: float  # of the tokens: the best one is the same
    kl_nats: float  # mean of KL(original || other)

    def __str__(self) -> str:
        return (
            f"{self.same_frac:.1%} of {self.num_tokens} greedy tokens are the same, mean KL {self.kl_nats:.4f} nats "
            f"({self.num_prompts} prompts, each on the original's answer)"
        )


class Answer(NamedTuple):
    ids: "torch.Tensor"  # [1, num_tokens] of prompt and answer
    num_tokens: int  # of the answer
    scores: "torch.Tensor"  # [num_tokens, vocab] by which the original chose each, in its own dtype


def agreement_of(
    original: Path, other: Path, prompts: Sequence[Messages], *, limit_s: float, progress: Progress
) -> Agreement:
    """Over as many of the prompts as half of `limit_s` lets the original answer, at least one. `progress` says which
    cannot be asked; raises NothingToAskError if these are all."""
    answers: list[Answer] = []
    until_s = time.monotonic() + limit_s / 2
    with progress.stage("original's answers", total=len(prompts), unit="prompts", facts="loading the model") as stage:
        asked, left_out = rendered(original, prompts, progress.say)
        stage.total = len(asked)
        for answer in answered(original, asked, until_s=until_s):
            answers.append(answer)
            stage.update(len(answers))
        stage.total = len(answers)
    same = kl = num_tokens = 0.0
    with progress.stage("compared answers", total=len(answers), unit="prompts", facts="loading the model") as stage:
        model = loaded(other)
        for number, answer in enumerate(answers, 1):
            own_same, own_kl = compared(answer.scores, scores_of(model, answer.ids, answer.num_tokens))
            same, kl, num_tokens = same + own_same, kl + own_kl, num_tokens + answer.num_tokens
            stage.update(number)
    return Agreement(len(answers), left_out, int(num_tokens), same / num_tokens, kl / num_tokens)


def rendered(
    model: Path, prompts: Sequence[Messages], say: Callable[[str], None]
) -> tuple[list[list[int]], dict[str, int]]:
    """Token ids of the prompts that the model can be asked, and for which reasons how many are left out, which is
    said. Raises NothingToAskError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # each reader of a damaged file fails in its own way
        raise NothingToAskError(f"no tokenizer can be read in {model}: {' '.join(str(error).split())[:200]}") from None
    try:
        length = context_length(model)
        chat = ChatFormat(tokenizer, max_model_len=length, max_answer_tokens=MAX_TOKENS, say=say)
        asked, left_out = chat.render_all([*prompts])
    except ValueError as error:
        raise NothingToAskError(str(error)) from None
    return [ids for _, ids in asked], dict(left_out.counts)


def answered(original: Path, prompts: Sequence[list[int]], *, until_s: float) -> Iterator[Answer]:
    """prompts: token ids; until_s: on the monotonic clock, when no further answer is begun."""
    import torch

    model = loaded(original)
    for number, prompt_ids in enumerate(prompts):
        if number and time.monotonic() >= until_s:
            return
        prompt = torch.tensor([prompt_ids])
        with torch.inference_mode(), quiet():
            ids = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=MAX_TOKENS
            )
        num_tokens = ids.shape[1] - prompt.shape[1]
        yield Answer(ids, num_tokens, scores_of(model, ids, num_tokens))


def loaded(folder: Path) -> Any:
    """The model in bfloat16; a quantised one computes with weights and inputs as they are quantised."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def scores_of(model: Any, ids: "torch.Tensor", num_tokens: int) -> "torch.Tensor":
    """[num_tokens, vocab] of the last tokens of a text."""
    import torch

    with torch.inference_mode(), quiet():
        scores: torch.Tensor = model(ids, use_cache=False).logits[0, -num_tokens - 1 : -1]
    return scores


def compared(scores: "torch.Tensor", others: "torch.Tensor") -> tuple[int, float]:
    """(tokens whose best is the same, sum of KL in nats) of [num_tokens, vocab] each."""
    same = int((scores.argmax(1) == others.argmax(1)).sum())
    log_p, log_q = scores.float().log_softmax(1), others.float().log_softmax(1)
    kl = float((log_p.exp() * (log_p - log_q)).sum())
    assert math.isfinite(kl), f"scores that are no numbers: KL {kl}"
    return same, kl


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and advice that libraries write."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
