"""What a benchmark says: its table on the screen and in a Markdown file, with the machine and the settings that it holds for."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmae import __version__
from fastmae.errors import InputError
from fastmae.runtime.device import cores
from fastmae.runtime.durable import write_whole

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Table:
    """A benchmark's outcome, for people.

    Attributes:
        title: what was measured.
        settings: name -> value; the machine's among them.
        rows: all with the same keys, the table's head.
        notes: what one must know to read it, a sentence or two each.
    """

    title: str
    settings: Mapping[str, str]
    rows: Sequence[Mapping[str, str]]
    notes: Sequence[str]

    def publish(self, out: Path | None) -> None:
        """Print it; and write it, as Markdown."""
        print("\n".join(self._plain()))
        if out is not None:
            text = "\n".join(self._markdown()) + "\n"
            write_whole(out, lambda aside: aside.write_text(text, encoding="utf-8"))
            print(f"{out}")

    def _plain(self) -> list[str]:
        widths = {name: max(len(name), *(len(row[name]) for row in self.rows)) for name in self.rows[0]}
        first = next(iter(widths))
        lines = [
            "  ".join(
                f"{row[name]:<{width}}" if name == first else f"{row[name]:>{width}}" for name, width in widths.items()
            )
            for row in [{name: name for name in widths}, *self.rows]
        ]
        return [self.title, "; ".join(f"{name}: {value}" for name, value in self.settings.items()), *lines, *self.notes]

    def _markdown(self) -> list[str]:
        names = list(self.rows[0])
        rule = ["---", *("---:" for _ in names[1:])]
        lines = [_cells(row) for row in (names, rule, *(list(row.values()) for row in self.rows))]
        settings = [f"- {name}: {value}" for name, value in self.settings.items()]
        return [
            f"# {self.title}",
            "",
            *settings,
            "",
            *lines,
            "",
            *(line for note in self.notes for line in (note, "")),
        ][:-1]


def machine() -> dict[str, str]:
    """What the figures of this process hold for."""
    return {
        "CPU": _cpu_model(),
        "cores": f"{cores()} usable",
        "torch": str(torch.__version__),
        "fastmae": __version__,
        "Python": platform.python_version(),
    }


def check_out(out: Path | None) -> None:
    """A place for the Markdown file, before the hour of measuring and not after it.

    Raises:
        InputError: no file can be there.
    """
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(
            f"--out {out}: {'is a folder' if out.is_dir() else 'its folder does not exist'}; give the path of a Markdown file"
        )


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _cpu_model() -> str:
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
