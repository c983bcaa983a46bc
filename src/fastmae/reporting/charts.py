"""Line and bar charts as SVG. They take the text colour of their page, so that they are readable in light and dark."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmae.evaluate.drawing import text_as_it_is

Svg = NewType("Svg", str)
"""The source of a drawing made here. Its labels are escaped, so a page may contain it as it is."""

INK = "#010203"
"""Colour of text and axes while drawing; then replaced by the page's text colour."""
NOT_FOR_HTML = re.compile(r' xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', re.DOTALL)
COLOURS = ("#3b7dd8", "#e07b39", "#2f9e6e", "#b0559b", "#8a8f98")
MARKED_POINTS = 20
"""A line of fewer points gets a marker at each."""


@dataclass(frozen=True)
class Curves:
    """A line chart with one or more lines.

    Attributes:
        series: name of a line -> log entries; entries without a value for `y` are left out.
        x: key of the horizontal values.
        y: key of the vertical values.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        log_from: the horizontal axis is logarithmic from this value on, and linear below; None: linear all along.
    """

    series: Mapping[str, Sequence[Mapping[str, Any]]]
    x: str
    y: str
    x_label: str
    y_label: str
    log_from: float | None = None

    @text_as_it_is()
    def svg(self) -> Svg:
        """The chart for an HTML page."""
        figure, axes = _transparent_figure(6.4, 3.0)
        self.draw(axes, INK)
        if len(self.series) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)
        return _to_svg(figure)

    def draw(self, axes: Axes, ink: str) -> None:
        """Draw the lines and the grid."""
        for colour, (name, entries) in zip(itertools.cycle(COLOURS), self.series.items(), strict=False):
            points = [entry for entry in entries if entry.get(self.y) is not None]
            axes.plot(
                [point[self.x] for point in points],
                [point[self.y] for point in points],
                label=name,
                color=colour,
                linewidth=1.6,
                marker="o" if len(points) < MARKED_POINTS else None,
                markersize=3.5,
            )
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        if self.log_from is not None:
            axes.set_xscale("symlog", linthresh=self.log_from, linscale=0.5)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25, color=ink)


@text_as_it_is()
def curves_png(panels: Sequence[Curves]) -> bytes:
    """Line charts of the same lines side by side on white, as a PNG, with one legend below them."""
    figure = Figure(figsize=(5.4 * len(panels), 3.7), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        panel.draw(axes, "black")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@text_as_it_is()
def bars(values: Mapping[str, float], x_label: str) -> Svg:
    """Horizontal bars with their values, the first one on top."""
    figure, axes = _transparent_figure(6.4, 0.45 * len(values) + 0.8)
    container = axes.barh(list(values), list(values.values()), height=0.6, color=COLOURS[0])
    axes.bar_label(container, fmt="%.1f", padding=3, color=INK)
    axes.invert_yaxis()
    axes.set(xlabel=x_label, xlim=(0, max(100.0, *values.values()) * 1.08))
    return _to_svg(figure)


@text_as_it_is()
def bars_with_whiskers(values: Mapping[str, float], whiskers: Mapping[str, float], x_label: str) -> Svg:
    """Horizontal bars with their values, the first one on top, as long as the largest one needs.

    Args:
        values: name -> length of its bar.
        whiskers: name -> half the length of the whisker around the bar's end; a bar without one is left out.
        x_label: label of the horizontal axis.
    """
    figure, axes = _transparent_figure(6.4, 0.45 * len(values) + 0.8)
    names, lengths = list(values), list(values.values())
    errors = [whiskers.get(name, 0.0) for name in names]
    axes.barh(names, lengths, height=0.6, color=COLOURS[0])
    with_whisker = [row for row, error in enumerate(errors) if error > 0]
    axes.errorbar(
        [lengths[row] for row in with_whisker],
        with_whisker,
        xerr=[errors[row] for row in with_whisker],
        fmt="none",
        ecolor=INK,
        elinewidth=1.2,
        capsize=3,
    )
    ends = [length + error for length, error in zip(lengths, errors, strict=True)]
    for row, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        axes.annotate(f"{length:.1f}", (end, row), (4, 0), textcoords="offset points", va="center", color=INK)
    axes.invert_yaxis()
    axes.set(xlabel=x_label, xlim=(0, max([*ends, 1e-9]) * 1.12))
    return _to_svg(figure)


def _transparent_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without background, of this many inches, with the left and the lower axis."""
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


def _to_svg(figure: Figure) -> Svg:
    # Text stays text. The fixed salt gives the same ids, so the same bytes, every time.
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastmae"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    document = buffer.getvalue()
    element = NOT_FOR_HTML.sub("", document[document.index("<svg") :])
    return Svg(element.replace(INK, "currentColor"))
