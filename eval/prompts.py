"""Prompts for an evaluation: a built-in set or a file."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apparate_llm.eval.code_check import check_tests

FOLDER = Path(__file__).parent / "prompts"
BUILT_IN = ("chat", "code", "copy", "quick")
HELD_OUT = FOLDER / "held_out.jsonl"
NUM_HELD_OUT = 16
DEVELOPED_WITH = FOLDER / "developed_with.json"  # digests of further prompts, by what they are

Messages = list[dict[str, str]]


class Prompt(NamedTuple):
    messages: Messages
    category: str | None = None
    reference: str | None = None  # a right answer
    tests: str | None = None  # Python asserts for the code of an answer

    @property
    def asked(self) -> str:
        return text_of(self.messages[-1])


class PromptSet(NamedTuple):
    """What is asked of a file or a built-in set."""

    name: str
    size: int  # prompts it has
    prompts: list[Prompt]  # that are asked

    def described(self) -> dict[str, int]:
        return {"size": self.size, "asked": len(self.prompts), "developed_with": developed_with(self.prompts)}


def parts_of(message: Mapping[str, object]) -> list[object]:
    """The texts of a content, which is a text, a list of parts or nothing; as it is what has no text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [] if content is None else [content]
    return [part.get("text") if isinstance(part, dict) else part for part in parts]


def text_of(message: Mapping[str, object]) -> str:
    """Its words, of whatever kind its content is."""
    return "\n".join(part for part in parts_of(message) if isinstance(part, str))


def prompt_set(source: Path | None, number: int | None) -> PromptSet:
    """The first `number` prompts, or all; raises as `prompts_to_send`."""
    prompts = prompts_to_send(source)
    return PromptSet("quick" if source is None else source.name, len(prompts), prompts[:number])


def developed_with(prompts: Sequence[Prompt]) -> int:
    """How many of them were in use while this was developed, going by their text, whatever file they come from."""
    texts, digests = _developed_with()
    return sum(prompt.asked in texts or _digest(prompt.asked) in digests for prompt in prompts)


@functools.cache
def _developed_with() -> tuple[frozenset[str], frozenset[str]]:
    """Texts of the built-in sets, and digests of others."""
    texts = frozenset(prompt.asked for name in BUILT_IN for prompt in load_prompts(Path(name)))
    return texts, frozenset(digest for digests in json.loads(DEVELOPED_WITH.read_text()).values() for digest in digests)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompts_to_send(source: Path | None) -> list[Prompt]:
    """`load_prompts` for a server, over HTTP; raises ValueError as well for a prompt that no request can hold."""
    prompts = load_prompts(source)
    for number, prompt in enumerate(prompts, 1):
        try:
            json.dumps(prompt.messages, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{source}: prompt {number} has half of a surrogate pair, which cannot be sent") from None
    return prompts


def load_prompts(source: Path | None) -> list[Prompt]:
    """The first turn of every chat of a file, or a built-in set by name (None: `quick`).

    JSONL: a line holds `messages`, or `prompt`, or `turns` (Spec-Bench, MT-bench), and may hold `category`, `reference`
    and `tests`. JSON: a list of objects with `conversations` (ShareGPT). Any other suffix: one prompt per line.
    Raises ValueError naming the file and line of what is wrong.
    """
    if source is None or str(source) in BUILT_IN:
        source = FOLDER / f"{source or 'quick'}.jsonl"
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts {source}: {error} (built-in sets: {', '.join(BUILT_IN)})") from None
    if source.suffix == ".json":
        prompts = _sharegpt(text, source)
    else:
        read = _of_line if source.suffix == ".jsonl" else _plain
        lines = enumerate(text.split("\n"), 1)
        prompts = [read(line, f"{source}:{number}") for number, line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"no prompts in {source}")
    return prompts


def held_out(asked: Sequence[Prompt]) -> list[Prompt]:
    """NUM_HELD_OUT prompts to warm up with, none of them among those asked. Raises ValueError where all are."""
    texts = {prompt.asked for prompt in asked}
    left = [prompt for prompt in load_prompts(HELD_OUT) if prompt.asked not in texts]
    if not left:
        raise ValueError(f"the prompts hold all of {HELD_OUT.name}, with which servers are warmed up: ask others")
    return [left[number % len(left)] for number in range(NUM_HELD_OUT)]


def _plain(line: str, where: str) -> Prompt:
    return Prompt([{"role": "user", "content": line.strip()}])


def _sharegpt(text: str, source: Path) -> list[Prompt]:
    try:
        chats = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON: {error}") from None
    if not isinstance(chats, list):
        raise ValueError(f"{source}: expected a list of chats with `conversations`, got {type(chats).__name__}")
    prompts = []
    for number, chat in enumerate(chats, 1):
        turns = chat.get("conversations") if isinstance(chat, dict) else None
        if not isinstance(turns, list):
            raise ValueError(f"{source}: chat {number} has no list `conversations`")
        asked = next((turn for turn in turns if isinstance(turn, dict) and turn.get("from") in ("human", "user")), None)
        if asked is not None and isinstance(asked.get("value"), str) and asked["value"].strip():
            prompts.append(Prompt([{"role": "user", "content": asked["value"]}]))
    return prompts


def _of_line(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    category, tests = record.get("category"), record.get("tests")
    if tests is not None:
        if not isinstance(tests, str):
            raise ValueError(f"{where}: `tests` must be a text")
        try:
            check_tests(tests)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return Prompt(
        _messages(record, where),
        None if category is None else str(category),
        _first_text(record.get("reference")),
        tests,
    )


def _messages(record: dict[str, Any], where: str) -> Messages:
    if "messages" in record:
        messages: Messages = record["messages"]
        ok = isinstance(messages, list) and messages
        if not ok or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
            raise ValueError(f"{where}: `messages` must be a list of objects with role and content")
        for message in messages:
            _check_message(message, where)
        return messages
    if "prompt" in record:
        text = record["prompt"]
    elif "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{where}: `turns` must be a list with at least one text")
        text = turns[0]
    else:
        raise ValueError(f"{where}: needs one of turns, prompt, messages; got {', '.join(record) or 'nothing'}")
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: the prompt must be a text that is not empty")
    return [{"role": "user", "content": text}]


def _check_message(message: Mapping[str, object], where: str) -> None:
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise ValueError(f"{where}: a role must be a text, got {type(role).__name__}")
    if content is not None and not isinstance(content, str | list):
        raise ValueError(f"{where}: a content must be a text, a list of parts or null, got {type(content).__name__}")


def _first_text(reference: object) -> str | None:
    """Spec-Bench keeps a list with one text for each turn, or a list of right answers."""
    while isinstance(reference, list) and reference:
        reference = reference[0]
    return reference if isinstance(reference, str) and reference else None
