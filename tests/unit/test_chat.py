"""`apparate-llm chat` against servers that answer well, badly or not at all."""

import pytest

from apparate_llm.chat import BLUE, GREEN, RED, Answer, ChatClient
from apparate_llm.cli import build_parser, main
from apparate_llm.exits.token_origins import Origin
from apparate_llm.renamed import ORIGINS
from tests.contrast import contrast
from tests.fake_server import SPLITTERS, fake_server


def chunk(text: str | None = None, **more) -> dict:
    return {"choices": [] if text is None else [{"delta": {"content": text}}], **more}


def test_an_answer_is_coloured_by_its_report_and_says_its_speed():
    answer = Answer()
    for text in ("One", " two"):
        answer.take(chunk(text))
    assert answer.coloured().plain == "One two" and not answer.coloured().spans
    tokens = {"checked": 1, "held": 1, "released": 0, "unverified": 0}
    report = {"tokens": tokens, "divergences": 0, "origins": ["checked", "held"], "texts": ["One", " two"]}
    answer.take(chunk(usage={"completion_tokens": 2}))
    answer.take(chunk(early_exit=[report]))
    shown = answer.coloured()
    assert shown.plain == "One two" and [(span.start, span.style) for span in shown.spans] == [(3, BLUE)]
    assert "ms per token" in answer.note()
    assert "1 checked · 1 held · 0 released · 0 divergences, 0 at worst" in answer.note()
    answer.report["tokens"] |= {"unverified": 2}
    answer.report["divergences"] = 1
    assert "1 divergence, 3 at worst (2 without a verdict)" in answer.note()


@pytest.mark.parametrize(("old", "new"), ORIGINS.items())
def test_the_report_of_an_older_server_has_its_colours(old, new):
    assert new in set(Origin) and old not in set(Origin)
    for origin in (old, new):
        shown = Answer(text="One", report={"origins": [origin], "texts": ["One"]}).coloured()
        assert [span.style for span in shown.spans] == [f"{RED} underline"]


@pytest.mark.parametrize("color", [BLUE, GREEN, RED])
@pytest.mark.parametrize("back", ["#ffffff", "#000000"])
def test_its_colours_can_be_read_on_a_light_terminal_and_on_a_dark_one(color, back):
    assert contrast(color, back) > 4.4


def test_an_error_in_the_stream_ends_it():
    with pytest.raises(RuntimeError, match="out of luck"):
        Answer().take({"error": {"message": "out of luck"}})


def test_an_answer_keeps_every_character_at_which_other_readers_end_a_line():
    with fake_server() as base_url:
        args = build_parser().parse_args(["chat", "--url", base_url])
        *_, answer = ChatClient(args).ask([{"role": "user", "content": "lines"}])
    assert answer.text == f"ab{SPLITTERS}" and answer.num_tokens == 3


@pytest.mark.parametrize(
    ("typed", "code", "expected"),
    [("steady", 0, "the server has no early exits"), ("refused", 1, "HTTP 429"), ("error", 1, "the server says")],
)
def test_a_conversation(monkeypatch, capsys, typed, code, expected):
    lines = iter([typed, ""])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    with fake_server() as base_url:
        assert main(["chat", "--url", base_url]) == code
    out = capsys.readouterr()
    assert expected in out.out + out.err


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_in_v1(monkeypatch, capsys, ending):
    lines = iter(["steady", ""])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    with fake_server() as base_url:
        assert main(["chat", "--url", base_url + ending]) == 0
    assert "abbbb" in capsys.readouterr().out


def test_the_key_comes_from_the_flag_or_the_environment(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda: "")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake_server("sk-mine") as base_url:
        assert main(["chat", "--url", base_url]) == 1
        assert "the server wants another API key" in capsys.readouterr().err
        assert main(["chat", "--url", base_url, "--api-key", "sk-mine"]) == 0
        monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
        assert main(["chat", "--url", base_url]) == 0
        assert main(["chat", "--url", base_url, "--api-key", "sk-other"]) == 1


def test_bad_input_is_one_line(capsys):
    for url in ("localhost:8000", "http://", "http://[::1", "ftp://localhost", "http://a b"):
        assert main(["chat", "--url", url]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
