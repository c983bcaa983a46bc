"""A study, drawn from its study.json: tables for the terminal, and one HTML page with bars, tables and settings."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from fastmae.errors import InputError
from fastmae.outside.documents import read_json
from fastmae.reporting.charts import Svg, bars_with_whiskers
from fastmae.reporting.html_page import Section, write_page
from fastmae.runtime.table import text_table, with_std
from fastmae.runtime.wording import counted

STUDY_FILE, PAGE_FILE = "study.json", "study.html"
Study = Mapping[str, Any]
Row = Mapping[str, Any]
COLUMNS = 120
"""Widest table in a terminal."""
SHORTEST_NAME = 12
"""Of an arm, in a table that would be too wide otherwise."""
LABELS = {"knn": "k-NN", "linear": "linear", "finetune": "fine-tuned"}
LONG_LABELS = {
    "knn": "k-NN top-1 %",
    "linear": "top-1 % of a linear classifier on frozen features",
    "finetune": "top-1 % after fine-tuning",
}
MISSING = "-"


_Word = str | int | float | bool | None
_Options = dict[str, _Word | list[_Word]]
_Figure = float | None
_Interval = tuple[float, float] | None


class _RowFile(TypedDict):
    data: str
    teacher: str
    arm: str
    seeds: int
    gflops_per_image: _Figure
    seconds: _Figure
    note: str


class _RowWithFigures(_RowFile, total=False):
    knn: _Figure
    knn_std: _Figure
    knn_difference: _Figure
    knn_interval: _Interval
    linear: _Figure
    linear_std: _Figure
    linear_difference: _Figure
    linear_interval: _Interval
    finetune: _Figure
    finetune_std: _Figure
    finetune_difference: _Figure
    finetune_interval: _Interval


class _ArmFile(TypedDict):
    options: _Options
    share: float
    note: str


class _CandidateFile(TypedDict):
    options: _Options


class _CandidateWithFigures(_CandidateFile, total=False):
    knn: _Figure
    linear: _Figure
    finetune: _Figure


class _TuningFile(TypedDict):
    data: str
    teacher: str
    arm: str
    chosen: _Options
    candidates: list[_CandidateWithFigures]


_StudyFile = TypedDict(
    "_StudyFile",
    {
        "fastmae study": int,
        "title": str,
        "study": str,
        "machine": _Options,
        "split": str,
        "protocol": str,
        "metrics": list[Literal["knn", "linear", "finetune"]],
        "baseline": str,
        "seeds": list[int],
        "epochs": _Figure,
        "seconds": _Figure,
        "base": _Options,
        "tokenize": _Options,
        "teachers": dict[str, _Options | list[str]],
        "finetune": _Options | None,
        "data": dict[str, dict[str, _Word | list[_Word] | _Options]],
        "arms": dict[str, _ArmFile],
        "rows": list[_RowWithFigures],
        "tuning": list[_TuningFile],
        "failures": list[_Options],
    },
)
"""What the page reads of the file that `studies.study_results` writes."""


def read_study(folder: Path) -> dict[str, Any]:
    """A folder's study.json.

    Raises:
        InputError: something else than a study.
        OSError: it can't be read.
    """
    file, way_out = folder / STUDY_FILE, "`fastmae ablate` writes it"
    study: dict[str, Any] = read_json(file, _StudyFile, way_out=way_out)
    figures = {f"{metric}{end}" for metric in study["metrics"] for end in ("", "_std", "_difference", "_interval")}
    for row in study["rows"]:
        if not figures <= row.keys():
            raise InputError(f"{file}: arm {row['arm']} lacks {', '.join(sorted(figures - row.keys()))}; {way_out}")
    return study


def study_text(study: Study) -> str:
    """The tables, at most 120 columns wide, and what they show."""
    parts = [study["title"]]
    for heading, rows in _groups(study):
        table, notes = _fitted(_cells(study, rows))
        parts += [f"\n{heading}", table, *notes]
    return "\n".join([*parts, "", *textwrap.wrap(_legend(study), COLUMNS)])


def write_study_page(study: Study, page: Path) -> list[str]:
    """Write the page; returns the headings of its sections."""
    sections = [
        Section(heading, rows=_unbroken(_cells(study, rows)), charts=_charts(study, rows))
        for heading, rows in _groups(study)
    ]
    if study["tuning"]:
        sections.append(_tuning(study))
    if study["failures"]:
        sections.append(Section("Runs that failed", rows=list(study["failures"])))
    sections += [
        Section("Arms", rows=_arms(study)),
        Section("Settings", rows=[{"setting": name, "value": value} for name, value in _settings(study).items()]),
    ]
    write_page(page, study["title"], _legend(study), sections)
    return [section.heading for section in sections]


def _unbroken(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The rows with figures that a browser does not break over two lines."""
    return [{name: cell.replace(" ± ", "\u00a0±\u00a0") for name, cell in row.items()} for row in rows]


