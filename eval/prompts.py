"""Prompts for an evaluation: the built-in ones or a JSONL file."""

import json
from pathlib import Path
from typing import Any

BUILT_IN = Path(__file__).parent / "prompts" / "quick.jsonl"

Messages = list[dict[str, str]]


def load_prompts(path: Path | None) -> list[Messages]:
    """One chat per line. A line holds `messages`, or `prompt`, or `turns` (the first one is asked).

    Raises ValueError naming the file and line of what is wrong.
    """
    path = path or BUILT_IN
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts {path}: {error}") from None
    prompts = [_messages(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"no prompts in {path}")
    return prompts


def load_categories(path: Path) -> list[str | None]:
    """`category` of each prompt of `load_prompts(path)`, None where a line has none."""
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [None if record.get("category") is None else str(record["category"]) for record in records]


def _messages(line: str, where: str) -> Messages:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    if "messages" in record:
        messages = record["messages"]
        ok = isinstance(messages, list) and messages
        if not ok or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
            raise ValueError(f"{where}: `messages` must be a list of objects with role and content")
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
