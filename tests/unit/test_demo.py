"""`apparate-llm demo`: a line that is no more exact than what was measured, both sides, bad input."""

import io
from itertools import cycle

import pytest
from rich.console import Console

from apparate_llm.chat import Answer
from apparate_llm.cli import main
from apparate_llm.demo.command import CHAT_PROMPT, CODE_PROMPT, default_prompt
from apparate_llm.demo.sides import OFF, ON, Sides
from apparate_llm.demo.verdict import figure, gain, verdict


def answer(tpt_ms: float, text: str = "same", *, num_exits: int = 0, num_tokens: int = 101) -> Answer:
    counts = {"checked": num_tokens - num_exits, "held": num_exits, "released": 0, "unverified": 0}
    origins = ["held"] * num_exits + ["checked"] * (len(text) - num_exits)
    report = {"tokens": counts, "divergences": 0, "origins": origins, "texts": list(text)}
    last_s = 1.0 + tpt_ms * (num_tokens - 1) / 1e3
    return Answer(text=text, report=report, num_tokens=num_tokens, first_s=1.0, last_s=last_s)


def answers(*tpts_ms: float, text: str = "same") -> list[Answer]:
    return [answer(tpt_ms, text) for tpt_ms in tpts_ms]


def test_the_line_says_times_ratio_and_texts():
    line = verdict(answers(21.0, 21.1, 20.9), answers(12.1, 12.2, 12.1))
    assert line == "TPT 21.0 ms without exits, 12.1 ms with: 1.7x as fast; texts identical"


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((12.04, 12.11, 12.2), "12.1"),
        ((20.4, 21.2, 22.3), "21"),
        ((18.0, 21.0, 26.4), "18 to 26"),
        ((5.0,), "5.0"),
    ],
)
def test_a_figure_has_the_digits_its_values_agree_on(values, shown):
    assert figure(values, 1) == shown


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((1.66, 1.72, 1.75), "1.7x as fast"),
        ((1.4, 1.7, 1.9), "1.4 to 1.9x as fast"),
        ((1.01, 1.02, 1.03), "no clear difference, exits do not help here (1.0x as fast)"),
        ((0.9, 1.2, 1.3), "no clear difference, exits do not help here (0.9 to 1.3x as fast)"),
        ((0.79, 0.8, 0.82), "exits do not help here, they make it slower (0.8x as fast)"),
    ],
)
def test_a_gain_is_claimed_where_each_turn_shows_it(ratios, expected):
    assert gain(ratios) == expected


def test_texts_that_differ_are_counted():
    off = answers(20, 20)
    assert verdict(off, [answer(10), answer(10, "other")]).endswith("; 1 of 2 texts differ")
    assert verdict([answer(20), answer(20, "x")], off).endswith("; texts without exits differ among themselves")


def test_prompts_are_of_the_models_kind():
    assert default_prompt("/models/Qwen2.5-Coder-0.5B-Instruct") == CODE_PROMPT
    assert default_prompt("/code/SmolLM2-135M-Instruct") == CHAT_PROMPT


class Client:
    """Answers from a list, in pieces; keeps what was asked."""

    url = "http://fake"

    def __init__(self, given: list[Answer]) -> None:
        self.given, self.asked = cycle(given), []

    def ask(self, messages, options):
        self.asked.append(options)
        whole = next(self.given)
        for end in range(len(whole.text)):
            yield Answer(text=whole.text[:end])
        yield whole


def shown_by(given: list[Answer], *, width: int, is_terminal: bool) -> tuple[str, Sides]:
    out = io.StringIO()
    colors = "standard" if is_terminal else "auto"  # rich then sees that it is none
    console = Console(
        file=out, width=width, height=30, force_terminal=is_terminal, color_system=colors, highlight=False
    )
    sides = Sides(Client(given), "prompt", bound=0.0)
    sides.show_first(console)
    return out.getvalue(), sides


BLUE = "\x1b[94m"  # of held exits, where a terminal has 16 colours
BOTH = [answer(20, "the text off"), answer(10, "the text on!", num_exits=3)]


def test_sides_take_turns_and_only_one_has_exits():
    _, sides = shown_by(BOTH, width=80, is_terminal=False)
    sides.ask_again()
    asked = sides.client.asked
    assert [options.get("early_exit", 1) for options in asked] == [0, 1, 0, 1]
    assert all(options["early_exit_report"] == 1 for options in asked) and asked[1]["accuracy_bound"] == 0.0
    assert [len(sides.off), len(sides.on)] == [2, 2]


def test_a_wide_terminal_has_both_texts_in_a_row_with_exits_marked():
    text, _ = shown_by(BOTH, width=120, is_terminal=True)
    last = text[text.rindex(OFF) :]
    row = next(line for line in last.splitlines() if "the text off" in line)
    assert ON in last and f"{BLUE}t" in row and row.index("the text off") < row.index(f"{BLUE}t")
    assert "20.0 ms per token, 0 of 101 tokens by exits" in last
    assert "10.0 ms per token, 3 of 101 tokens by exits" in last


@pytest.mark.parametrize(("width", "is_terminal"), [(80, True), (120, False)])
def test_elsewhere_one_text_follows_the_other(width, is_terminal):
    text, _ = shown_by(BOTH, width=width, is_terminal=is_terminal)
    assert text.index(f"{OFF}:") < text.rindex("the text off") < text.index(f"{ON}:") < text.rindex(" text on!")
    assert (BLUE in text.split(f"{ON}:")[1]) == is_terminal


def test_a_server_without_exits_and_a_short_answer_are_told():
    without = answer(20)
    without.report = None
    with pytest.raises(ValueError, match="http://fake serves without exits"):
        Sides(Client([without]), "prompt", bound=0.0).warm_up()
    with pytest.raises(ValueError, match="the answer has 5 tokens, too few to time; at least 16"):
        Sides(Client([answer(20, num_tokens=5)]), "prompt", bound=0.0).warm_up()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["  "], "the prompt must have some text"),
        (["--url", "foo"], "--url must be http://HOST:PORT"),
        (["--url", "http://localhost:1", "--ramps", "x"], "--ramps is for a server that is started here"),
        (["--url", "http://localhost:1", "--vllm-flag", "--dtype float32"], "--vllm-flag is for a server"),
        (["--repeat", "1"], "must be at least 2"),
        (["--max-tokens", "3"], "must be at least 16"),
        (["--accuracy-bound", "1"], "must be from 0 to below 1, got '1'"),
        (["--model", "/nowhere"], "model folder not found: /nowhere"),
        (["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, expected, capsys):
    try:
        code = main(["demo", *argv])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and expected in error and error.count("\n") == 1


def test_a_model_without_ramps_is_found_before_anything_starts(tiny_llama, capsys):
    assert main(["demo", "--model", str(tiny_llama)]) == 2
    assert "no shipped ramps fit" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told(capsys):
    assert main(["demo", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
