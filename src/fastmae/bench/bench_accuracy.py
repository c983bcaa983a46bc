"""`fastmae bench accuracy`: accuracy against training time, FastMAE next to MAE (Fig. 5).

All methods get the same images, encoder, batch size and machine; `accuracy_runs` says who trains how long. Encoders are
measured on held-out images, by k-NN and by a linear classifier. Tokenising is paid once per store, so ratios are given
without it and with it.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastmae.bench.accuracy_curves import Point, Ratio, time_ratio
from fastmae.bench.accuracy_runs import MAE, AccuracyRuns, methods
from fastmae.bench.table import Table, machine
from fastmae.config import BenchAccuracyConfig
from fastmae.errors import InputError
from fastmae.offline.timed import tokenize_timed
from fastmae.outside.documents import read_json
from fastmae.probes.embed import check_decodable
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.reporting.charts import Curves, curves_png
from fastmae.reporting.html_page import Section, write_page
from fastmae.runtime.durable import write_json, write_whole
from fastmae.runtime.ownership import owned
from fastmae.runtime.table import with_std
from fastmae.runtime.wording import counted

log = logging.getLogger(__name__)
RECORD_FILE = "accuracy.json"
"""Beside the store: what a continued call must know about the first one."""
FIXED = ("minutes", "seeds", "points", "recipe", "mae_recipe", "distillation", "fractions")
"""Options that a continued call can't change: they say which runs there are, and how long each one trains."""
NOTES = (
    "MAE: one run, measured along the way; its best point counts. The others: every point is the end of a run of its "
    "own, whose schedule ends there. The first point of each is the untrained encoder.",
    "Between two points, a time is read off a straight line. Seconds are training time alone, without measuring; "
    "tokenising is given separately.",
)
LABELS = {"knn": "kNN top-1 %", "linear": "linear top-1 %"}


def bench_accuracy(config: BenchAccuracyConfig) -> dict[str, Any]:
    """Tokenise, train and measure all methods, compare, draw; the command's JSON.

    Raises:
        InputError: images or options that can't be used, or another process that works in the folder.
    """
    with owned(config.out, "bench accuracy"):
        return _bench_accuracy(config)


def _bench_accuracy(config: BenchAccuracyConfig) -> dict[str, Any]:
    data = open_labelled(config.images)
    runs = AccuracyRuns(config, config.out / "accuracy.tokens", data, methods(config))
    _check_record(config)
    log.info(runs.announcement())
    options = config.tokenize_options(config.images / "train", runs.store, config.teacher)
    check_decodable(data, options, "images")
    tokenize_seconds = tokenize_timed(options, config.out / "tokenizing.json")[1]
    write_json(config.out / RECORD_FILE, _settings(config))
    runs.begin()
    with runs.progress:
        points = {method.name: runs.points(method) for method in runs.methods}
    ratios = {
        name: {key: time_ratio(points[MAE], curve, key, tokenize_seconds) for key in LABELS}
        for name, curve in points.items()
        if name != MAE
    }
    _publish(config, points, ratios, tokenize_seconds, data)
    rows = [
        {"method": name, **{key: value for key, value in vars(point).items() if value is not None}}
        for name, curve in points.items()
        for point in curve
    ]
    return {
        "rows": rows,
        "tokenize_seconds": round(tokenize_seconds, 1),
        "ratios": ratios,
        "html": str(config.out / "accuracy.html"),
    }


def _settings(config: BenchAccuracyConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in FIXED}


def _check_record(config: BenchAccuracyConfig) -> None:
    """Check that the folder is new, or holds a bench with these settings.

    Raises:
        InputError: it holds one with others.
    """
    file = config.out / RECORD_FILE
    settings = _settings(config)
    record = read_json(file, dict[str, Any], way_out="give another --out") if file.exists() else settings
    differences = [
        f"{_as_flag(name, record.get(name))}, not {_as_flag(name, value)}"
        for name, value in settings.items()
        if record.get(name) != value
    ]
    if differences:
        raise InputError(f"{config.out}: holds a bench with {'; '.join(differences)}; give that, or another --out")


