"""Small SVG pictures in the colours of the dashboard, light or dark; the same calls make the same text."""

from collections.abc import Sequence
from html import escape
from typing import Literal, NamedTuple

FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"
SIZE = 14
Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]


class Theme(NamedTuple):
    name: str
    text: str
    soft: str
    back: str
    line: str
    card: str
    good: str
    bad: str
    held: str  # behind text
    early: str
    divergence: str
    series: tuple[str, ...]


LIGHT = Theme(
    "light",
    text="#1d2530",
    soft="#5b6673",
    back="#ffffff",
    line="#d8dee6",
    card="#f4f7fa",
    good="#1d7a43",
    bad="#b3261e",
    held="#d9e8fb",
    early="#d2f0dc",
    divergence="#fbd7d3",
    series=("#1f6fd0", "#1b7f53", "#b35c00", "#8a52b8"),
)
DARK = Theme(
    "dark",
    text="#e6eaf0",
    soft="#a3adba",
    back="#14181d",
    line="#333b46",
    card="#1c222a",
    good="#5fc88a",
    bad="#ff8f85",
    held="#1e3d63",
    early="#1b4a30",
    divergence="#6b2620",
    series=("#6aaeff", "#5fc88a", "#f0a35a", "#c69bec"),
)
THEMES = (LIGHT, DARK)


def shown(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


class Drawing:
    """Elements in user units, y downwards, on the theme's background."""

    def __init__(self, width: int, height: int, theme: Theme, *, title: str, desc: str) -> None:
        self.width, self.height, self.theme = width, height, theme
        self.title, self.desc = title, desc
        self.parts: list[str] = []

    def add(self, tag: str, text: str | None = None, **attributes: str | float) -> None:
        """An element; `_` in a name of an attribute stands for `-`."""
        pairs = [
            f'{name.rstrip("_").replace("_", "-")}="{escape(value) if isinstance(value, str) else shown(value)}"'
            for name, value in attributes.items()
        ]
        end = "/>" if text is None else f">{escape(text, quote=False)}</{tag}>"
        self.parts.append(f"<{' '.join([tag, *pairs])}{end}")

    def text(
        self,
        at: Point,
        text: str,
        *,
        color: str | None = None,
        anchor: Anchor = "start",
        size: float = SIZE,
        bold: bool = False,
    ) -> None:
        """`at` is on the baseline."""
        more = {"font_weight": "600"} if bold else {}
        self.add(
            "text",
            text,
            x=at[0],
            y=at[1],
            fill=color or self.theme.text,
            text_anchor=anchor,
            font_size=size,
            **more,
        )

    def rect(
        self, at: Point, width: float, height: float, *, fill: str, stroke: str = "none", radius: float = 4
    ) -> None:
        self.add("rect", x=at[0], y=at[1], width=width, height=height, rx=radius, fill=fill, stroke=stroke)

    def line(self, points: Sequence[Point], *, color: str, width: float = 1, dash: str = "") -> None:
        more = {"stroke_dasharray": dash} if dash else {}
        listed = " ".join(f"{shown(x)},{shown(y)}" for x, y in points)
        self.add("polyline", points=listed, fill="none", stroke=color, stroke_width=width, **more)

    def arrow(self, points: Sequence[Point], *, color: str, width: float = 1.5, dash: str = "") -> None:
        """A line with a head at its end; its last part must be level or upright."""
        self.line(points, color=color, width=width, dash=dash)
        (before_x, before_y), (x, y) = points[-2:]
        across, down = (x > before_x) - (x < before_x), (y > before_y) - (y < before_y)
        corners = [(x, y)] + [(x - 8 * across + 4 * side * down, y - 8 * down + 4 * side * across) for side in (-1, 1)]
        self.polygon(corners, fill=color)

    def polygon(self, points: Sequence[Point], *, fill: str, stroke: str = "none") -> None:
        listed = " ".join(f"{shown(x)},{shown(y)}" for x, y in points)
        self.add("polygon", points=listed, fill=fill, stroke=stroke)

    def mark(self, at: Point, number: int, *, color: str, radius: float = 5) -> None:
        """A point of series `number`: each has a shape of its own, too."""
        x, y = at
        shapes: tuple[tuple[Point, ...], ...] = (
            ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            ((0, -1.3), (1.3, 1), (-1.3, 1)),
            ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        )
        if number % 4 == 0:
            self.add("circle", cx=x, cy=y, r=radius, fill=color)
        else:
            corners = shapes[number % 4 - 1]
            self.polygon([(x + 0.9 * radius * a, y + 0.9 * radius * b) for a, b in corners], fill=color)

    def legend(self, at: Point, names: Sequence[str], *, first: int = 0, gap: float = 26) -> None:
        """Names of the series from number `first` on, side by side, behind their marks."""
        x, y = at
        for number, name in enumerate(names, first):
            self.mark((x, y - 5), number, color=self.theme.series[number])
            self.text((x + 11, y), name)
            x += 11 + text_width(name) + gap

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img" aria-labelledby="title desc" '
            f'font-family="{escape(FONT, quote=False)}">'
        )
        names = [f'<title id="title">{escape(self.title)}</title>', f'<desc id="desc">{escape(self.desc)}</desc>']
        back = f'<rect width="{self.width}" height="{self.height}" rx="6" fill="{self.theme.back}"/>'
        return "\n".join([head, *names, back, *self.parts, "</svg>"]) + "\n"


def text_width(text: str, size: float = SIZE) -> float:
    """About what it takes in a sans-serif font, at most."""
    return 0.56 * size * len(text)


class Panel(NamedTuple):
    """Where values stand in a plot: y from `low` to `high` over its height, x already in user units."""

    left: float
    top: float
    width: float
    height: float
    low: float
    high: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def y(self, value: float) -> float:
        return self.bottom - self.height * (value - self.low) / (self.high - self.low)

    def grid(self, drawing: Drawing, ticks: Sequence[float], *, labels: bool = True) -> None:
        for tick in ticks:
            drawing.line([(self.left, self.y(tick)), (self.right, self.y(tick))], color=drawing.theme.line)
            if labels:
                at = (self.left - 8, self.y(tick) + 5)
                drawing.text(at, f"{tick:g}", color=drawing.theme.soft, anchor="end")
