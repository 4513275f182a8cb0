"""Figures in pages that need nothing from elsewhere: SVG as data URIs, legible on white and on black."""

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

COLORS = ("#2a7fde", "#c97419", "#2e9e5b", "#b04fc9", "#c23b4a", "#17a2b0", "#a88a1e", "#e0669b")
GREY = "#747c85"
LEGEND_CHARACTERS = 64  # in a row; the line before each name takes up about five

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
else:
    Axes = object  # matplotlib is imported when something is drawn


def data_uri(draw: Callable[[Axes], None], height: float = 3.6) -> str:
    """What `draw` puts on matplotlib axes, with grid and legend; the same drawing makes the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    # Text stays text, and names of parts do not vary.
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "apparate",
        "text.parse_math": False,
        "font.size": 10,
        **dict.fromkeys(names, GREY),
    }
    with plt.rc_context(style):
        fig, ax = plt.subplots(figsize=(5.2, height), layout="constrained")
        draw(ax)
        ax.grid(color=GREY, alpha=0.2)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        longest = max(map(len, ax.get_legend_handles_labels()[1]), default=0)
        columns = max(1, LEGEND_CHARACTERS // (longest + 5))
        fig.legend(frameon=False, fontsize=9, loc="outside upper left", ncols=columns)
        buffer = io.BytesIO()
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(fig)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
