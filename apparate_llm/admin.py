"""The admin key on its way from the command line to the API process, which may be a child or a fork: only its digest
travels. Imports nothing heavy."""

import hashlib
import os
from collections.abc import Mapping, Sequence

from apparate_llm.config import ConfigError

KEY_VARIABLE = "APPARATE_ADMIN_KEY"  # the user's: one key
DIGESTS_VARIABLE = "APPARATE_ADMIN_KEYS_SHA256"  # ours: of the keys of --admin-key, joined by commas


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def check_admin_keys(given: Sequence[str]) -> None:
    """Raises ConfigError, which does not repeat the key."""
    for key in given:
        if not key or key != key.strip() or not (key.isascii() and key.isprintable()):
            raise ConfigError("--admin-key: must be printable ASCII, not empty, without blanks around it")


def pass_on_admin_keys(given: Sequence[str]) -> None:
    """Leave digests of the admin keys in the environment, and no key. given: by flag; without, the variable counts."""
    if digests := [digest_of(key) for key in given] or admin_digests(os.environ):
        os.environ[DIGESTS_VARIABLE] = ",".join(digests)
    os.environ.pop(KEY_VARIABLE, None)


def admin_digests(environment: Mapping[str, str]) -> list[str]:
    """SHA-256 of each admin key, as hexadecimal numbers; empty where there is none."""
    digests = [digest for digest in environment.get(DIGESTS_VARIABLE, "").split(",") if digest]
    key = environment.get(KEY_VARIABLE, "").strip()
    return [*digests, digest_of(key)] if key else digests