def _as_flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _publish(
    config: BenchAccuracyConfig,
    points: Mapping[str, Sequence[Point]],
    ratios: Mapping[str, Mapping[str, Ratio]],
    tokenize_seconds: float,
    data: LabelledFolder,
) -> None:
    settings = machine() | {
        "images": f"{len(data.train):,} train, {len(data.val):,} val, {counted(len(data.classes), 'class', 'classes')}",
        "recipes": f"{', '.join(config.recipes)}; {config.mae_recipe}",
        "teacher": config.teacher,
        "training": f"{counted(config.minutes, 'minute')} in all; seeds per method: {config.seeds}",
        "tokenising": f"{tokenize_seconds:.0f} s, once",
    }
    rows = [_cells(name, point) for name, curve in points.items() for point in curve]
    sentences = [
        _sentence(label, {name: by_key[key] for name, by_key in ratios.items()}) for key, label in LABELS.items()
    ]
    Table("Accuracy against training time", settings, rows, [*sentences, *NOTES]).publish(config.out / "accuracy.md")
    panels = [_panel(points, key, label, tokenize_seconds) for key, label in LABELS.items()]
    write_whole(config.out / "accuracy.png", lambda temporary: temporary.write_bytes(curves_png(panels)))
    lead = "; ".join(f"{name}: {value}" for name, value in settings.items())
    reached = [
        _ratio_cells(name, label, by_key[key]) for key, label in LABELS.items() for name, by_key in ratios.items()
    ]
    sections = [
        Section("Accuracy against seconds", charts=[panel.svg() for panel in panels]),
        Section("When MAE's best accuracy is reached", rows=reached, notes=NOTES),
        Section("All points", rows=rows),
    ]
    page = config.out / "accuracy.html"
    write_page(page, "FastMAE and MAE: accuracy against training time", lead, sections)
    log.info(f"{page}: the figure, also as accuracy.png; the table as accuracy.md")


def _panel(points: Mapping[str, Sequence[Point]], key: str, label: str, tokenize_seconds: float) -> Curves:
    """The curves of all methods; for the first one, also with the tokenising added to its times."""
    series = {
        name: [{"s": point.seconds, "y": getattr(point, key)} for point in curve] for name, curve in points.items()
    }
    first, curve = next(iter(series.items()))
    series[f"{first}, tokenising added"] = [{"s": entry["s"] + tokenize_seconds, "y": entry["y"]} for entry in curve]
    shortest = min(entry["s"] for curve in series.values() for entry in curve if entry["s"] > 0)
    return Curves(series, "s", "y", f"seconds of training (logarithmic from {_seconds(shortest)} on)", label, shortest)


def _cells(name: str, point: Point) -> dict[str, str]:
    return {
        "method": name,
        "seconds": _seconds(point.seconds),
        "epochs": f"{point.epochs:.4g}",
        LABELS["knn"]: with_std(point.knn, point.knn_std),
        LABELS["linear"]: with_std(point.linear, point.linear_std),
    }


def _ratio_cells(name: str, label: str, ratio: Ratio) -> dict[str, str]:
    def times(key: str) -> str:
        return "-" if ratio[key] is None else f"{ratio[key]:.3g}"

    return {
        "method": name,
        "measured by": label,
        "MAE's best": f"{ratio['accuracy']:.1f}",
        "after s": _seconds(ratio["mae_seconds"]),
        "reached after s": _seconds(ratio["seconds"]),
        "times sooner": times("ratio"),
        "with tokenising": times("with_tokenising"),
        "first run there, s": _seconds(ratio["run_seconds"]),
        "its times sooner": times("run_ratio"),
    }


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def _sentence(label: str, ratios: Mapping[str, Ratio]) -> str:
    """MAE's best accuracy, and when each method reaches it."""
    one = next(iter(ratios.values()))
    reached = "; ".join(f"{name} {_reached(ratio)}" for name, ratio in ratios.items())
    return f"{label}: MAE is best, at {one['accuracy']:.1f}, after {_seconds(one['mae_seconds'])} s. {reached}."


def _reached(ratio: Ratio) -> str:
    if ratio["seconds"] is None:
        return "does not reach it"
    if ratio["ratio"] is None:
        return "starts there"
    times = f"{ratio['ratio']:.3g} times sooner (with tokenising {ratio['with_tokenising']:.3g})"
    at_end = (
        ""
        if ratio["run_seconds"] is None
        else f", and has it at the end of a run of {_seconds(ratio['run_seconds'])} s"
    )
    return f"reaches it after {_seconds(ratio['seconds'])} s, {times}{at_end}"
