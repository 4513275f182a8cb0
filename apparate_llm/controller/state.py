"""What the controller has learned, kept over a restart for the same model, ramps and machine."""

import hashlib
import json
import logging
import os
from pathlib import Path
from time import monotonic
from typing import Any

from apparate_llm.controller.policy import Policy
from apparate_llm.files import write_atomically

logger = logging.getLogger("vllm.apparate")
SCHEMA_VERSION = 1
SAVE_EVERY_S = 60.0
NONE = "none"


def default_path(identity: dict[str, Any], cache: Path) -> Path:
    """One file for each model, ramps and machine."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache / "controller" / f"{key}.json"


class ControllerState:
    """The state file of one server. With several ranks all read it and the first one writes."""

    def __init__(self, path: Path, identity: dict[str, Any], *, writes: bool) -> None:
        self.path = path
        self.identity = identity
        self.writes = writes
        self._saved_s = monotonic()

    def restore(self, policy: Policy) -> bool:
        """Whether `policy` took up the file's state. What is damaged or not ours is ignored with a warning."""
        try:
            document = json.loads(self.path.read_text())
            if document["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {document['schema_version']}, expected {SCHEMA_VERSION}")
            if document["identity"] != self.identity:
                theirs = {key: value for key, value in document["identity"].items() if self.identity.get(key) != value}
                raise ValueError(f"it is of another server: {theirs}")
            policy.restore(document["state"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("Controller state %s ignored: %s: %s", self.path, type(error).__name__, error)
            return False
        logger.info("Controller state taken up from %s", self.path)
        return True

    def save_now_and_then(self, policy: Policy) -> None:
        if self.writes and monotonic() - self._saved_s >= SAVE_EVERY_S:
            self.save(policy)

    def save(self, policy: Policy) -> None:
        """A file that cannot be written costs the state, not the serving."""
        self._saved_s = monotonic()
        state = policy.state()
        if not self.writes or not state:
            return
        document = {"schema_version": SCHEMA_VERSION, "identity": self.identity, "state": state}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(document).encode())
        except OSError as error:
            logger.warning("Controller state not saved to %s: %s", self.path, error)


def resolve_path(given: str | None, identity: dict[str, Any], cache: Path) -> Path | None:
    """From the knob: a file, `none`, or the default place. None: keep nothing."""
    if given == NONE:
        return None
    return Path(os.path.expanduser(given)) if given is not None else default_path(identity, cache)
