"""Line and bar charts."""

import pytest
from matplotlib.figure import Figure

from fastmae.reporting.charts import Curves, bars


def test_charts_take_the_pages_text_colour_and_leave_out_missing_values():
    entries = [{"x": 1, "y": 2.0}, {"x": 2, "y": None}, {"x": 3, "y": 4.0}]
    svg = Curves({"a": entries, "b": [{"x": 1}]}, "x", "y", "x", "y").svg()
    assert svg.startswith("<svg")
    assert "currentColor" in svg


def test_charts_escape_their_labels():
    svg = bars({"one <i>": 50.0}, "percent")
    assert "&lt;i&gt;" in svg
    assert "<i>" not in svg


def test_the_same_chart_has_the_same_source():
    curves = Curves({"a": [{"x": 1, "y": 2.0}]}, "x", "y", "x", "y")
    assert curves.svg() == curves.svg()


def test_every_line_of_a_chart_is_drawn_when_there_are_more_lines_than_colours():
    series = {f"line {number}": [{"x": 1, "y": number}, {"x": 2, "y": number}] for number in range(8)}
    svg = Curves(series, "x", "y", "x", "y").svg()
    assert all(name in svg for name in series)


def test_a_horizontal_axis_can_be_logarithmic_from_a_value_on():
    entries = [{"x": x, "y": 1.0} for x in (0, 10, 1000)]
    axes = Figure().subplots()
    Curves({"a": entries}, "x", "y", "x", "y", log_from=10).draw(axes, "black")
    left, middle, right = axes.transData.transform([(x, 1.0) for x in (0, 10, 1000)])[:, 0]
    assert (right - middle) / (middle - left) == pytest.approx(2 / 0.5 * 0.9, rel=0.2)  # two decades; half of one
