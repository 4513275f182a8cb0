"""The pages under docs/: their links lead somewhere, their commands are understood, what they name is there."""

import re
import shlex
from pathlib import Path

import pytest

from apparate_llm.cli import build_parser, spelt_out
from apparate_llm.exits.token_origins import Origin
from apparate_llm.flags import options_from

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/*.md")])
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
FILE = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.py)`")


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    """Links to a file or a heading that is not there."""
    dead = []
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page):
    assert broken(page) == []


def test_a_broken_link_is_seen(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A title, with `code`\n\n```bash\n# no title\n```\n")
    page.write_text("[a](other.md#a-title-with-code) [b](other.md#no-title) [c](gone.md) [d](#nowhere)\n")
    assert broken(page) == ["other.md#no-title", "gone.md", "#nowhere"]


def commands() -> list[str]:
    blocks = [text for page in DOCS.glob("*.md") for kind, text in CODE.findall(page.read_text()) if kind == "bash"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [match[1].strip() for line in lines if (match := re.search(r"(?:^| )(apparate-llm [^#]+)", line))]


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood_as_it_stands(command):
    args, rest = build_parser().parse_known_args(spelt_out(shlex.split(command)[1:]))
    if args.command == "serve":  # the rest is vLLM's
        options_from(args)
    else:
        assert rest == []


def test_the_command_of_the_systemd_service_is_understood():
    unit = (ROOT / "deploy" / "apparate-llm.service").read_text()
    (command,) = re.findall(r"^ExecStart=/\S+/apparate-llm (.+)$", unit, re.M)
    args, _ = build_parser().parse_known_args(spelt_out(shlex.split(command)))
    assert args.command == "serve" and args.host == "127.0.0.1"
    options_from(args)


def test_there_are_commands_of_every_guide():
    assert {command.split()[1] for command in commands()} >= {"serve", "doctor", "prepare", "ramps", "eval", "replay"}


def test_the_files_that_architecture_names_are_there():
    named = FILE.findall((DOCS / "architecture.md").read_text())
    assert len(named) > 80
    missing = [name for name in named if not ((ROOT / name).is_file() or (ROOT / "apparate_llm" / name).is_file())]
    assert missing == []


def test_serving_has_every_alert_and_every_origin_of_a_token():
    page = (DOCS / "serving.md").read_text()
    alerts = re.findall(r"^ +- alert: (\w+)$", (ROOT / "api" / "alerts.yml").read_text(), re.M)
    assert re.findall(r"^\| `(EarlyExit\w+)` \|", page, re.M) == alerts
    assert all(f"`{origin}`" in page for origin in Origin)
