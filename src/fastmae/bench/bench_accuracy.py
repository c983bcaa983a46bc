"""`fastmae bench accuracy`: accuracy against training time, FastMAE next to MAE (Fig. 5).

Both methods get the same images, encoder, machine and training time, and a schedule that ends with that time. Along the
way the encoder is measured on held-out images, by k-NN and by a linear classifier; this does not count as training
time. Tokenising is paid once per store, so ratios are given without it and with it.
"""

import itertools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch.utils.data import TensorDataset

from fastmae.bench.table import Table, machine
from fastmae.config import BenchAccuracyConfig
from fastmae.config.recipes import check_baseline, load_recipe
from fastmae.errors import InputError
from fastmae.offline.tokenize import tokenize
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretrain
from fastmae.pretraining.speed import fitted_to_time
from fastmae.probes.embed import WholeImages, embed_images, embed_with_encoder
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.probes.logistic import linear_accuracy
from fastmae.probes.neighbours import knn_accuracy
from fastmae.reporting.charts import Curves, curves_png
from fastmae.reporting.html_page import Section, write_page
from fastmae.runs.folder import read_evaluations
from fastmae.runtime.device import own_device
from fastmae.runtime.durable import write_json, write_whole
from fastmae.runtime.table import with_std
from fastmae.student.student import build_student
from fastmae.tokens import TokenStore

log = logging.getLogger(__name__)
FASTMAE, MAE = "FastMAE", "MAE"
TIMED_STEPS = 30
RECORD_FILE = "accuracy.json"
"""Beside the store: what a continued call must know about the first one."""
DECODE_BATCH_SIZE, EMBED_BATCH_SIZE = 64, 256
LABELS = {"knn": "kNN top-1 %", "linear": "linear top-1 %"}


@dataclass(frozen=True)
class Point:
    """One measurement of a method, averaged over its runs.

    Attributes:
        seconds: training time.
        knn: k-NN top-1 accuracy in percent.
        linear: top-1 accuracy of the linear classifier in percent.
        knn_std: standard deviation over the runs; None for a single run.
        linear_std: the same for the linear classifier.
    """

    seconds: float
    knn: float
    linear: float
    knn_std: float | None
    linear_std: float | None


def bench_accuracy(config: BenchAccuracyConfig) -> dict[str, Any]:
    """Tokenise, train and measure both methods, compare, draw; the command's JSON.

    Raises:
        InputError: images or options that can't be used.
    """
    data = open_labelled(config.images)
    check_baseline(config.mae_recipe, config.recipe)
    store, tokenize_seconds = _tokenize(config)
    measure = AccuracyMeasure(config, data, TokenStore(store))
    seeds = range(config.seed, config.seed + config.seeds)
    runs = {method: [_train(config, method, store, seed, measure) for seed in seeds] for method in (FASTMAE, MAE)}
    points = {method: _mean_points(measurements) for method, measurements in runs.items()}
    ratios = {key: time_ratio(points, key, tokenize_seconds) for key in LABELS}
    _publish(config, points, ratios, tokenize_seconds, data)
    rows = [
        {"method": method, **{name: value for name, value in vars(point).items() if value is not None}}
        for method, curve in points.items()
        for point in curve
    ]
    return {
        "rows": rows,
        "tokenize_seconds": round(tokenize_seconds, 1),
        "ratios": ratios,
        "html": str(config.out / "accuracy.html"),
    }


