"""What the token ids of a model mean, by the content of its tokenizer's files."""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

WHOLE_FILES = ("tekken.json", "tokenizer.model")  # of formats that are compared as they are


class TokenizerError(ValueError):
    """A model folder whose tokenizer cannot be read. The message is one line for the user."""


class Tokens(NamedTuple):
    by_id: dict[int, str]  # added ones included, fillers left out
    merges: list[str]  # of byte-pair encoding, in order; else empty


class TokenizerDigest(BaseModel):
    """Of a tokenizer. Another one is the same for ramps if it has the same tokens below `num_tokens`, whatever it adds
    above, and the same merges."""

    model_config = ConfigDict(extra="forbid")

    num_tokens: int  # the highest id and one; 0 for a file that is compared as it is
    tokens_sha256: str
    merges_sha256: str

    @classmethod
    def of(cls, model_dir: Path, num_tokens: int | None = None) -> "TokenizerDigest":
        """Of the tokens below `num_tokens`, by default all; raises TokenizerError."""
        if (whole := _whole_file(model_dir)) is not None:
            return cls(num_tokens=0, tokens_sha256=sha256(whole.read_bytes()).hexdigest(), merges_sha256=_digest([]))
        tokens = read_tokens(model_dir)
        most = 1 + max(tokens.by_id, default=-1) if num_tokens is None else num_tokens
        chosen = (f"{number}\t{text}" for number, text in sorted(tokens.by_id.items()) if number < most)
        return cls(num_tokens=most, tokens_sha256=_digest(chosen), merges_sha256=_digest(tokens.merges))

    def difference(self, model_dir: Path) -> str | None:
        """What is other in a model folder's tokenizer, if anything is; raises TokenizerError."""
        other = TokenizerDigest.of(model_dir, self.num_tokens)
        if other.num_tokens != self.num_tokens:
            return "its tokenizer is of another format"
        if other.tokens_sha256 != self.tokens_sha256:
            return "its tokenizer has other tokens" + (f" below {self.num_tokens}" if self.num_tokens else "")
        return "its tokenizer has other merges" if other.merges_sha256 != self.merges_sha256 else None


def read_tokens(model_dir: Path) -> Tokens:
    """Out of tokenizer.json, else vocab.json and merges.txt; raises TokenizerError."""
    path = model_dir / "tokenizer.json"
    try:
        if path.is_file():
            return _of_tokenizer(json.loads(path.read_text(encoding="utf-8")))
        path = model_dir / "vocab.json"
        if path.is_file():
            return _of_vocabulary(model_dir, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise TokenizerError(f"damaged {path}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    raise TokenizerError(f"no tokenizer.json in {model_dir}, nor vocab.json or {' or '.join(WHOLE_FILES)}")


def _of_tokenizer(document: Mapping[str, Any]) -> Tokens:
    model = document["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score], by id
        by_id = {number: str(entry[0]) for number, entry in enumerate(vocabulary)}
    else:
        by_id = {int(number): token for token, number in vocabulary.items()}
    by_id |= {int(added["id"]): str(added["content"]) for added in document.get("added_tokens") or []}
    merges = model.get("merges") or []
    return Tokens(without_fillers(by_id), [pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def _of_vocabulary(model_dir: Path, vocabulary: Mapping[str, int]) -> Tokens:
    by_id = {int(number): token for token, number in vocabulary.items()}
    if (added := model_dir / "added_tokens.json").is_file():
        by_id |= {int(number): token for token, number in json.loads(added.read_text(encoding="utf-8")).items()}
    merges = model_dir / "merges.txt"
    lines = merges.read_text(encoding="utf-8").split("\n") if merges.is_file() else []
    return Tokens(without_fillers(by_id), [line for line in lines if line and not line.startswith("#version")])


def without_fillers(by_id: dict[int, str]) -> dict[int, str]:
    """Without what stands for no token: GGUF files, and tokenizers made of them, name all rows of the embedding."""
    return {number: text for number, text in by_id.items() if text != f"[PAD{number}]"}


def _whole_file(model_dir: Path) -> Path | None:
    if any((model_dir / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    return next((path for name in WHOLE_FILES if (path := model_dir / name).is_file()), None)


def _digest(texts: Iterable[str]) -> str:
    digest = sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
