"""One self-contained HTML page: text, tables and pictures. Nothing is loaded from elsewhere."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fastmae.reporting.charts import Svg
from fastmae.runtime.durable import write_whole

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Section:
    """A heading with text, a table and pictures below it.

    Attributes:
        heading: the section's title.
        text: a paragraph above the table.
        rows: the table, one dict for each row; the keys are the column names, the same in all rows.
        picture: bytes of a PNG.
        charts: drawings made by `charts`. The page contains them unescaped.
        notes: what a reader must know to understand the table; paragraphs below it.
    """

    heading: str
    text: str = ""
    rows: Sequence[dict[str, Any]] = ()
    picture: bytes | None = None
    charts: Sequence[Svg] = ()
    notes: Sequence[str] = ()


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the HTML file.
        title: the page's title and main heading.
        lead: a paragraph below the title.
        sections: the rest of the page, in order.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = _cell_text
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = template.render(title=title, lead=lead, sections=sections)
    write_whole(path, lambda aside: aside.write_text(html, encoding="utf-8"))


def _cell_text(value: Any) -> str:
    """A value as a table shows it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_cell_text(element) for element in value)
    return str(value)
