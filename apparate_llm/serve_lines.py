"""What a terminal shows of a server, whose log goes to a file: six lines, and what goes wrong."""

import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from apparate_llm.config import ConfigError, EarlyExitConfig
from apparate_llm.machine import writable_cache
from apparate_llm.vllm_flags import given_value

NOTE = " (with --verbose on this terminal)"
ANY_HOST = ("", "0.0.0.0", "::", "None", "auto")  # all addresses of this machine
WITHOUT_PAGES = ("--headless", "--grpc")  # flags of servers that answer no HTTP
INIT = 1  # process number of what a container runs
FIRST_WORD_S, EVERY_S = 20.0, 60.0  # of a start that takes long
PROBE_TIMEOUT_S = 0.2
GUIDE = Path(__file__).resolve().parents[1] / "docs" / "serving.md"  # where we run from a checkout


def hides_log(*, verbose: bool, port: int, vllm_flags: Sequence[str]) -> bool:
    """Whether vLLM's log goes to a file. A service's or a container's stays where it is, and so does one that somebody
    has sent elsewhere."""
    on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))
    is_for_people = on_terminal and os.getpid() != INIT and not verbose
    return is_for_people and port != 0 and not any(flag in WITHOUT_PAGES for flag in vllm_flags)


def log_file(port: int) -> Path | None:
    """One for each port, the last start's beside it; None where nothing can be kept."""
    try:
        folder = writable_cache() / "logs"
        folder.mkdir(exist_ok=True)
        log = folder / f"serve-{port}.log"
        if log.exists():
            log.replace(log.with_suffix(".previous.log"))
        return log
    except (ConfigError, OSError):
        return None


class ServeLines:
    """Of one server, from its start on. config: its options; vllm_flags: its other ones, in one spelling."""

    def __init__(
        self, model: str, config: EarlyExitConfig, *, host: str | None, port: int, vllm_flags: list[str]
    ) -> None:
        self.model = given_value(vllm_flags, "served-model-name") or model
        self.config = config
        self.host = "localhost" if (host or "") in ANY_HOST else str(host)
        self.port = port
        self.socket = given_value(vllm_flags, "uds")
        is_secure = any(given_value(vllm_flags, name) is not None for name in ("ssl-keyfile", "ssl-certfile"))
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"{'https' if is_secure else 'http'}://{shown}:{port}"
        self.has_routes_page = "--disable-fastapi-docs" not in vllm_flags
        self._began_s = time.monotonic()
        self._next_word_s = FIRST_WORD_S
        self._is_ready = False

    def first(self) -> list[str]:
        return [f"Model: {self.model}", f"Exits: {exits_line(self.config)}"]

    def ready(self, took_s: float) -> list[str]:
        if self.socket is not None:
            return [f"API: /v1 on the socket {self.socket}, ready after {took_s:.0f} s. Ctrl-C ends the server."]
        lines = [f"API: {self.url}/v1, ready after {took_s:.0f} s. Ctrl-C ends the server."]
        if self.config.policy != "off":
            lines.append(f"Page: {self.url}/early_exit/ shows the exits live, with a switch.")
        docs = [f"{self.url}/docs has all routes"] if self.has_routes_page else []
        docs += [str(GUIDE)] if GUIDE.is_file() else []
        return [*lines, f"Docs: {', '.join(docs)}."] if docs else lines

    def beat(self, console: Console) -> None:
        """Look whether it listens by now. Called several times a second."""
        if self._is_ready:
            return
        took_s = time.monotonic() - self._began_s
        if self._listens():
            self._is_ready = True
            for line in self.ready(took_s):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif took_s >= self._next_word_s:
            self._next_word_s += EVERY_S
            word = f"Still loading after {took_s:.0f} s. The first start compiles the model, which takes minutes."
            console.print(word, style="dim", highlight=False, soft_wrap=True)

    def _listens(self) -> bool:
        """vLLM binds its address early, and listens when it is ready."""
        with suppress(OSError):
            if self.socket is None:
                socket.create_connection((self.host, self.port), PROBE_TIMEOUT_S).close()
                return True
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(PROBE_TIMEOUT_S)
                probe.connect(self.socket)
                return True
        return False


def exits_line(config: EarlyExitConfig) -> str:
    if config.policy == "off":
        return "off (--policy off), this is plain vLLM"
    bound = config.accuracy_bound
    if bound == 0:
        return "on, lossless (accuracy bound 0): each token is the full model's."
    if config.bound_kind == "regret":
        return f"on, accuracy bound {bound:g} nats per token (regret)."
    return f"on, accuracy bound {bound:g}: at most {100 * bound:g} % of tokens differ from the full model's."
