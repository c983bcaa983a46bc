"""A benchmark's table, in the log and in a Markdown file, with the machine and the settings that it holds for."""

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmae import __version__
from fastmae.runtime.device import cores
from fastmae.runtime.durable import write_whole
from fastmae.runtime.processor import cpu_model
from fastmae.runtime.table import text_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """A benchmark's table.

    Attributes:
        title: heading, a few words.
        settings: what the figures hold for, by name: the machine, the sizes, the number of rounds.
        rows: at least one; all with the same keys, which are the column names.
        notes: what a reader must know to understand the columns, one paragraph each.
    """

    title: str
    settings: Mapping[str, str]
    rows: Sequence[Mapping[str, str]]
    notes: Sequence[str]

    def publish(self, out: Path | None) -> None:
        """Log the table, and write it as Markdown if `out` is given."""
        settings = "; ".join(f"{name}: {value}" for name, value in self.settings.items())
        log.info("\n".join([self.title, settings, text_table(self.rows), *self.notes]))
        if out is not None:
            markdown = self._markdown()
            write_whole(out, lambda aside: aside.write_text(markdown, encoding="utf-8"))
            log.info(f"{out}: the table as Markdown")

    def _markdown(self) -> str:
        names = list(self.rows[0])
        rule = ["---", *("---:" for _ in names[1:])]
        settings = [f"- {name}: {value}" for name, value in self.settings.items()]
        table = [_markdown_row(cells) for cells in (names, rule, *(list(row.values()) for row in self.rows))]
        paragraphs = [f"# {self.title}", "\n".join(settings), "\n".join(table), *self.notes]
        return "\n\n".join(paragraphs) + "\n"


def machine() -> dict[str, str]:
    """The machine and the software that the figures of this process hold for."""
    return {
        "CPU": cpu_model(),
        "cores": f"{cores()} usable",
        "torch": str(torch.__version__),
        "fastmae": __version__,
        "Python": platform.python_version(),
    }


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
