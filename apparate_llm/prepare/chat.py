"""The model's chat format: what it is asked, as token ids up to where its answer starts.

As a server of the model writes it, by the model's chat template. A model without one that can be used gets plain text,
as `/v1/completions` takes it: a paragraph for each message, whoever said it, and the answer is the next paragraph.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from apparate_llm.eval.prompts import parts_of, text_of

Message = Mapping[str, object]  # `role`, and a content of any kind
Chat = Sequence[Message]

MIN_PROMPT_TOKENS = 2
BREAK = "\n\n"  # between paragraphs
WORDS = ("apple", "bird")  # a user's: they begin and end differently
REPLY = "mountain"
SYSTEM = "You are a helpful assistant."  # where a template wants one
DETAIL_CHARACTERS = 100

REFUSED = "the chat template refuses"
NO_TEXT = "with content that is no text"
NO_TOKENS = "the tokenizer refuses"
NOT_ANSWERED = "answered with nothing"


class LeftOut(Exception):
    """A prompt that cannot be asked. `reason` is one of few, `detail` this prompt's own."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class LeftOuts:
    """How many prompts were left out for which reason, with the first detail of each."""

    total: int  # prompts that were given
    counts: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)

    def add(self, error: LeftOut) -> None:
        self.counts[error.reason] += 1
        if error.detail:
            self.details.setdefault(error.reason, error.detail)

    def __str__(self) -> str:
        parts = [
            f"{count} {reason}" + (f" ({self.details[reason]})" if reason in self.details else "")
            for reason, count in self.counts.most_common()
        ]
        return f"{self.counts.total():,} of {self.total:,} prompts left out: {', '.join(parts)}"

    def tell(self, say: Callable[[str], None]) -> None:
        """Raises ValueError if there were prompts and none is left."""
        if 0 < self.total == self.counts.total():
            raise ValueError(f"no prompt is left: {self}")
        if self.counts:
            say(str(self))


class Ends(TypedDict, total=False):
    """Sampling parameters of vLLM's."""

    stop_token_ids: list[int]
    stop: list[str]


