#!/usr/bin/env python3
"""The page of a real server as pictures: light and dark, for README, and more to look at.

    python -m scripts.screenshots [--url URL] [--look FOLDER] [vLLM flags]

From the repository's root; needs Chromium. Starts the default model, unless --url names a server. Two clients ask it
without pause, part of the time with exits off. Then a coloured answer on the page goes to `docs/pictures`, as
`page-light.png` and `page-dark.png`. --look writes the whole page, a conversation, and the reports of kept results as
well, wide and as narrow as a phone.
"""

import argparse
import io
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import httpx

from apparate_llm.chat import ChatClient
from apparate_llm.default_model import NAME
from apparate_llm.engine.vllm_settings import memory_flags
from apparate_llm.eval.compare import load_results
from apparate_llm.eval.figures import Points
from apparate_llm.eval.prompts import Prompt, load_prompts
from apparate_llm.eval.report import render as render_results
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import ModelChoice, System, early_exits
from apparate_llm.named_model import model_folder
from scripts.kept import RESULTS, ROOT, is_kept
from scripts.results_table import TABLES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PICTURES = ROOT / "docs" / "pictures"
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
WIDTH_PX, PHONE_PX, MARGIN_PX = 1200, 400, 12
MAX_COLORS = 256  # of a PNG with a palette
CLIENTS = 2
PHASES_S = ((True, 120), (False, 50), (True, 130))  # exits on? The page shows five minutes
QUESTION = "Write a Python function that reverses a list, and explain it."
ANSWER_TOKENS = 160
BOUND = 0.05
REPORTS = tuple(rows.file for rows in TABLES["tpt"].rows if is_kept(rows.file))[:2]
CHROMIUM_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="server to ask instead of one that is started here")
    parser.add_argument("--look", type=Path, help="folder for pictures that are only looked at")
    args, flags = parser.parse_known_args()
    with Server(system(args.url, flags), log=Path(tempfile.mkdtemp()) / "server.log", start_timeout_s=900) as server:
        server.wait_ready()
        with browser() as chromium, load(server.base_url, server.model_name()):
            page = watched(chromium, server.base_url)
            shoot(page, PICTURES, "page", part=("#origins", "#answer-note"))
            if args.look:
                look(chromium, page, server.base_url, args.look)
    return 0


def system(url: str | None, flags: list[str]) -> System:
    if url is not None:
        return System("page", (), base_url=url)
    choice = ModelChoice(model_folder(None), (*memory_flags(flags), "--served-model-name", NAME, *flags))
    return early_exits("page", choice, "--accuracy-bound", str(BOUND))


@contextmanager
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        raise SystemExit("no Chromium on this machine: install it")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        yield running
        running.close()


@contextmanager
def load(base_url: str, model: str) -> Iterator[None]:
    """Clients that ask one prompt after the other."""
    ended, prompts = threading.Event(), load_prompts(None)
    threads = [
        threading.Thread(target=ask_on, args=(base_url, model, prompts[number::CLIENTS], ended))
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def ask_on(base_url: str, model: str, prompts: list[Prompt], ended: threading.Event) -> None:
    with httpx.Client(base_url=base_url, timeout=300) as http:
        number = 0
        while not ended.is_set():
            body = {"model": model, "messages": prompts[number % len(prompts)].messages, "max_tokens": 192}
            http.post("/v1/chat/completions", json=body | {"temperature": 0}).raise_for_status()
            number += 1


def watched(chromium: "Browser", base_url: str) -> "Page":
    """The page after it has seen exits on and off, with a prompt of its own answered."""
    page = chromium.new_page(viewport={"width": WIDTH_PX, "height": 900})
    page.goto(f"{base_url}/early_exit/")
    for is_on, seconds in PHASES_S:
        policy = "adaptive" if is_on else "off"
        httpx.patch(f"{base_url}/early_exit/config", json={"policy": policy}).raise_for_status()
        page.wait_for_timeout(seconds * 1000)
    page.get_by_label("Prompt").fill(QUESTION)
    page.get_by_label("Most tokens").fill(str(ANSWER_TOKENS))
    page.get_by_role("button", name="Send").click()
    deadline = time.monotonic() + 120
    while not page.locator("#answer-note").inner_text():
        assert time.monotonic() < deadline, "no answer"
        page.wait_for_timeout(200)
    return page


def shoot(page: "Page", folder: Path, name: str, *, part: tuple[str, str] | None = None) -> None:
    """The whole page, or a small file of it from one element to another, in both colour schemes."""
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        image = page.screenshot(full_page=True)
        if part:
            image = small(image, edge(page, part[0], "top") - MARGIN_PX, edge(page, part[1], "bottom") + MARGIN_PX)
        (folder / f"{name}-{scheme}.png").write_bytes(image)


def edge(page: "Page", selector: str, side: Literal["top", "bottom"]) -> int:
    """Of an element, in px from the top of the page."""
    place = f"document.querySelector('{selector}').getBoundingClientRect().{side} + scrollY"
    distance: float = page.evaluate(place)
    return round(distance)


def small(image: bytes, top: int, bottom: int) -> bytes:
    """A PNG with a palette, of the lines from `top` to `bottom` in px."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        whole = opened.convert("RGB").crop((0, top, opened.width, bottom))
    buffer = io.BytesIO()
    palette = whole.quantize(MAX_COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def look(chromium: "Browser", page: "Page", base_url: str, folder: Path) -> None:
    pages = {"chat": conversation(base_url)}
    for name in REPORTS:
        pages[Path(name).stem] = render_results(load_results(RESULTS / name), Points())
    for width in (WIDTH_PX, PHONE_PX):
        page.set_viewport_size({"width": width, "height": 900})
        shoot(page, folder, f"page-{width}")
        other = chromium.new_page(viewport={"width": width, "height": 900})
        for name, html in pages.items():
            other.set_content(html)
            shoot(other, folder, f"{name}-{width}")
        other.close()


def conversation(base_url: str) -> str:
    """An answer of `apparate-llm chat`, on a light terminal and on a dark one."""
    from rich.console import Console
    from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME

    args = argparse.Namespace(
        url=base_url, model=None, max_tokens=160, temperature=0.0, no_exits=False, api_key=None, system=None
    )
    console = Console(record=True, force_terminal=True, width=100, file=io.StringIO(), color_system="truecolor")
    *_, answer = ChatClient(args).ask([{"role": "user", "content": QUESTION}])
    console.print(answer.coloured())
    console.print(answer.note(), style="dim")
    themes = (DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME)
    return "".join(console.export_svg(title="chat", theme=theme, clear=False) for theme in themes)


if __name__ == "__main__":
    sys.exit(main())
