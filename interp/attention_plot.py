"""An attention pattern as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks import ResultError
from interp.canvas import figure_of
from interp.typesetting import LONGEST, SMALLEST, entitle, printed, set_ticks, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def attention(pattern: Any, tokens: Sequence[str], ax: Any = None, title: str = "", *, cmap: Any = "Blues") -> Axes:
    """Draw an attention pattern: queries down, keys to the right, dark is much.

    Args:
        pattern: [T, S], weights from 0 to 1, a tensor or an array.
        tokens: text of the T = S tokens.
        ax: matplotlib axes to draw into; by default a figure of their own.
        title: what stands above.
        cmap: a colour map of matplotlib's, or its name.

    Returns:
        The matplotlib axes.
    """
    weights = np.asarray(pattern, dtype=float)
    if weights.ndim != 2 or weights.shape != (len(tokens), len(tokens)):
        raise ResultError(f"a pattern of {len(tokens)} tokens has shape {[len(tokens)] * 2}, got {list(weights.shape)}")
    if ax is None:
        size = 1.6 + 0.2 * len(tokens)
        ax = figure_of(size, size).subplots()
    # Causal attention leaves the future empty; what does look there is drawn.
    future = np.triu(np.ones(weights.shape, bool), 1)
    hidden = future & (not weights[future].any())
    ax.imshow(np.where(hidden, np.nan, weights), cmap=cmap, vmin=0.0, vmax=1.0, interpolation="nearest")
    labels = [printed(visible(token), LONGEST) for token in tokens]
    size = min(9.0, max(SMALLEST, 150.0 / len(tokens)))
    set_ticks(ax.xaxis, labels, 1, True, size, 90)
    set_ticks(ax.yaxis, labels, 1, True, size, 0)
    ax.set_xlabel("key", fontsize=9)
    ax.set_ylabel("query", fontsize=9)
    entitle(ax, title)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax
