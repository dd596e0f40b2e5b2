"""Plots as PNG files: matplotlib without its global state, in one plain style."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["ENERGY", "GAUSSIAN", "OTHER", "new_figure", "png"]

GAUSSIAN, ENERGY, OTHER = "#6b7a8f", "#d1495b", "#2a9d8f"
"""Colours of the Gaussian prior, the energy prior and whatever else is shown."""

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.0, 2.8)
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns).

    Args:
        rows: Of axes.
        columns: Of axes.
        size: Width and height of each, inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure((columns * size[0], rows * size[1]), dpi=130, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; equal figures give equal bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