class AccuracyMeasure:
    """k-NN and linear accuracy of a student's encoder on the labelled images, which are decoded once.

    Args:
        config: the bench's options.
        data: the labelled images.
        store: tells how pictures are brought to the encoder's size.
    """

    def __init__(self, config: BenchAccuracyConfig, data: LabelledFolder, store: TokenStore):
        self.data, self.device = data, own_device(config.device)
        self.normalisation = store.normalisation
        size = int(load_recipe(config.recipe)["image_size"])
        self.pixels = {
            split: embed_images(
                WholeImages(paths, size, store.info.resize, store.info.channels),
                lambda pixels: pixels,
                torch.device("cpu"),
                DECODE_BATCH_SIZE,
                config.workers,
                f"decoding {split}",
            ).to(torch.uint8)
            for split, paths in (("train", data.train), ("val", data.val))
        }

    def __call__(self, student: Any) -> Mapping[str, float]:
        """`knn` and `linear`, top-1 in percent; and `measuring`, the seconds that it took."""
        start = time.monotonic()
        embed = embed_with_encoder(student.encoder, "mean", None, *self.normalisation)
        train, val = (
            embed_images(
                TensorDataset(pixels), embed, self.device, EMBED_BATCH_SIZE, 0, f"measuring {split}", quiet=True
            )
            for split, pixels in self.pixels.items()
        )
        features = (train, self.data.train_labels, val, self.data.val_labels, len(self.data.classes))
        knn, linear = knn_accuracy(*features)[0], linear_accuracy(*features)[0]
        return {"knn": round(knn, 3), "linear": round(linear, 3), "measuring": round(time.monotonic() - start, 2)}


def time_ratio(points: Mapping[str, Sequence[Point]], key: str, tokenize_seconds: float) -> dict[str, Any]:
    """How much sooner FastMAE reaches MAE's best accuracy.

    Both curves are linear between their points. FastMAE's time is the first one at which its curve reaches MAE's best.

    Args:
        points: method -> its points in order.
        key: 'knn' or 'linear'.
        tokenize_seconds: added to FastMAE's time for `with_tokenising`.

    Returns:
        `accuracy` (MAE's best, percent), `mae_seconds`, `fastmae_seconds`, `ratio`, `with_tokenising`; the last three
        are None if FastMAE never reaches it.
    """
    best = max(points[MAE], key=lambda point: getattr(point, key))
    accuracy = getattr(best, key)
    seconds = first_reached([(point.seconds, getattr(point, key)) for point in points[FASTMAE]], accuracy)
    with_tokenising = None if seconds is None else seconds + tokenize_seconds
    return {
        "accuracy": accuracy,
        "mae_seconds": best.seconds,
        "fastmae_seconds": seconds,
        "ratio": round(best.seconds / seconds, 2) if seconds else None,
        "with_tokenising": round(best.seconds / with_tokenising, 2) if with_tokenising else None,
    }


def first_reached(curve: Sequence[tuple[float, float]], value: float) -> float | None:
    """The first time at which a curve of (seconds, value), linear between its points, reaches a value; None if
    never."""
    if curve[0][1] >= value:
        return curve[0][0]
    for (before, low), (after, high) in itertools.pairwise(curve):
        if low < value <= high:
            return before + (after - before) * (value - low) / (high - low)
    return None


def _tokenize(config: BenchAccuracyConfig) -> tuple[Path, float]:
    """The store, and the seconds that its making took.

    Raises:
        InputError: a folder with measurements of other settings.
    """
    store, record_file = config.out / "accuracy.tokens", config.out / RECORD_FILE
    settings = {name: getattr(config, name) for name in ("minutes", "seeds", "points")}
    record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.exists() else settings
    differences = [
        f"--{name} {record[name]}, not {value}" for name, value in settings.items() if record.get(name, value) != value
    ]
    if differences:
        raise InputError(f"{config.out}: holds a bench with {'; '.join(differences)}; give that, or another --out")
    start = time.monotonic()
    tokenize(config.tokenize_options(config.images / "train", store, config.teacher))
    if not record_file.exists():
        write_json(record_file, {**settings, "tokenize_seconds": time.monotonic() - start})
    return store, float(json.loads(record_file.read_text(encoding="utf-8"))["tokenize_seconds"])


