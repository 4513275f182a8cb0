"""The prompts of a preparation: the user's, next turns after an answer, questions about texts that the model wrote, and
openings for the model to go on with."""

import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple

from apparate_llm.prepare.chat import MIN_PROMPT_TOKENS, ChatFormat, LeftOut
from apparate_llm.prepare.rows import TEST, TRAIN, VALIDATION
from apparate_llm.prepare.splits import next_split, splits_of_prompts
from apparate_llm.prepare.store import RowStore
from apparate_llm.prepare.topics import (
    CODE_OPENINGS,
    NEXT_TURNS,
    NEXT_TURNS_ON_CODE,
    OPENINGS,
    PASSAGE_TASKS,
    SYSTEM_PROMPTS,
)

Messages = list[dict[str, str]]
KINDS = ("open", "code", "passage", "user")  # of a prompt; the last are the user's own

NEXT_TURN_SHARE = 0.4  # of the prompts go on after an answer: they cost least, as all before them was computed
MOST_TURNS_TOKENS = 640  # of what is gone on with
MOST_ANSWERS = 64  # of each split that can be gone on with: the newest, whose keys and values are still there
PASSAGE_SHARE = 0.3  # of the others ask about a text that the model wrote earlier; fewer the more it writes code
# So much of the rest opens like a programmer's, until the model shows what it is made for: an empty opening gives what
# its training data asked (Xu et al., Magpie, ICLR 2025), and these answers hold code or not.
CODE_SHARE, CODE_PRIOR = 0.3, 20  # answers that this first guess counts for
CODE_MARK = "```"
USER_SHARE = 1 / 3  # of the prompts, while those given by the user last
SYSTEM_SHARE = 0.3  # have another system prompt than the chat template's own
MIN_PASSAGE_TOKENS = 96
MIN_PROMPT_CHARACTERS = 8
MOST_PASSAGES = 2000  # of each split that are remembered: the newest


class Prompt(NamedTuple):
    ids: list[int]
    kind: int
    split: int
    is_free: bool = False  # of an empty opening


@dataclass(frozen=True, slots=True)
class Opening:
    """The beginning of a prompt that the model is to write."""

    before: str
    text: str
    after: str
    kind: int
    split: int


