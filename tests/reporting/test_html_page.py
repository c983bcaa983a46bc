"""The HTML page that reports and benchmarks share."""

from fastmae.reporting.charts import bars
from fastmae.reporting.html_page import Section, write_page


def test_text_is_escaped_and_charts_are_drawn(tmp_path):
    hostile = "<script>alert('x')</script>"
    chart = bars({"one": 50.0}, "percent")
    section = Section(hostile, hostile, rows=[{hostile: hostile}], notes=[hostile], charts=[chart])
    write_page(tmp_path / "page.html", hostile, hostile, [section])
    html = (tmp_path / "page.html").read_text()
    assert "<script>" not in html
    assert chart in html


def test_a_table_shows_values_as_a_reader_expects_them(tmp_path):
    values = {"flag": True, "off": False, "number": 0.5, "list": [0.9, 0.95], "missing": None, "empty": ""}
    rows = [{"option": name, "value": value} for name, value in values.items()]
    write_page(tmp_path / "page.html", "title", "lead", [Section("Settings", rows=rows)])
    html = (tmp_path / "page.html").read_text()
    shown = {"flag": "yes", "off": "no", "number": "0.5", "list": "0.9, 0.95", "missing": "-", "empty": "-"}
    for name, text in shown.items():
        assert f'<tr><td>{name}</td><td class="number">{text}</td></tr>' in html
