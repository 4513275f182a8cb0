#!/usr/bin/env python3
"""The pictures in docs/pictures that are drawn, light and dark, out of the results in docs/results:

python -m scripts.draw

`python -m scripts.screenshots` makes those that are photographs.
"""

from collections.abc import Callable
from pathlib import Path

from scripts import draw_sensitivity, draw_step, draw_tpt
from scripts.svg import THEMES, Theme

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
DRAWN: dict[str, Callable[[Theme], str]] = {
    "sensitivity": draw_sensitivity.draw,
    "step": draw_step.draw,
    "tpt": draw_tpt.draw,
}


def drawn() -> dict[str, str]:
    """File name -> SVG."""
    return {f"{name}-{theme.name}.svg": draw(theme) for name, draw in DRAWN.items() for theme in THEMES}


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, svg in drawn().items():
        (PICTURES / name).write_text(svg)
