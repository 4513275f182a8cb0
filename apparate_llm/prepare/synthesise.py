"""Stage synthesise: the model writes its own prompts and answers them while its hidden states are recorded.

Conversations flow through the engine all the time. What is finished goes to the store every half minute; prompts and
answers that take longer are kept beside it as far as they are, so that a run that was killed goes on with them.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from apparate_llm.prepare.capture import Capture, conversation_of, needs_last_rows
from apparate_llm.prepare.prompts import Opening, Prompt, PromptSource
from apparate_llm.prepare.rows import SPLIT_NAMES, Conversation
from apparate_llm.prepare.store import RowStore
from apparate_llm.prepare.workspace import save_state

UNDER_WAY = "under-way.pt"
KEEP_EVERY_S = 30.0
LONG_S = 45.0  # a conversation that takes longer is kept unfinished
LONG_AGO = -math.inf  # when one that an earlier start kept began: it is always kept again
STEP_TARGET_S = 0.5  # of a step with all slots in use: more requests at once would only make each take longer
FEWEST_SLOTS = 16  # that slow steps lead to; where memory allows fewer, it stays at those
STEPS_TIMED = 20
MOST_FAILURES = 500  # prompts in a row that lead to nothing
PRIOR_ANSWERS = 32
CUT_ANSWER_TOKENS = 16  # an unfinished answer is used from there on
NUM_DRAFT_FIELDS = 3  # of an unfinished prompt on disk; an answer has four
# Decoding temperature of one conversation after another: mostly greedy, which is also how agreement is measured.
DRAFT_TEMPERATURE = 1.0  # of prompts that the model writes
TEMPERATURES = (0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.8, 0.0)


@dataclass(slots=True)
class Answer:
    """A conversation under way."""

    prompt: Prompt
    temperature: float
    tokens: list[int] = field(default_factory=list)
    earlier: dict[int | str, torch.Tensor] = field(default_factory=dict)  # rows from before this start
    began_s: float = field(default_factory=lambda: time.monotonic())  # its prompt, where the model wrote that
    draft: int | None = None  # number of the draft that its prompt was


@dataclass(slots=True)
class Draft:
    """A prompt that is being written."""

    number: int
    opening: Opening
    text: str = ""
    began_s: float = field(default_factory=lambda: time.monotonic())


class Synthesiser:
    """slots: conversations at once, at most; row_s: what each of them may add to a step, at most; 0: not known."""

    def __init__(
        self,
        llm: Any,
        store: RowStore,
        prompts: PromptSource,
        *,
        depths: tuple[int, ...],
        max_prompt_tokens: int,
        max_answer_tokens: int,
        slots: int,
        seed: int,
        row_s: float = 0.0,
    ) -> None:
        self.engine = llm.llm_engine
        self.store, self.prompts = store, prompts
        self.capture = Capture(llm, depths=depths)
        self.max_prompt_tokens, self.max_answer_tokens = max_prompt_tokens, max_answer_tokens
        self.most_slots = slots
        self.slots = slots if row_s <= 0 else min(slots, max(FEWEST_SLOTS, int(STEP_TARGET_S / row_s)))
        self.number = int(store.facts.get("next_number", 0))  # of the next conversation
        self.work: dict[str, Answer | Draft] = {}  # by request
        self.finished: list[Conversation] = []  # not in the store yet
        self.ended = list(store.ended)  # drafts of finished conversations, which may be on disk as under way
        self.step_s: list[float] = []
        self.failures = self.requests = 0
        self.kept_at = time.monotonic()
        self.splits = store.splits()  # of finished conversations
        prompts.learn(store)
        torch.manual_seed(random.Random(f"{seed}/{self.number}").getrandbits(32))
        self._go_on()

    @property
    def answer_tokens(self) -> int:
        return self.store.counts["answer_tokens"] + sum(len(item.answer) for item in self.finished)

    @property
    def tokens_under_way(self) -> int:
        return sum(len(work.tokens) for work in self.work.values() if isinstance(work, Answer))

    def has_all_splits(self, *, cut: bool) -> bool:
        """Whether there are rows of each split, with what `cut` would leave or without."""
        answers = (work for work in self.work.values() if isinstance(work, Answer) and _is_usable(work))
        under_way = {work.prompt.split for work in answers} if cut else set()
        return len(self.splits | under_way) == len(SPLIT_NAMES)

    def run(
        self,
        *,
        tokens: float,
        most_tokens: float,
        enough: Callable[[], bool],
        on_step: Callable[[], None] = lambda: None,
        on_kept: Callable[[], None] = lambda: None,
    ) -> None:
        """Work until there are `tokens` answer tokens and some of each split, or `enough()` says so; what is under way
        then is kept too.

        most_tokens: what is wanted in the end; no more is begun than may lead there. on_kept: after each time that
        work was kept.
        """
        while (self.answer_tokens < tokens or len(self.splits) < len(SPLIT_NAMES)) and not enough():
            self._fill(most_tokens)
            began = time.monotonic()
            outputs = self.engine.step()
            self._adapt_slots(time.monotonic() - began)
            for output in outputs:
                self._take(output)
            on_step()
            if time.monotonic() - self.kept_at >= KEEP_EVERY_S:
                self.keep()
                on_kept()
        self.keep(all_under_way=True)
        on_kept()

    def cut(self) -> None:
        """End here: what is under way is used as far as it is."""
        for request, work in list(self.work.items()):
            if isinstance(work, Answer) and _is_usable(work):
                self._finish(request, work)
        self.engine.abort_request(list(self.work))
        self.work.clear()
        self.keep()

    # ---- requests

    def _fill(self, most_tokens: float) -> None:
        most = min(self.slots, max(1.0, (most_tokens - self.answer_tokens) / self._mean_answer()))
        while len(self.work) < most:
            drawn = self.prompts.draw(self.number)
            if isinstance(drawn, Opening):
                self._write(Draft(self.number, drawn))
            elif drawn is not None:
                self._answer(Answer(drawn, TEMPERATURES[self.number % len(TEMPERATURES)]))
            else:
                self._failed()
            self.number += 1

    def _mean_answer(self) -> float:
        """Tokens of an answer, by those there are; the first to finish are short ones."""
        number = self.store.counts["conversations"] + len(self.finished)
        return (self.answer_tokens + PRIOR_ANSWERS * self.max_answer_tokens / 2) / (number + PRIOR_ANSWERS)

    def _write(self, draft: Draft) -> None:
        from vllm import SamplingParams

        ids = self.prompts.start(draft.opening, draft.text)
        left = self.max_prompt_tokens - len(ids) + len(self.prompts.start(draft.opening))
        if left <= 0 or not 0 < len(ids) <= self.prompts.chat.longest:
            self.prompts.failed(draft.opening)
            return self._failed()
        params = SamplingParams(temperature=0.0, max_tokens=left, **self.prompts.chat.stops(draft.opening.after))
        self.capture.draw(self._add(draft, ids, params), DRAFT_TEMPERATURE)

    def _answer(self, answer: Answer) -> None:
        from vllm import SamplingParams

        self.prompts.asked(answer.prompt.ids)
        left = self.max_answer_tokens - len(answer.tokens)
        context = answer.prompt.ids + answer.tokens
        params = SamplingParams(temperature=0.0, max_tokens=left, detokenize=False)
        request = self._add(answer, context, params)
        self.capture.watch(request, len(context))
        self.capture.draw(request, answer.temperature)

    def _add(self, work: Answer | Draft, ids: list[int], params: Any) -> str:
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.DELTA
        request = f"{self.requests}"
        self.requests += 1
        salt = {"cache_salt": request} if isinstance(work, Answer) and needs_last_rows(len(ids)) else {}
        self.engine.add_request(request, {"prompt_token_ids": ids, **salt}, params)
        self.work[request] = work
        return request

    def _take(self, output: Any) -> None:
        work, news = self.work[output.request_id], output.outputs[0]
        if isinstance(work, Answer):
            work.tokens += news.token_ids
            if output.finished:
                self._finish(output.request_id, work)
            return
        work.text += news.text
        if output.finished:
            del self.work[output.request_id]
            self.capture.forget(output.request_id)
            prompt = self.prompts.written(work.opening, work.text)
            if prompt is None:
                self._failed()
            else:
                temperature = TEMPERATURES[work.number % len(TEMPERATURES)]
                self._answer(Answer(prompt, temperature, began_s=work.began_s, draft=work.number))

    def _finish(self, request: str, work: Answer) -> None:
        del self.work[request]
        if not work.tokens:
            self.capture.forget(request)
            self.prompts.failed(work.prompt)
            return self._failed()
        rows = _joined(work.earlier, self.capture.rows_so_far(request))
        self.capture.forget(request)
        made = conversation_of(work.prompt.ids, work.tokens, rows)
        self.finished.append(made._replace(split=work.prompt.split, kind=work.prompt.kind))
        if work.draft is not None:
            self.ended.append(work.draft)
        self.splits.add(work.prompt.split)
        self.prompts.answered(work.prompt, work.tokens)
        self.failures = 0

    def _failed(self) -> None:
        self.failures += 1
        if self.failures >= MOST_FAILURES:
            raise RuntimeError(f"the last {self.failures} prompts were empty, too long, known or without an answer")

    def _adapt_slots(self, step_s: float) -> None:
        """Fewer slots where a step takes long, more where it does not; the fastest of several steps counts, as others
        may use the machine."""
        self.step_s.append(step_s)
        if len(self.step_s) >= STEPS_TIMED:
            fastest = min(self.step_s)
            if len(self.work) >= self.slots > FEWEST_SLOTS and fastest > STEP_TARGET_S:
                self.slots = max(FEWEST_SLOTS, int(self.slots * STEP_TARGET_S / fastest))
            elif len(self.work) >= self.slots and fastest < STEP_TARGET_S / 2:
                self.slots = min(self.most_slots, 2 * self.slots)
            self.step_s.clear()

    # ---- on disk

    def keep(self, *, all_under_way: bool = False) -> None:
        """Put what is finished into the store, and what has been under way for long beside it."""
        self.store.append(self.finished, ended=self.ended, next_number=self.number, **self.prompts.facts())
        self.finished.clear()
        self.kept_at = now = time.monotonic()
        long = [(request, work) for request, work in self.work.items() if all_under_way or now - work.began_s > LONG_S]
        unfinished: list[tuple[Any, ...]] = []
        for request, work in long:
            if isinstance(work, Draft):
                unfinished.append((work.number, _plain(work.opening), work.text))
                continue
            rows = _joined(work.earlier, self.capture.rows_so_far(request))
            kept = len(rows["final"]) - 1 if rows else 0  # the last token's row is not computed yet
            unfinished.append((tuple(work.prompt), work.temperature, work.tokens[:kept], rows if kept > 0 else {}))
        save_state(unfinished, self.store.folder / UNDER_WAY, private=True)
        self.ended.clear()

    def _go_on(self) -> None:
        """With what an earlier start left unfinished; one that was killed between two files may have finished it."""
        path = self.store.folder / UNDER_WAY
        if not path.is_file():
            return
        for kept in torch.load(path, weights_only=True):
            if len(kept) == NUM_DRAFT_FIELDS:
                number, opening, text = kept
                if number in self.ended:
                    continue
                self.prompts.goes_on(Opening(*opening))
                self._write(Draft(number, Opening(*opening), text, began_s=LONG_AGO))
                continue
            prompt, temperature, tokens, rows = kept
            asked = Prompt(*prompt)
            if self.prompts.is_new(asked.ids) and len(tokens) < self.max_answer_tokens:
                self.prompts.goes_on(asked)
                self._answer(Answer(asked, temperature, list(tokens), rows, began_s=LONG_AGO))


def _is_usable(work: Answer) -> bool:
    """Whether an answer that ends here is of use."""
    return len(work.tokens) >= CUT_ANSWER_TOKENS


def _plain(opening: Opening) -> tuple[str, str, str, int, int]:
    return opening.before, opening.text, opening.after, opening.kind, opening.split


def _joined(
    earlier: dict[int | str, torch.Tensor], rows: dict[int | str, torch.Tensor]
) -> dict[int | str, torch.Tensor]:
    """Rows of one conversation: the later ones begin with the last of the earlier ones."""
    if not earlier or not rows:
        return earlier or rows
    return {key: torch.cat([value, rows[key][1:]]) for key, value in earlier.items()}


def generate_rows(
    llm: Any,
    capture: Capture,
    prompts: list[list[int]],
    *,
    temperature: float,
    max_tokens: int,
    on_answers: Callable[[int], None] = lambda done: None,
) -> list[Conversation | None]:
    """Answer every prompt (token ids): the conversations with what the capture recorded, None for an empty answer.
    on_answers: called with how many there are."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    params = SamplingParams(
        temperature=temperature, max_tokens=max_tokens, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False
    )
    for number, prompt in enumerate(prompts):
        capture.watch(f"{number}", len(prompt))
        engine.add_request(f"{number}", {"prompt_token_ids": prompt}, params)
    answers: list[Conversation | None] = [None] * len(prompts)
    done = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            number, tokens = int(output.request_id), list(output.outputs[0].token_ids)
            if tokens:
                answers[number] = capture.take(output.request_id, prompts[number], tokens)
            else:
                capture.forget(output.request_id)
            done += 1
            on_answers(done)
    return answers