def _train(
    config: BenchAccuracyConfig, method: str, store: Path, seed: int, measure: AccuracyMeasure
) -> list[Mapping[str, float]]:
    """The measurements of a run, from before its first step to its end."""
    run = config.out / f"{method.lower()}-{seed}"
    recipe = config.recipe if method == FASTMAE else config.mae_recipe
    options = config.pretrain_options(store, run, seed, recipe=recipe)
    options = fitted_to_time(options, 60 * config.minutes / 2 / config.seeds, TIMED_STEPS)
    options = replace(options, knn_every=options.epochs / config.points)
    plan = make_plan(options)
    torch.manual_seed(options.seed)
    untrained = build_student(options, plan.patch_size, plan.target_dim, plan.channels).eval().to(measure.device)
    first = {"seconds": 0.0, **measure(untrained)}
    pretrain(options, measure)
    return [first, *read_evaluations(run)]


def _mean_points(runs: list[list[Mapping[str, float]]]) -> list[Point]:
    points = []
    for measurements in zip(*runs, strict=False):
        seconds, knn, linear = (fmean(each[key] for each in measurements) for key in ("seconds", "knn", "linear"))
        stds = [
            round(stdev(each[key] for each in measurements), 3) if len(measurements) > 1 else None
            for key in ("knn", "linear")
        ]
        points.append(Point(round(seconds, 1), round(knn, 3), round(linear, 3), *stds))
    return points


def _publish(
    config: BenchAccuracyConfig,
    points: Mapping[str, list[Point]],
    ratios: Mapping[str, Any],
    tokenize_seconds: float,
    data: LabelledFolder,
) -> None:
    settings = machine() | {
        "images": f"{len(data.train):,} train, {len(data.val):,} val, {len(data.classes)} classes",
        "recipes": f"{config.recipe}, {config.mae_recipe}",
        "teacher": config.teacher,
        "training": f"{config.minutes:g} minutes in all; seeds per method: {config.seeds}",
        "tokenising": f"{tokenize_seconds:.0f} s, once",
    }
    rows = [_cells(method, point) for method, curve in points.items() for point in curve]
    notes = [
        *(_sentence(LABELS[key], ratio) for key, ratio in ratios.items()),
        "Curves are linear between two measurements.",
        "Seconds are training time alone, without measuring; tokenising is given separately.",
    ]
    Table("Accuracy against training time", settings, rows, notes).publish(config.out / "accuracy.md")
    panels = [_panel(points, key, label, tokenize_seconds) for key, label in LABELS.items()]
    write_whole(config.out / "accuracy.png", lambda temporary: temporary.write_bytes(curves_png(panels)))
    lead = "; ".join(f"{name}: {value}" for name, value in settings.items())
    charts = [panel.svg() for panel in panels]
    sections = [Section("Accuracy against seconds", " ".join(notes), charts=charts), Section("All points", rows=rows)]
    page = config.out / "accuracy.html"
    write_page(page, "FastMAE and MAE: accuracy against training time", lead, sections)
    log.info(f"{page}: the figure, also as accuracy.png; the table as accuracy.md")


def _panel(points: Mapping[str, list[Point]], key: str, label: str, tokenize_seconds: float) -> Curves:
    series = {
        method: [{"s": point.seconds, "y": getattr(point, key)} for point in curve] for method, curve in points.items()
    }
    series["FastMAE, tokenising added"] = [
        {"s": entry["s"] + tokenize_seconds, "y": entry["y"]} for entry in series[FASTMAE]
    ]
    return Curves(series, "s", "y", "seconds of training", label)


def _cells(method: str, point: Point) -> dict[str, str]:
    return {
        "method": method,
        "seconds": f"{point.seconds:.0f}",
        LABELS["knn"]: with_std(point.knn, point.knn_std),
        LABELS["linear"]: with_std(point.linear, point.linear_std),
    }


def _sentence(label: str, ratio: Mapping[str, Any]) -> str:
    best = f"{label}: MAE is best, at {ratio['accuracy']:.1f}, after {ratio['mae_seconds']:.0f} s"
    if ratio["ratio"] is None:
        return f"{best}; FastMAE {'starts there' if ratio['fastmae_seconds'] == 0 else 'does not reach it'}."
    times = f"{ratio['ratio']:g} times sooner (with tokenising: {ratio['with_tokenising']:g} times)"
    return f"{best}; FastMAE reaches that after {ratio['fastmae_seconds']:.0f} s, {times}."
