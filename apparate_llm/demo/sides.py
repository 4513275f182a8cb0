"""The two sides of the demo: one prompt, answered without exits and with them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from apparate_llm.chat import Answer, ChatClient, end_of, legend, show

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

OFF, ON = "without exits", "with exits"
LEAST_WIDTH = 100  # columns of a terminal that has room for two texts
FEWEST_TOKENS = 16  # of an answer that can be timed
HEAD_LINES = 6  # of the screen, that are not the answers'
WARM_UPS = 2


class Sides:
    """Asks both sides in turns and keeps their answers, oldest first. Raises ValueError where the server has no exits,
    or its answer is too short to be timed."""

    def __init__(self, client: ChatClient, prompt: str, *, bound: float) -> None:
        self.client = client
        self.messages = [{"role": "user", "content": prompt}]
        self.options: dict[str, dict[str, int | float]] = {
            OFF: {"early_exit": 0, "early_exit_report": 1},
            ON: {"accuracy_bound": bound, "early_exit_report": 1},
        }
        self.answers: dict[str, list[Answer]] = {OFF: [], ON: []}

    @property
    def off(self) -> list[Answer]:
        return self.answers[OFF]

    @property
    def on(self) -> list[Answer]:
        return self.answers[ON]

    def warm_up(self) -> None:
        """Answers that do not count: caches fill, and the controller learns what a step costs here."""
        for _ in range(WARM_UPS):
            for side in (OFF, ON):
                answer = self._ask(side)
                if answer.report is None:
                    raise ValueError(
                        f"{self.client.url} serves without exits (its policy is off, or it is another server): "
                        "nothing to compare"
                    )
                if answer.num_tokens < FEWEST_TOKENS or answer.tpt_ms is None:
                    raise ValueError(
                        f"the answer has {answer.num_tokens} tokens, too few to time; at least {FEWEST_TOKENS} are "
                        "needed: ask for a longer answer"
                    )

    def show_first(self, console: "Console") -> None:
        """The first answers that count, as they come: in two columns where there is room."""
        if console.is_terminal:
            console.print(f"Tokens: {legend()}")
        if console.is_terminal and console.width >= LEAST_WIDTH:
            self._show_columns(console)
            return
        for side in (OFF, ON):
            console.print(f"\n{side}:", style="bold")
            self.answers[side].append(show(console, self.client.ask(self.messages, self.options[side])))
        console.print()

    def ask_again(self) -> None:
        for side in (OFF, ON):
            self.answers[side].append(self._ask(side))

    def _ask(self, side: str, look: Callable[[Answer], None] = lambda answer: None) -> Answer:
        answer = Answer()
        for answer in self.client.ask(self.messages, self.options[side]):
            look(answer)
        return answer

    def _show_columns(self, console: "Console") -> None:
        from rich.live import Live

        shown = {OFF: Answer(), ON: Answer()}
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for side in (OFF, ON):

                def look(answer: Answer, side: str = side) -> None:
                    shown[side] = answer
                    live.update(columns(console, shown, is_whole=False), refresh=True)

                self.answers[side].append(self._ask(side, look))
        console.print(columns(console, {side: self.answers[side][0] for side in (OFF, ON)}, is_whole=True))


def columns(console: "Console", answers: dict[str, Answer], *, is_whole: bool) -> "RenderableType":
    """Both texts side by side: all of them in their colours, or as much of their ends as fits the screen."""
    from rich.table import Table

    table = Table(expand=True, show_edge=False, pad_edge=False)
    width, height = (console.width - 3) // 2, console.height - HEAD_LINES
    for side in answers:
        table.add_column(side, ratio=1)
    texts = [
        answer.coloured() if is_whole else end_of(answer.text, console, width, height) for answer in answers.values()
    ]
    table.add_row(*texts)
    if is_whole:
        table.add_section()
        table.add_row(*(footer(answer) for answer in answers.values()), style="dim")
    return table


def footer(answer: Answer) -> str:
    """Speed, and how many tokens exits gave."""
    assert answer.report is not None and answer.tpt_ms is not None
    num_exits = answer.num_tokens - answer.report["tokens"]["checked"]
    return f"{answer.tpt_ms:.1f} ms per token, {num_exits} of {answer.num_tokens} tokens by exits"