def _groups(study: Study) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each data set and teacher, with a heading."""
    keys = list(dict.fromkeys((row["data"], row["teacher"]) for row in study["rows"]))
    for data, teacher in keys:
        split = "held-out fifth of train/" if study["split"] == "held-out" else "val/"
        heading = f"{data}, teacher {teacher} ({split})"
        yield heading, [row for row in study["rows"] if (row["data"], row["teacher"]) == (data, teacher)]


def _cells(study: Study, rows: Sequence[Row]) -> list[dict[str, str]]:
    """The table of one data set and teacher."""
    some_are_missing = any(row["seeds"] != len(study["seeds"]) for row in rows)
    return [_row_cells(study, row, with_seeds=some_are_missing, with_note=any(r["note"] for r in rows)) for row in rows]


def _row_cells(study: Study, row: Row, with_seeds: bool, with_note: bool) -> dict[str, str]:
    cells = {"arm": row["arm"]}
    if with_seeds:
        cells["seeds"] = str(row["seeds"])
    for metric in study["metrics"]:
        label, mean = LABELS[metric], row[metric]
        cells[f"{label} %"] = MISSING if mean is None else with_std(mean, row[f"{metric}_std"])
        if len(study["arms"]) > 1:
            cells[f"Δ {label}"] = _difference(row[f"{metric}_difference"], row[f"{metric}_interval"])
    flops, seconds = row["gflops_per_image"], row["seconds"]
    cells["GFLOP"] = MISSING if flops is None else f"{flops:.3g}"
    cells["train s"] = MISSING if seconds is None else f"{seconds:.0f}"
    if with_note:
        cells["note"] = row["note"] or MISSING
    return cells


def _difference(mean: float | None, interval: Sequence[float] | None) -> str:
    """`+1.2 ± 0.8`: the 95 % interval is symmetric."""
    if mean is None:
        return MISSING
    return f"{mean:+.1f}" if interval is None else f"{mean:+.1f} ± {(interval[1] - interval[0]) / 2:.1f}"


def _fitted(rows: list[dict[str, str]]) -> tuple[str, list[str]]:
    """The table at most 120 columns wide: long names are cut, and notes that don't fit go below it."""
    bare = [{name: cell for name, cell in row.items() if name != "note"} for row in rows]
    excess = _width(text_table(bare)) - COLUMNS
    longest = max(SHORTEST_NAME, max(len(row["arm"]) for row in rows) - max(0, excess))
    bare = [{**row, "arm": _cut(row["arm"], longest)} for row in bare]
    table = text_table(bare)
    if "note" not in rows[0]:
        return table, []
    if _width(text_table(rows)) > COLUMNS:
        notes = [f"{row['arm']}: {row['note']}" for row in rows if row["note"] != MISSING]
        return table, [_cut(note, COLUMNS) for note in notes]
    return text_table(rows), []


def _width(table: str) -> int:
    return max(map(len, table.splitlines()))


def _cut(text: str, length: int) -> str:
    """The text without its middle, if it is too long: names of arms often differ at the end."""
    start = (length - 3) // 2
    return text if len(text) <= length else f"{text[:start]}...{text[start + 3 - length :]}"


def _charts(study: Study, rows: Sequence[Row]) -> list[Svg]:
    """A bar for each arm, with its standard deviation over the seeds."""
    charts = []
    for metric in study["metrics"]:
        values = {row["arm"]: row[metric] for row in rows if row[metric] is not None}
        whiskers = {row["arm"]: row[f"{metric}_std"] for row in rows if row[f"{metric}_std"] is not None}
        if values:
            charts.append(bars_with_whiskers(values, whiskers, LONG_LABELS[metric]))
    return charts


def _tuning(study: Study) -> Section:
    rows = [
        {
            "data": entry["data"],
            "teacher": entry["teacher"],
            "arm": entry["arm"],
            "candidate": _joined(candidate["options"]),
            **{f"{LABELS[metric]} %": _figure(candidate.get(metric)) for metric in study["metrics"]},
            "chosen": candidate["options"] == entry["chosen"],
        }
        for entry in study["tuning"]
        for candidate in entry["candidates"]
    ]
    return Section("Tuning, on the held-out fifth of train/", rows=rows)


def _figure(accuracy: float | None) -> str:
    return "diverged" if accuracy is None else f"{accuracy:.1f}"


def _arms(study: Study) -> list[dict[str, Any]]:
    tuned = {(entry["arm"], entry["data"], entry["teacher"]): entry["chosen"] for entry in study["tuning"]}
    return [
        {
            "arm": name,
            "options over the base": _joined(arm["options"]),
            "tuned": "; ".join(
                f"{data}, {teacher}: {_joined(c)}" for (n, data, teacher), c in tuned.items() if n == name
            ),
            "share of the training": arm["share"],
            "note": arm["note"],
        }
        for name, arm in study["arms"].items()
    ]


def _settings(study: Study) -> dict[str, str]:
    length = (
        f"{study['seconds']:g} s per run"
        if study["seconds"]
        else counted(study["epochs"], "epoch")
        if study["epochs"]
        else "the recipe's"
    )
    settings = {
        "study": study["study"],
        "base": _joined(study["base"]),
        "length": length,
        "tokenize": _joined(study["tokenize"]),
        **{f"teacher {name}": _joined(options) for name, options in study["teachers"].items()},
        "fine-tuning": "none" if study["finetune"] is None else _joined(study["finetune"]) or "the recipe's",
        **{f"data {name}": _joined(facts) for name, facts in study["data"].items()},
    }
    return settings | {str(name): str(value) for name, value in study["machine"].items()}


def _joined(options: Mapping[str, Any] | Sequence[str]) -> str:
    if not isinstance(options, Mapping):
        return " and ".join(options)
    return ", ".join(f"{name} {_joined(v) if isinstance(v, Mapping) else v}" for name, v in options.items())


def _legend(study: Study) -> str:
    """How to read the tables."""
    seeds = len(study["seeds"])
    spread = f"Mean ± standard deviation of {counted(seeds, 'seed')}." if seeds > 1 else "One seed."
    compared = ""
    if len(study["arms"]) > 1:
        compared = f" Δ: mean difference to '{study['baseline']}'" + (
            ", paired by seed, ± its 95 % interval (Student's t)." if seeds > 1 else "."
        )
    steps = " GFLOP: of a training step, per image, forward and backward."
    return f"{study['protocol']} {spread}{compared}{steps}"
