"""What the controller has learned, kept over a restart for the same model, ramps and machine."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from apparate_llm.config import ConfigError
from apparate_llm.controller.policy import Policy
from apparate_llm.files import write_atomically

logger = logging.getLogger("vllm.apparate")
SCHEMA_VERSION = 1
SAVE_EVERY_S = 60.0
NONE = "none"


def default_path(identity: Mapping[str, object], cache: Path) -> Path:
    """One file for each model, ramps and machine."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache / "controller" / f"{key}.json"


class ControllerState:
    """The state file of one server. Whatever is wrong with it costs what was learned, never the serving."""

    def __init__(self, path: Path, identity: Mapping[str, object], *, writes: bool) -> None:
        self.path = path
        self.identity = identity
        self.writes = writes
        self._saved_s = monotonic()

    def restore(self, policy: Policy) -> bool:
        """Whether `policy` took up the file's state. What is damaged or not ours is ignored with a warning."""
        try:
            state = self._read()
            if state is None:
                return False
            policy.restore(state)
        except Exception as error:
            logger.warning("Controller state %s ignored: %s: %s", self.path, type(error).__name__, error)
            return False
        logger.info("Controller state taken up from %s", self.path)
        return True

    def _read(self) -> dict[str, Any] | None:
        """None where there is no file; raises ValueError and others for one that is none of ours."""
        if not self.path.exists():
            return None
        self._check_file()
        document = json.loads(self.path.read_text())
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {document['schema_version']}, expected {SCHEMA_VERSION}")
        if document["identity"] != self.identity:
            theirs = {key: value for key, value in document["identity"].items() if self.identity.get(key) != value}
            raise ValueError(f"it is of another server: {theirs}")
        state: dict[str, Any] = document["state"]
        check_numbers(state)
        return state

    def _check_file(self) -> None:
        if self.path.exists() and not self.path.is_file():  # to be read for ever, or to be replaced by a file
            raise ValueError("not a regular file")

    def save_now_and_then(self, policy: Policy) -> None:
        if self.writes and monotonic() - self._saved_s >= SAVE_EVERY_S:
            self.save(policy)

    def save(self, policy: Policy) -> None:
        """A state that cannot be written is reported."""
        self._saved_s = monotonic()
        try:
            state = policy.state()
            if not self.writes or not state:
                return
            check_numbers(state)
            document = {"schema_version": SCHEMA_VERSION, "identity": self.identity, "state": state}
            self._check_file()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(document).encode())
        except Exception as error:
            logger.warning("Controller state not saved to %s: %s: %s", self.path, type(error).__name__, error)


def check_numbers(state: object) -> None:
    """Raises ValueError unless all that a state holds, whatever its shape, are finite numbers."""
    if isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            check_numbers(part)
    elif not isinstance(state, int | float) or not math.isfinite(state):
        raise ValueError(f"a state is made of finite numbers, got {state!r}")


def resolve_path(given: str | None, identity: Mapping[str, object], cache: Callable[[], Path]) -> Path | None:
    """From the option: a file, `none`, or the default place. None: keep nothing. cache: its folder, ConfigError if
    there is none."""
    if given == NONE:
        return None
    if given is not None:
        return Path(os.path.expanduser(given))
    try:
        return default_path(identity, cache())
    except ConfigError as error:
        logger.warning("Controller state is not kept: %s", error)
        return None