class PromptSource:
    """Draws the prompt of conversation 0, 1, 2, ...; what it draws depends on the seed, the number and what was
    answered before."""

    def __init__(self, chat: ChatFormat, *, user_prompts: list[Messages], seed: int) -> None:
        self.chat = chat
        self.seed = str(seed)
        asked, _ = chat.render_all(user_prompts)
        splits = splits_of_prompts(user_prompts, self.seed)
        self._user = deque(Prompt(ids, KINDS.index("user"), splits[number]) for number, ids in asked)
        self._seen: set[int] = set()
        self.free_answers = self.free_code = 0  # answers to prompts of empty openings, and those with code
        self._counts: Counter[int] = Counter()  # of conversations by split, the user's left out
        self._passages: dict[int, deque[list[int]]] = {
            split: deque(maxlen=MOST_PASSAGES) for split in (TRAIN, VALIDATION, TEST)
        }
        self._answers: dict[int, deque[tuple[Prompt, list[int]]]] = {
            split: deque(maxlen=MOST_ANSWERS) for split in (TRAIN, VALIDATION, TEST)
        }

    def learn(self, store: RowStore) -> None:
        """Know what was asked and answered before this start."""
        self.free_answers, self.free_code = store.facts.get("free_answers", 0), store.facts.get("free_code", 0)
        for text in store.texts():
            prompt = Prompt(text.prompt, text.kind, text.split)
            self.asked(prompt.ids)
            self.goes_on(prompt)
            self.answered(prompt, text.answer)
        self._user = deque(prompt for prompt in self._user if self.is_new(prompt.ids))

    def asked(self, ids: list[int]) -> None:
        self._seen.add(hash(tuple(ids)))

    def goes_on(self, prompt: Prompt | Opening) -> None:
        """One that was drawn before this start."""
        self._counts[prompt.split] += prompt.kind != KINDS.index("user")

    def failed(self, prompt: Prompt | Opening) -> None:
        """No conversation came of it."""
        self._counts[prompt.split] -= prompt.kind != KINDS.index("user")

    def facts(self) -> dict[str, int]:
        """What `learn` finds in the store again."""
        return {"free_answers": self.free_answers, "free_code": self.free_code}

    @property
    def code_share(self) -> float:
        return (CODE_SHARE * CODE_PRIOR + self.free_code) / (CODE_PRIOR + self.free_answers)

    def answered(self, prompt: Prompt, answer: list[int]) -> None:
        if prompt.is_free:
            self.free_answers += 1
            self.free_code += self._has_code(answer)
        if len(answer) >= MIN_PASSAGE_TOKENS:
            self._passages[prompt.split].append(answer)
        is_short = len(prompt.ids) + len(answer) <= MOST_TURNS_TOKENS
        if is_short and KINDS[prompt.kind] in ("open", "code") and self.chat.can_go_on(answer):
            self._answers[prompt.split].append((prompt, answer))

    def is_new(self, ids: list[int]) -> bool:
        """Whether a prompt fits in the context and was not asked yet."""
        return MIN_PROMPT_TOKENS <= len(ids) <= self.chat.longest and hash(tuple(ids)) not in self._seen

    def draw(self, number: int) -> Prompt | Opening | None:
        """None where what came up was asked before."""
        rng = random.Random(f"{self.seed}/{number}")
        if self._user and rng.random() < USER_SHARE:
            prompt = self._user.popleft()
            return prompt if self.is_new(prompt.ids) else None
        split = next_split(self._counts)
        if self._answers[split] and rng.random() < NEXT_TURN_SHARE:
            return self._next_turn(split, rng)
        if self._passages[split] and rng.random() < PASSAGE_SHARE * (1 - self.code_share):
            passage = self.chat.tokenizer.decode(rng.choice(self._passages[split]), skip_special_tokens=True).strip()
            before, after = self._affixes(rng)
            ids = self._encode(before + rng.choice(PASSAGE_TASKS).replace("{}", passage) + after)
            if not self.is_new(ids):
                return None
            self._counts[split] += 1
            return Prompt(ids, KINDS.index("passage"), split)
        kind = "code" if rng.random() < self.code_share else "open"
        before, after = self._affixes(rng)
        text = rng.choice(CODE_OPENINGS if kind == "code" else OPENINGS)
        self._counts[split] += 1
        return Opening(before, text, after, KINDS.index(kind), split)

    def _next_turn(self, split: int, rng: random.Random) -> Prompt | None:
        before, answer = self._answers[split].pop()
        words = rng.choice(NEXT_TURNS_ON_CODE if self._has_code(answer) else NEXT_TURNS)
        ids = before.ids + answer + self.chat.next_turn(words)
        if not self.is_new(ids):
            return None
        self._counts[split] += 1
        return Prompt(ids, before.kind, split)

    def written(self, opening: Opening, text: str) -> Prompt | None:
        """The prompt that the model made of an opening; None if it is no good."""
        text = (opening.text + text).strip()
        ids = self._encode(opening.before + text + opening.after)
        if len(text) < MIN_PROMPT_CHARACTERS or not self.is_new(ids):
            self.failed(opening)
            return None
        return Prompt(ids, opening.kind, opening.split, is_free=not opening.text)

    def start(self, opening: Opening, text: str = "") -> list[int]:
        """Token ids that the model goes on from when it writes a prompt, of which there is `text` already; none where
        the tokenizer refuses."""
        try:
            return self.chat.start(opening.before + opening.text + text)
        except LeftOut:
            return []

    def _has_code(self, answer: list[int]) -> bool:
        return CODE_MARK in self.chat.tokenizer.decode(answer)

    def _encode(self, text: str) -> list[int]:
        """None of it where the tokenizer refuses."""
        try:
            return self.chat.encode(text)
        except LeftOut:
            return []

    def _affixes(self, rng: random.Random) -> tuple[str, str]:
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < SYSTEM_SHARE else None
        return self.chat.affixes(system)
