"""Curves and bars as SVG that takes the page's own ink, so that they read in light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis, one a run.

    Attributes:
        series: name -> log entries; those that lack a value are left out.
        x: key of the horizontal values.
        y: key of the vertical values.
        x_label: of the axis.
        y_label: the same.
    """

    series: Mapping[str, Sequence[Mapping[str, Any]]]
    x: str
    y: str
    x_label: str
    y_label: str

    def svg(self) -> Markup:
        """For a page."""
        figure, axes = _figure(6.4, 3.0)
        self._draw(axes, INK)
        return _svg(figure)

    def _draw(self, axes: Axes, ink: str) -> None:
        for colour, (name, entries) in zip(COLOURS, self.series.items(), strict=False):
            points = [(entry[self.x], entry[self.y]) for entry in entries if entry.get(self.y) is not None]
            marker = "o" if len(points) < 20 else None
            axes.plot(
                *zip(*points, strict=True), label=name, color=colour, linewidth=1.6, marker=marker, markersize=3.5
            )
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        axes.grid(alpha=0.25, color=ink)
        if len(self.series) > 1:
            axes.legend(frameon=False, labelcolor=ink, fontsize=9)


def curves_png(panels: Sequence[Curves]) -> bytes:
    """Some of them side by side on white, as a PNG, for where no page's ink is."""
    figure = Figure(figsize=(5.4 * len(panels), 3.4), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        panel._draw(axes, "black")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


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
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "fastmae"}
    ):  # text stays text; the same drawing, the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    bare = NOT_FOR_HTML.sub("", text[text.index("<svg") :])
    return Markup(bare.replace(INK, "currentColor"))
