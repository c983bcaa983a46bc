"""Curves and bars as SVG that takes the page's own ink, so that they read in light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("agg")

INK = "#010203"
"""Stands for the page's ink while it is drawn."""
NOT_FOR_HTML = re.compile(r' xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', re.DOTALL)
COLOURS = ("#3b7dd8", "#e07b39", "#2f9e6e", "#b0559b", "#8a8f98")


def curves(series: Mapping[str, Sequence[Mapping[str, Any]]], x: str, y: str, x_label: str, y_label: str, log: bool = False) -> Markup:
    """Lines over a common axis, one a run.

    Args:
        series: name -> log entries; those that lack a value are left out.
        x: key of the horizontal values.
        y: key of the vertical values.
        x_label: of the axis.
        y_label: the same.
        log: the horizontal axis by powers of ten.
    """
    figure, axes = _figure(6.4, 3.0)
    for colour, (name, entries) in zip(COLOURS, series.items(), strict=False):
        points = [(entry[x], entry[y]) for entry in entries if entry.get(y) is not None]
        axes.plot(
            *zip(*points, strict=True), label=name, color=colour, linewidth=1.6, marker="o" if len(points) < 20 else None, markersize=3.5
        )
    axes.set(xlabel=x_label, ylabel=y_label, **({"xscale": "log"} if log else {}))
    axes.grid(alpha=0.25, color=INK)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return _svg(figure)


def bars(values: Mapping[str, float], x_label: str) -> Markup:
    """Horizontal bars with their values, the first on top."""
    figure, axes = _figure(6.4, 0.45 * len(values) + 0.8)
    drawn = axes.barh(list(values), list(values.values()), height=0.6, color=COLOURS[0])
    axes.bar_label(drawn, fmt="%.1f", padding=3, color=INK)
    axes.invert_yaxis()
    axes.set(xlabel=x_label, xlim=(0, max(100.0, *values.values()) * 1.08))
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastmae"}):  # text stays text; the same drawing, the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    bare = NOT_FOR_HTML.sub("", text[text.index("<svg") :])
    return Markup(bare.replace(INK, "currentColor"))
