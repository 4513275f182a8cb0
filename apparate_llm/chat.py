"""`apparate-llm chat`: a conversation with a running server, each token coloured by where it came from."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apparate_llm.address import add_api_key, authorization, server_url
from apparate_llm.flags import Commands, OneLineParser, positive
from apparate_llm.renamed import ORIGINS
from apparate_llm.sse import event_data

if TYPE_CHECKING:
    import httpx
    from rich.console import Console
    from rich.text import Text

BLUE, GREEN, RED = "#2073df", "#20884b", "#da362b"  # as legible on black as on white; a terminal's own blue is not
STYLES = {  # origin of a token -> how it is shown
    "checked": "",
    "held": BLUE,
    "held_divergence": f"{RED} underline",
    "released": GREEN,
    "released_divergence": f"{RED} underline",
    "unverified": f"{GREEN} italic",
}
LEGEND = (("checked", "checked"), ("held", "held"), ("released", "released"), ("released_divergence", "divergence"))
CONNECT_TIMEOUT_S = 5.0
TOKEN_TIMEOUT_S = 300.0


def add_chat(subparsers: Commands) -> None:
    parser: OneLineParser = subparsers.add_parser(
        "chat",
        help="talk to a running server in the terminal",
        description="Talks to a running server. Each answer is coloured by where its tokens came from, with its time "
        "per output token below. An empty line or Ctrl-D ends it, /new begins a new conversation.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--url",
        default="http://localhost:8000",
        help="address of the server, with or without /v1 (default: %(default)s)",
    )
    parser.add_argument("--model", help="name of the model (default: the server's first)")
    parser.add_argument(
        "--max-tokens", type=positive, default=512, help="longest answer, in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: always the best token; above: drawn at random (default: %(default)s)",
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--no-exits", action="store_true", help="ask for answers without exits, to compare")
    add_api_key(parser)
    parser.set_defaults(run=run_chat)


@dataclass(slots=True)
class Answer:
    """One answer as it comes in."""

    text: str = ""
    report: dict[str, Any] | None = None  # from a server with early exits
    num_tokens: int = 0
    sent_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float = 0.0

    def take(self, chunk: dict[str, Any]) -> None:
        """Raises RuntimeError for an error that the server sends instead of a token."""
        if "error" in chunk:
            error = chunk["error"]
            raise RuntimeError(f"the server says: {error.get('message', error) if isinstance(error, dict) else error}")
        self.num_tokens = (chunk.get("usage") or {}).get("completion_tokens", self.num_tokens)
        self.report = next(iter(chunk.get("early_exit", ())), self.report)
        text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        if text:
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s
            self.text += text

    @property
    def tpt_ms(self) -> float | None:
        """None for an answer of less than two tokens."""
        if self.first_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) * 1e3 / (self.num_tokens - 1)

    def note(self) -> str:
        """One line on its speed and its tokens."""
        if self.first_s is None:
            return "no text"
        parts = [f"first token after {(self.first_s - self.sent_s) * 1e3:.0f} ms"]
        if self.tpt_ms is not None:
            parts.insert(0, f"{self.tpt_ms:.1f} ms per token")
        parts.append(f"{self.num_tokens} tokens")
        if self.report is not None:
            tokens = self.report["tokens"]
            parts += [f"{tokens[name]} {name}" for name in ("checked", "held", "released")]
            known, unverified = self.report["divergences"], tokens["unverified"]
            counted = f"{known} divergence{'s' * (known != 1)}"
            parts.append(f"{counted}, {known + unverified} at worst ({unverified} without a verdict)")
        else:
            parts.append("the server has no early exits")
        return " · ".join(parts)

    def coloured(self) -> "Text":
        """As rich shows it: plain until the report has come."""
        from rich.text import Text

        if self.report is None:
            return Text(self.text)
        shown = Text()
        for origin, text in zip(self.report["origins"], self.report["texts"], strict=True):
            shown.append(text, STYLES.get(ORIGINS.get(origin, origin), ""))
        return shown


class ChatClient:
    """Raises RuntimeError where the server cannot be reached or refuses, ValueError for a URL that is none."""

    def __init__(self, args: argparse.Namespace) -> None:
        import httpx

        self.url = server_url(args.url, "--url")
        timeout = httpx.Timeout(TOKEN_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self.http = httpx.Client(base_url=self.url, headers=authorization(args.api_key), timeout=timeout)
        self.options = {"early_exit_report": 1} | ({"early_exit": 0} if args.no_exits else {})
        self.body = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        self.body["model"] = args.model or self._first_model()

    def _first_model(self) -> str:
        import httpx

        try:
            answer = self.http.get("/v1/models")
            answer.read()
        except httpx.HTTPError as error:
            raise RuntimeError(
                f"no server answers at {self.url}: {error}; start one with `apparate-llm serve`"
            ) from None
        self._check(answer)
        try:
            return str(answer.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise RuntimeError(f"{self.url} is no OpenAI-compatible server: {answer.text[:100]}") from None

    def _check(self, answer: "httpx.Response") -> None:
        if answer.status_code == 401:
            raise RuntimeError("the server wants another API key: --api-key KEY")
        if answer.status_code != 200:
            raise RuntimeError(f"the server answers with HTTP {answer.status_code}: {answer.text[:300]}")

    def _take(self, answer: Answer, chunk: str) -> None:
        try:
            answer.take(json.loads(chunk))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RuntimeError(f"{self.url} is no OpenAI-compatible server: {chunk[:100]}") from None

    def ask(self, messages: list[dict[str, str]], options: dict[str, int | float] | None = None) -> Iterator[Answer]:
        """The answer, again after every chunk. options: instead of the command's, in `vllm_xargs`."""
        import httpx

        body = {
            **self.body,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "vllm_xargs": self.options if options is None else options,
        }
        answer = Answer()
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                self._check(response)
                for chunk in event_data(response.iter_bytes()):
                    if chunk != "[DONE]":
                        self._take(answer, chunk)
                        yield answer
        except httpx.HTTPError as error:
            raise RuntimeError(f"the server went away: {error or type(error).__name__}") from None


def run_chat(args: argparse.Namespace) -> int:
    from rich.console import Console

    client = ChatClient(args)
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(
            f"{client.body['model']} at {client.url}. Tokens: {legend()}. An empty line ends, /new begins anew."
        )
    begin = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(begin)
    while (text := read_line(console)) is not None:
        if text == "/new":
            messages = list(begin)
            continue
        messages.append({"role": "user", "content": text})
        answer = show(console, client.ask(messages))
        messages.append({"role": "assistant", "content": answer.text})
    return 0


def legend() -> str:
    """What the colours mean, as rich's markup."""
    return "  ".join(f"[{STYLES[name] or 'none'}]{title}[/]" for name, title in LEGEND)


def read_line(console: "Console") -> str | None:
    """What the user says; None at the end."""
    try:
        line = console.input("[bold]> [/]") if sys.stdin.isatty() else input()
    except EOFError:
        return None
    return line.strip() or None


def end_of(text: str, console: "Console", width: int, height: int) -> "Text":
    """As many of the last lines as fit."""
    from rich.text import Text

    return Text("\n").join(Text(text).wrap(console, width)[-height:])


def show(console: "Console", answers: Iterator[Answer]) -> Answer:
    """Stream one answer to the terminal, as much of it as fits; in the end all of it, in its colours."""
    from rich.live import Live

    answer = Answer()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for answer in answers:
            if console.is_terminal:
                live.update(end_of(answer.text, console, console.width, console.height - 2), refresh=True)
    console.print(answer.coloured(), soft_wrap=not console.is_terminal)
    console.print(answer.note(), style="dim", soft_wrap=not console.is_terminal)
    return answer
