"""What all plots share: colours, markers, new figures, and the check of columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
# Black first: one or two systems, the usual case, then differ in lightness too.
COLOURS = ("black", VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 2)))
GREY, LIGHT_GREY = "0.45", "0.75"


def new_axes(ax: "Axes | None", size: tuple[float, float]) -> "Axes":
    """Return the given Axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError('plots need the extra [plot]: pip install "pyterrier-msft[plot]"') from e
    return plt.subplots(figsize=size, layout="constrained")[1]


def line_style(k: int) -> dict[str, Any]:
    """Return the colour and line style of the k-th system."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": LINE_STYLES[k % len(LINE_STYLES)]}


def require_columns(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise a ValueError unless a frame, called `what` in the message, has the columns."""
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"{what} must have the columns {list(columns)}; got {list(frame)} without {missing}")
