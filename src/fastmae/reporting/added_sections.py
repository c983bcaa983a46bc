"""Sections for `report --also`: the results of a supervised run, or the table of a benchmark."""

from dataclasses import dataclass
from pathlib import Path

from fastmae.errors import InputError
from fastmae.outside.documents import checked
from fastmae.outside.regular_file import read_bounded
from fastmae.reporting.html_page import Section
from fastmae.runs.folder import RUN_FILE, read_evaluations, read_run
from fastmae.runtime.wording import counted, tells_top5

PICTURES = ("confusion.png", "predictions.png", "detections.png")
"""The pictures of finetune and linear, of segment, and of detect."""
BENCH_ACCURACY_TABLE = "accuracy.md"
LARGEST_TABLE, LARGEST_PICTURE = 1 << 20, 32 << 20
"""In bytes. A page holds its pictures."""


@dataclass(frozen=True)
class _Options:
    epochs: float
    batch_size: int
    lr: float


@dataclass(frozen=True)
class _Trained:
    """What a section shows of a supervised run's run.json."""

    task: str
    images: int
    options: _Options


def added_section(path: Path) -> Section:
    """A section for one path of `--also`.

    Raises:
        InputError: the path is neither a finished supervised run nor a benchmark's table.
    """
    if path.suffix == ".md":
        return _section_of_table(path)
    if (path / BENCH_ACCURACY_TABLE).is_file():
        return _section_of_table(path / BENCH_ACCURACY_TABLE)
    if not (path / RUN_FILE).is_file():
        raise InputError(
            f"--also {path}: not a run; "
            "give a folder of finetune, linear, segment, detect or bench accuracy, or a table (.md)"
        )
    return _section_of_run(path)


def _section_of_run(path: Path) -> Section:
    """The last evaluation and the picture of a supervised run."""
    description, evaluations = read_run(path), read_evaluations(path)
    if "store" in description or not evaluations:
        raise InputError(f"--also {path}: not a finished run of finetune, linear, segment or detect")
    left_out = ["step", "seconds"]
    classes = description.get("data", {}).get("classes")
    if isinstance(classes, list) and not tells_top5(len(classes)):
        left_out.append("top5")
    metrics = {name: value for name, value in evaluations[-1].items() if name not in left_out}
    picture = next((path / name for name in PICTURES if (path / name).exists()), None)
    way_out = "give a folder of finetune, linear, segment or detect"
    trained: _Trained = checked(description, _Trained, name=f"--also {path / RUN_FILE}", way_out=way_out)
    options = trained.options
    return Section(
        heading=f"{trained.task}: {path.name}",
        text=(
            f"{trained.images:,} images, {counted(options.epochs, 'epoch')}, batch size {options.batch_size}, "
            f"learning rate {options.lr:.2e}."
        ),
        rows=[{"metric": name, "value": value} for name, value in metrics.items()],
        picture=read_bounded(picture, LARGEST_PICTURE) if picture else None,
    )


def _section_of_table(path: Path) -> Section:
    """A benchmark's Markdown file as `bench --out` writes it, and the figure of the same name beside it.

    The file holds a title (#), the settings (-), one table (|) and notes.
    """
    if not path.exists():
        raise InputError(f"--also {path}: no such file; give a file that `fastmae bench ... --out` wrote")
    lines = read_bounded(path, LARGEST_TABLE).decode("utf-8", "replace").splitlines()
    table_lines = [number for number, line in enumerate(lines) if line.startswith("|")]
    cells = [_cells(lines[number]) for number in table_lines]
    if len(cells) < 3 or any(len(row) != len(cells[0]) for row in cells):
        raise InputError(f"--also {path}: holds no table; give a file that `fastmae bench ... --out` wrote")
    names, _, *rows = cells
    figure = path.with_suffix(".png")
    return Section(
        heading=next((line.lstrip("# ") for line in lines if line.startswith("#")), path.stem),
        text="; ".join(line[2:] for line in lines if line.startswith("- ")),
        rows=[dict(zip(names, row, strict=True)) for row in rows],
        picture=read_bounded(figure, LARGEST_PICTURE) if figure.exists() else None,
        notes=[line for line in lines[table_lines[-1] + 1 :] if line],
    )


def _cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip().replace("\\|", "|") for cell in line.strip().strip("|").split(" | ")]
