"""One self-contained HTML page: text, tables and pictures, nothing loaded from elsewhere."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fastmae.runtime.durable import write_whole


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it.

    Attributes:
        heading: its title.
        text: a paragraph.
        rows: a table: a dict a row, all with the same keys (the table's head).
        picture: a PNG's bytes.
        charts: drawings of `charts`.
        notes: what one must know to read the table, a paragraph each, under it.
    """

    heading: str
    text: str = ""
    rows: Sequence[dict[str, Any]] = ()
    picture: bytes | None = None
    charts: Sequence[Markup] = ()
    notes: Sequence[str] = ()

    @property
    def png(self) -> str:
        """The picture in base64, or ''."""
        return base64.b64encode(self.picture).decode() if self.picture else ""


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    )
    text = template.render(title=title, lead=lead, sections=sections)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))
