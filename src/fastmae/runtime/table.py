"""A table as plain text, for the log."""

from collections.abc import Mapping, Sequence


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """One line for the column names and one for each row; the first column aligned left, the others right.

    Args:
        rows: at least one; all with the same keys, which are the column names.
    """
    names = list(rows[0])
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *others]).rstrip()


def with_std(mean: float, std: float | None) -> str:
    """`32.4 ± 1.0`, or `32.4` for a single run."""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
