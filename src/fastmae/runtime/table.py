"""A table as plain text, for the log."""

from collections.abc import Mapping, Sequence


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """One line for the column names and one for each row. The first column is aligned to the left, the others to the right.

    Args:
        rows: at least one; all with the same keys, which are the column names.
    """
    names = list(rows[0])
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
