"""The pictures of the pages: drawn from the kept results, whole, legible, shown in light and in dark."""

import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from apparate_llm.drawing import COLORS, GREY
from apparate_llm.eval.schema import SteadyRatio, SteadyRun
from scripts import draw_sensitivity, draw_step, draw_tpt, results_table
from scripts.draw import DRAWN, PICTURES, drawn
from scripts.kept import Measured
from scripts.results_table import Rows, Table
from scripts.screenshots import MAX_COLORS, WIDTH_PX, small
from scripts.svg import DARK, LIGHT, THEMES, text_width
from tests.contrast import contrast

ROOT = PICTURES.parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURE = re.compile(
    r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="(\S+)-dark\.(\w+)">\n'
    r'<img src="(\S+)-light\.(\w+)" alt="([^"]+)"></picture>'
)
SVG = "{http://www.w3.org/2000/svg}"
MAX_KB = 150


@pytest.fixture(scope="module")
def pictures() -> dict[str, str]:
    return drawn()


def test_the_pictures_that_are_kept_are_those_of_the_results(pictures):
    assert {path.name: path.read_text() for path in PICTURES.glob("*.svg")} == pictures, "python -m scripts.draw"


def test_a_drawing_comes_out_the_same_again(pictures):
    assert drawn() == pictures


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
@pytest.mark.parametrize("name", DRAWN)
def test_a_drawing_is_described_and_no_text_leaves_it(name, theme):
    root = ET.fromstring(DRAWN[name](theme))
    width, height = float(root.get("width")), float(root.get("height"))
    assert root.find(f"{SVG}title").text and len(root.find(f"{SVG}desc").text) > 100
    texts = root.findall(f"{SVG}text")
    assert len(texts) > 10
    for text in texts:
        size, x, y = (float(text.get(key)) for key in ("font-size", "x", "y"))
        shift = {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
        left = x - shift * text_width(text.text, size)
        assert left >= 0 and left + text_width(text.text, size) <= width, text.text
        assert size <= y <= height - 4 and size >= 13, text.text


def test_light_and_dark_differ_in_nothing_but_colours(pictures):
    for name in DRAWN:
        light, dark = (re.sub(r"#\w{6}", "#", pictures[f"{name}-{theme.name}.svg"]) for theme in THEMES)
        assert light == dark


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_everything_stands_out_from_what_is_behind_it(theme):
    for behind in (theme.back, theme.card, theme.held, theme.early, theme.divergence):
        assert contrast(theme.text, behind) >= 4.5
    for color in (theme.soft, theme.good, theme.bad):
        assert contrast(color, theme.back) >= 4.5
    assert all(contrast(color, theme.back) >= 3 for color in theme.series)


def test_figures_of_reports_stand_out_on_white_and_on_black():
    for back in (LIGHT.back, DARK.back):
        assert contrast(GREY, back) >= 4
        assert all(contrast(color, back) >= 3 for color in COLORS)


def test_pages_and_drawings_have_the_same_colours():
    page = (ROOT / "api" / "dashboard.html").read_text()
    for theme, rules in zip(THEMES, re.findall(r":root \{(.*?)\}", page, re.S), strict=True):
        colors = dict(re.findall(r"--([\w-]+): (#\w{6});", rules))
        for name in ("text", "soft", "back", "line", "card", "good", "bad", "held", "early", "divergence"):
            assert colors[name] == getattr(theme, name), name
        assert {colors[name] for name in "abcd"} == set(theme.series)


def test_pages_show_every_picture_in_light_and_in_dark():
    seen = []
    for page in PAGES:
        text = page.read_text()
        pictures = PICTURE.findall(text)
        assert len(pictures) == text.count("<img ") == text.count("<picture>"), page.name
        for dark, dark_kind, light, light_kind, alt in pictures:
            assert (dark, dark_kind) == (light, light_kind) and len(alt) > 20
            seen += [(page.parent / f"{light}-{scheme}.{light_kind}").resolve() for scheme in ("light", "dark")]
    assert set(seen) == set(PICTURES.iterdir())


def test_the_picture_of_tpt_has_a_point_for_each_cell_of_the_table():
    values = [value for row in draw_tpt.loads() for value in row.values if value]
    cells = re.findall(r"\d\.\d\d \(", results_table.made("readme", Path("docs")))
    assert len(values) == len(cells) >= 12
    root = ET.fromstring(draw_tpt.draw(LIGHT))
    drawn_in = {color: 0 for color in LIGHT.series}
    for element in root.iter():
        if element.tag in (f"{SVG}circle", f"{SVG}polygon"):
            drawn_in[element.get("fill")] += 1
    assert sum(drawn_in.values()) == len(values) + len(results_table.TABLES["readme"].columns)  # the key's


def ratio(system: str, tpt: float) -> SteadyRatio:
    interval = (tpt - 0.1, tpt + 0.1)
    return SteadyRatio(
        system=system,
        baseline="vllm-tuned",
        tpt=tpt,
        tpt_ci95=interval,
        throughput=1.0,
        throughput_ci95=None,
        tpt_mean=tpt,
        tpt_mean_ci95=interval,
    )


def test_a_result_that_changes_moves_its_point(monkeypatch):
    run = SteadyRun(system="lossless", failed=0, output_tokens_per_s=1.0, tpt_by_turn_ms=[])

    def one_row(tpt: float) -> str:
        columns = results_table.TABLES["readme"].columns
        table = Table((Rows("Model, code", "none.json", ("1 client", "2 requests/s")),), columns)
        monkeypatch.setitem(results_table.TABLES, "readme", table)
        results = {("1 client", "lossless"): Measured(run, {"vllm-tuned": ratio("lossless", tpt)})}
        monkeypatch.setattr(draw_tpt, "is_kept", lambda file: True)
        monkeypatch.setattr(draw_tpt, "measured", lambda file: results)
        return draw_tpt.draw(LIGHT)

    def height(svg: str) -> float:
        return float(ET.fromstring(svg).findall(f"{SVG}circle")[-1].get("cy"))

    fast, slow = one_row(0.4), one_row(1.3)
    assert "lossless 0.40" in fast and "lossless 1.30" in slow
    assert height(fast) > height(slow) > draw_tpt.TOP - 1, "a slower one is higher up, and still inside"


def test_the_drawn_step_is_one_that_the_rules_allow():
    given = [token for token, _ in draw_step.ROWS]
    guesses = [guess for _, guess in draw_step.GUESSES]
    assert given[1:] == guesses, "what was guessed is what the next pass runs"
    assert [token for token, _ in draw_step.GUESSES] == given[:-1], "a draft step reads the guess before it"
    says = [word for _, word in draw_step.ROWS]
    agreeing = [verdict == guess for verdict, guess in zip(says, guesses, strict=False)]
    assert agreeing == [True, True, False] and says[-1] == "", "nothing counts behind the first that differs"


def test_every_point_of_the_sweep_is_drawn():
    root = ET.fromstring(draw_sensitivity.draw(DARK))
    marks = [element for element in root.iter() if element.tag in (f"{SVG}circle", f"{SVG}polygon")]
    assert len(marks) == 2 * 2 * 4 * 6 + 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_photograph_is_wide_and_small_and_of_its_scheme(scheme):
    path = PICTURES / f"page-{scheme}.png"
    assert path.stat().st_size <= MAX_KB * 1000
    with Image.open(path) as image:
        assert image.width == WIDTH_PX
        corner = image.convert("RGB").getpixel((2, 2))
    theme = LIGHT if scheme == "light" else DARK
    wanted = [int(theme.back[start : start + 2], 16) for start in (1, 3, 5)]
    assert all(abs(a - b) <= 6 for a, b in zip(corner, wanted, strict=True))


def test_a_photograph_is_cut_off_and_loses_colours_only():
    buffer = io.BytesIO()
    ramp = Image.linear_gradient("L")
    image = Image.merge("RGB", (ramp, ramp.rotate(90), ramp))
    image.save(buffer, format="PNG")
    with Image.open(io.BytesIO(small(buffer.getvalue(), 50, 150))) as cut:
        assert cut.size == (256, 100) and len(cut.getcolors()) <= MAX_COLORS