class ChatFormat:
    """`say` gets one line where prompts are plain text. Raises ValueError where answers of `max_answer_tokens` leave no
    room for a prompt; what a tokenizer says of its longest text does not count, the engine's context does."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_model_len: int,
        max_answer_tokens: int = 1,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.tokenizer = tokenizer
        self.longest = max_model_len - max_answer_tokens  # tokens of a prompt
        if self.longest < MIN_PROMPT_TOKENS:
            raise ValueError(
                f"answers of {max_answer_tokens:,} tokens leave no room for a prompt: the model's context has "
                f"{max_model_len:,}"
            )
        self.is_mistral = getattr(tokenizer, "IS_MISTRAL_TOKENIZER", False)  # of mistral-common, without a template
        self.template = template_of(tokenizer)
        self.in_parts = False  # contents are lists of parts
        self._affixes: dict[str | None, tuple[str, str] | None] = {}
        self._turn: list[int] | None = None  # once it was looked for
        self.is_plain = not (self.is_mistral or self.template is not None) or not self._takes_words()
        self.say = say
        if self.is_plain:
            what = "has no chat template" if self.template is None else "has a chat template that takes no user's words"
            say(f"the model {what}: prompts are plain text, a paragraph for each message")

    def render(self, messages: Chat) -> list[int]:
        """Token ids up to where the answer starts; raises LeftOut."""
        messages = [self._with_content(message) for message in messages]
        if self.is_plain:
            ids = self._first() + self.encode(_paragraphs(messages))
        elif self.is_mistral:
            ids = self._apply(messages, tokenize=True)
        else:
            ids = self.encode(self._apply(messages))
        if len(ids) > self.longest:
            raise LeftOut(f"longer than {self.longest:,} tokens")
        if len(ids) < MIN_PROMPT_TOKENS:
            raise LeftOut(f"shorter than {MIN_PROMPT_TOKENS} tokens")
        return ids

    def render_all(self, prompts: Sequence[Chat]) -> tuple[list[tuple[int, list[int]]], LeftOuts]:
        """Those that can be asked, each with its number, and how many cannot, which is said. Raises ValueError if none
        can."""
        asked, left_out = [], LeftOuts(len(prompts))
        for number, messages in enumerate(prompts):
            try:
                asked.append((number, self.render(messages)))
            except LeftOut as error:
                left_out.add(error)
        left_out.tell(self.say)
        return asked, left_out

    def affixes(self, system: str | None = None) -> tuple[str, str]:
        """Text before and after the user's words in a chat of one turn, the latter up to where the answer starts.
        Without the system prompt where the template refuses one."""
        if self.is_plain:
            first = self.tokenizer.decode(ids) if (ids := self._first()) else ""
            return first + (f"{system}{BREAK}" if system else ""), BREAK
        return next(affixes for wanted in (system, None, SYSTEM) if (affixes := self._around(wanted)) is not None)

    def can_go_on(self, answer: list[int]) -> bool:
        """Whether a user's next words can follow this answer: it ended by itself, and the template simply goes on."""
        return bool(answer) and self._turn_ids()[:1] == answer[-1:]

    def next_turn(self, words: str) -> list[int]:
        """Token ids of a user's next words, after an answer that `can_go_on`, up to where the next answer starts;
        raises LeftOut."""
        return self._turn_ids()[1:] + self.encode(words + self.affixes()[1])

    def _turn_ids(self) -> list[int]:
        """From the token that ends an answer up to the user's next words; none where there is no such token."""
        if self._turn is None:
            self._turn = []
            with suppress(LeftOut):
                if not self.is_plain and (between := self._between_turns()):
                    self._turn = self.encode(between)
        return self._turn

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that holds its special tokens; raises LeftOut."""
        try:
            if self.is_mistral:
                return self._encode_mistral(text)
            # With a length to go by, the tokenizer does not warn of its own.
            ids: list[int] = self.tokenizer.encode(
                text, add_special_tokens=False, truncation=False, max_length=self.longest
            )
            return ids
        except Exception as error:  # e.g. half of a surrogate pair
            raise LeftOut(NO_TOKENS, _short(error)) from None

    def start(self, text: str) -> list[int]:
        """Token ids of how a prompt starts that the model is to write on. Never none: where there is no text yet the
        model gets a token that texts begin with."""
        given = (getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        return self.encode(text) or [next((token for token in given if token is not None), 0)]

    def stops(self, after: str) -> Ends:
        """Sampling parameters that end the user's words where `after` begins."""
        ids = self.encode(after)
        if ids and ids[0] in {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}:
            return {"stop_token_ids": ids[:1]}
        return {"stop": [after.strip() or after]} if after else {}

    # ---- the template

    def _takes_words(self) -> bool:
        """Whether the user's words get into a chat, as a text or as a list of parts."""
        for self.in_parts in (False, True):
            self._affixes.clear()
            if self._around(None) is not None or self._around(SYSTEM) is not None:
                return True
        self.in_parts = False
        return False

    def _around(self, system: str | None) -> tuple[str, str] | None:
        """What chats of one turn share before and behind the user's words, whatever the template makes of these.
        None: they are refused, or the words left out."""
        if system not in self._affixes:
            head = [] if system is None else [{"role": "system", "content": system}]
            try:
                one, other = (
                    self._apply([self._with_content(m) for m in (*head, {"role": "user", "content": word})])
                    for word in WORDS
                )
                before, after = _shared_start(one, other), _shared_start(one[::-1], other[::-1])[::-1]
                self._affixes[system] = (before, after) if one != other else None
            except LeftOut:
                self._affixes[system] = None
        return self._affixes[system]

    def _between_turns(self) -> str | None:
        """What stands between an answer and the user's next words."""
        system = next(wanted for wanted in (None, SYSTEM) if self._around(wanted) is not None)
        before, after = self.affixes(system)
        head = [] if system is None else [{"role": "system", "content": system}]
        turns = [("user", WORDS[0]), ("assistant", REPLY), ("user", WORDS[1])]
        messages = [*head, *({"role": role, "content": words} for role, words in turns)]
        try:
            text: str = self._apply([self._with_content(message) for message in messages])
        except LeftOut:
            return None
        start, end = f"{before}{WORDS[0]}{after}{REPLY}", WORDS[1] + after
        return text[len(start) : -len(end)] if text.startswith(start) and text.endswith(end) else None

    def _apply(self, messages: Chat, *, tokenize: bool = False) -> Any:
        own = {} if self.is_mistral else {"chat_template": self.template}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=tokenize, add_generation_prompt=True, return_dict=False, **own
            )
        except Exception as error:  # each template refuses in its own way, some by a TypeError
            raise LeftOut(REFUSED, _short(error)) from None

    def _with_content(self, message: Message) -> Message:
        """Its content as the template takes it; raises LeftOut for an image and the like."""
        parts = parts_of(message)
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) < len(parts):
            raise LeftOut(NO_TEXT)
        if self.in_parts:
            return {**message, "content": [{"type": "text", "text": text} for text in texts]}
        return {**message, "content": "\n".join(texts)}

    def _encode_mistral(self, text: str) -> list[int]:
        """mistral-common reads its special tokens in a text as ordinary letters."""
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
            if part:
                ids += [special[part]] if part in special else self.tokenizer.encode(part, add_special_tokens=False)
        return ids

    def _first(self) -> list[int]:
        """The special tokens that this tokenizer itself puts before a text."""
        text = self.tokenizer.encode("a", add_special_tokens=False)
        whole = self.tokenizer.encode("a", add_special_tokens=True)
        return next((whole[:i] for i in range(len(whole)) if text and whole[i : i + len(text)] == text), [])


def template_of(tokenizer: object) -> str | None:
    """The chat template, of several the default one; None where there is none. `chat_template.json`, which the
    tokenizer's loader leaves to multimodal models, counts as well."""
    template = _one_of(getattr(tokenizer, "chat_template", None))
    folder = getattr(tokenizer, "name_or_path", None)
    if template is None and folder and (file := Path(folder) / "chat_template.json").is_file():
        try:
            template = _one_of(json.loads(file.read_text())["chat_template"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return template


def _one_of(template: object) -> str | None:
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}
    if isinstance(template, dict):
        template = template.get("default")
    return None if template is None else str(template)


def _paragraphs(messages: Chat) -> str:
    """One that ends its last line itself says where the answer starts."""
    text = BREAK.join(filter(None, map(text_of, messages)))
    return text if text.endswith("\n") or not text else text + BREAK


def _shared_start(one: str, other: str) -> str:
    return one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= DETAIL_CHARACTERS else text[: DETAIL_CHARACTERS - 1] + "…"
