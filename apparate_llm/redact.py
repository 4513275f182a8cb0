"""Commands and logs without the secrets in them, as vLLM shows its own arguments. Imports nothing heavy."""

import logging
import re
from collections.abc import Iterator, Sequence

HIDDEN = "***"
SECRET_FLAGS = ("api-key", "admin-key", "hf-token", "watermark-config")  # vLLM's list, and ours
SECRET_ENDINGS = ("api-key", "token", "secret", "password", "passphrase")
FLAG_OF_FLAGS = "--vllm-flag"
SHORTEST = 3  # letters by which vLLM's parser, which takes beginnings of names, may know one of them
DIGEST = re.compile(r"\b[0-9a-f]{64}\b")  # of an API key
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # of a URL
JSON_SECRET = re.compile(r"""(["']\w*(?:api_?key|token|secret|password)["']\s*:\s*["'])[^"']+""", re.I)
VLLM_ARGUMENTS_LOGGER = "vllm.entrypoints.serve.utils.api_utils"  # writes what the server was started with


def redacted(argv: Sequence[str]) -> list[str]:
    """The arguments of a command, as they may be shown or kept."""
    return [shown for _, shown in _shown(argv)]


def without_secrets(text: str, argv: Sequence[str]) -> str:
    """A message that may repeat what the command was given."""
    hidden = {given.partition("=")[2] if given.startswith("--") else given for given, _ in _secrets(argv)}
    for secret in sorted(hidden - {""}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return hide_digests(text)


def hide_digests(text: str) -> str:
    return DIGEST.sub(HIDDEN, text)


def _secrets(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((given, shown) for given, shown in _shown(argv) if shown.endswith(HIDDEN) and given != shown)


def _shown(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each argument, and what may be shown of it."""
    hides = takes_flags = False  # what belongs to the last flag
    passed_on: list[str] = []  # flags for vLLM, of which one may be the name and the next its value
    for given in argv:
        key, equals, value = given.partition("=")
        if given.startswith("--") and " " in key and not takes_flags:  # a flag and its value as one argument
            yield given, " ".join(redacted(given.split(" ")))
            continue
        if not given.startswith("--") or " " in key:
            value, shown = given, ""
        else:
            hides, takes_flags = _is_secret(key), key == FLAG_OF_FLAGS
            shown = key + equals
        if takes_flags and value:
            passed_on += value.split(" ")
            yield given, shown + " ".join(redacted(passed_on)[-len(value.split(" ")) :])
        else:
            yield given, shown + (HIDDEN if hides and value else _hide_parts(value))


def _hide_parts(value: str) -> str:
    return hide_digests(JSON_SECRET.sub(rf"\g<1>{HIDDEN}", CREDENTIALS.sub(HIDDEN, value)))


def _is_secret(key: str) -> bool:
    name = key[2:].partition(".")[0].replace("_", "-").lower()
    is_short_form = len(name) >= SHORTEST and any(full.startswith(name) for full in SECRET_FLAGS)
    return is_short_form or name.endswith(SECRET_ENDINGS)


class _HideDigests(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide_digests(record.getMessage()), None
        return True


def hide_digests_in_vllm_log() -> None:
    """vLLM hides the API keys it was started with, but not the digests of those in our part of --additional-config."""
    logger = logging.getLogger(VLLM_ARGUMENTS_LOGGER)
    if not any(isinstance(one, _HideDigests) for one in logger.filters):
        logger.addFilter(_HideDigests())
