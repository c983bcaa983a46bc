"""`fastmae bench accuracy`: accuracy against training time, FastMAE beside MAE, on the same images, encoder and machine (Fig. 5).

Both get an equal share of the time, and a schedule that ends with it. Along the way the encoder is measured on held-out images, by k-NN
and by a linear classifier; the clock stands still meanwhile. Tokenising is counted apart, and then added: it is paid once for a store.
"""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch.utils.data import TensorDataset

from fastmae.bench.table import Table, machine
from fastmae.bench.timing import check_positive
from fastmae.config import BenchAccuracyConfig, PretrainConfig, TokenizeConfig, implied_values
from fastmae.config.recipes import baseline_recipe, load_recipe
from fastmae.errors import InputError
from fastmae.offline.tokenize import tokenize
from fastmae.pretraining.plan import plan
from fastmae.pretraining.pretrain import pretrain
from fastmae.pretraining.step import speed
from fastmae.probes.embed import WholeImages, embed_pictures, embed_with_encoder
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.probes.logistic import linear_accuracy
from fastmae.probes.neighbours import knn_accuracy
from fastmae.reporting.charts import Curves, curves_png
from fastmae.reporting.html_page import Section, write_page
from fastmae.runs.folder import RUN_FILE, read_evaluations, read_run
from fastmae.runtime.device import own_device
from fastmae.runtime.durable import write_json, write_whole
from fastmae.runtime.workers import worker_count
from fastmae.student.student import build_student
from fastmae.tokens import TokenStore

FASTMAE, MAE = "FastMAE", "MAE"
TIMED_STEPS = 30
EXTRA_FILE = "accuracy.json"
"""Beside the store: what a continued call must know of the first one."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
MEASURES = {"knn": "kNN top-1 %", "linear": "linear top-1 %"}


@dataclass(frozen=True)
class Point:
    """The mean of a method's runs at one of its measurements: seconds of training, and top-1 in percent."""

    seconds: float
    knn: float
    linear: float
    knn_deviation: float | None
    linear_deviation: float | None


def bench_accuracy(config: BenchAccuracyConfig) -> dict[str, Any]:
    """Tokenise, train, measure, compare, draw; the command's JSON.

    Raises:
        InputError: images or options that can't be used.
    """
    check_positive(seeds=config.seeds, points=config.points)
    if not config.minutes > 0:
        raise InputError(f"--minutes {config.minutes}: give more than 0")
    data = open_labelled(config.images)
    baseline_recipe(config.mae_recipe, config.recipe)  # raises where they differ
    store, tokenising = _tokenise(config)
    measure = Measure(config, data, TokenStore(store))
    tracks = {
        name: [_train(config, name, store, seed, measure) for seed in range(config.seeds)] for name in (FASTMAE, MAE)
    }
    points = {name: _means(runs) for name, runs in tracks.items()}
    ratios = {key: time_ratio(points, key, tokenising) for key in MEASURES}
    rows = [
        {"method": name, **{k: v for k, v in vars(point).items() if v is not None}}
        for name in points
        for point in points[name]
    ]
    _publish(config, points, ratios, tokenising, data)
    return {
        "rows": rows,
        "tokenize_seconds": round(tokenising, 1),
        "ratios": ratios,
        "html": str(config.out / "accuracy.html"),
    }


class Measure:
    """k-NN and linear accuracy of a student's encoder on the labelled images, which are decoded once.

    Args:
        config: of the bench.
        data: the labelled images.
        store: tells how pictures come to the encoder's size.
    """

    def __init__(self, config: BenchAccuracyConfig, data: LabelledFolder, store: TokenStore):
        self.data, self.device = data, own_device(config.device)
        self.normalisation = store.normalisation
        size, workers = int(load_recipe(config.recipe)["image_size"]), worker_count(config.workers)
        self.pixels = {
            split: embed_pictures(
                WholeImages(paths, size, store.info.resize, store.info.channels), len(paths), lambda pixels: pixels,
                torch.device("cpu"), 64, workers, f"decoding {split}",
            ).to(torch.uint8)
            for split, paths in (("train", data.train), ("val", data.val))
        }  # fmt: skip

    def __call__(self, student: Any) -> Mapping[str, float]:
        """`knn` and `linear`, top-1 in percent; and the seconds that measuring took."""
        begun = time.monotonic()
        embed = embed_with_encoder(student.encoder, "mean", None, *self.normalisation)
        train, val = (
            embed_pictures(
                TensorDataset(pixels), len(pixels), embed, self.device, 256, 0, f"measuring {split}", quiet=True
            )
            for split, pixels in self.pixels.items()
        )
        labels, classes = (self.data.train_labels, self.data.val_labels), len(self.data.classes)
        knn, _ = knn_accuracy(train, labels[0], val, labels[1], classes, NEIGHBOURS, TEMPERATURE)
        linear, _ = linear_accuracy(train, labels[0], val, labels[1], classes)
        return {"knn": round(knn, 3), "linear": round(linear, 3), "measuring": round(time.monotonic() - begun, 2)}


def time_ratio(points: Mapping[str, Sequence[Point]], key: str, tokenising: float) -> dict[str, Any]:
    """How much sooner FastMAE is as accurate as MAE becomes at best.

    Both curves are joined by straight lines; the first time at which FastMAE's reaches MAE's best counts.

    Args:
        points: method -> its measurements, in order.
        key: 'knn' or 'linear'.
        tokenising: seconds, which are added for `with_tokenising`.

    Returns:
        `accuracy` (MAE's best, percent), `mae_seconds`, `fastmae_seconds`, `ratio`, `with_tokenising`; None where FastMAE never reaches it.
    """
    best = max(points[MAE], key=lambda point: getattr(point, key))
    wanted = getattr(best, key)
    reached = first_reached([(point.seconds, getattr(point, key)) for point in points[FASTMAE]], wanted)
    found: dict[str, Any] = {"accuracy": wanted, "mae_seconds": best.seconds, "fastmae_seconds": reached}
    ratios = {"ratio": reached, "with_tokenising": None if reached is None else reached + tokenising}
    return found | {name: None if not seconds else round(best.seconds / seconds, 2) for name, seconds in ratios.items()}


def first_reached(curve: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """The first time at which a curve of (seconds, value), joined by straight lines, reaches a value; None: never."""
    if curve[0][1] >= wanted:
        return curve[0][0]
    for (before, low), (after, high) in itertools.pairwise(curve):
        if low < wanted <= high:
            return before + (after - before) * (wanted - low) / (high - low)
    return None


def _tokenise(config: BenchAccuracyConfig) -> tuple[Path, float]:
    """The store, and the seconds that it took when it was made.

    Raises:
        InputError: a folder that holds what was measured with other settings.
    """
    store, kept = config.out / "accuracy.tokens", config.out / EXTRA_FILE
    asked = {name: getattr(config, name) for name in ("minutes", "seeds", "points")}
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else asked
    differing = [
        f"--{name} {before[name]}, not {value}" for name, value in asked.items() if before.get(name, value) != value
    ]
    if differing:
        raise InputError(f"{config.out}: holds a bench with {'; '.join(differing)}; give that again, or another --out")
    options = TokenizeConfig(
        images=config.images / "train", store=store, teacher=config.teacher, teacher_weights=config.teacher_weights,
        teacher_block=config.teacher_block, middle_size=config.middle_size, patch_size=config.patch_size, workers=config.workers,
        device=config.device, seed=config.seed,
    )  # fmt: skip
    begun = time.monotonic()
    tokenize(options)
    if not kept.exists():
        write_json(kept, {**asked, "tokenize_seconds": time.monotonic() - begun})
    return store, float(json.loads(kept.read_text(encoding="utf-8"))["tokenize_seconds"])


def _train(
    config: BenchAccuracyConfig, name: str, store: Path, seed: int, measure: Measure
) -> list[Mapping[str, float]]:
    """A run's measurements, the one before its first step among them."""
    run = config.out / f"{name.lower()}-{config.seed + seed}"
    recipe = config.recipe if name == FASTMAE else config.mae_recipe
    values = load_recipe(recipe)
    options = PretrainConfig(
        stores=(str(store),), run=run, seed=config.seed + seed, device=config.device, workers=config.workers, recipe=recipe,
        **{**implied_values(values.get("target", "tokens")), **values, "flip": config.flip},
    )  # fmt: skip
    if (run / RUN_FILE).exists():  # an interrupted bench goes on with what it had chosen
        epochs = int(read_run(run)["options"]["epochs"])
    else:
        seconds = 60 * config.minutes / 2 / config.seeds
        epochs = max(1, round(seconds * speed(options, TIMED_STEPS) / len(TokenStore(store))))
    options = replace(
        options, epochs=epochs, warmup_epochs=min(options.warmup_epochs, epochs / 5), knn_every=epochs / config.points
    )
    made = plan(options)
    torch.manual_seed(options.seed)
    untrained = build_student(options, made.patch_size, made.target_dim, made.channels).eval().to(measure.device)
    start = {"seconds": 0.0, **measure(untrained)}
    pretrain(options, measure)
    return [start, *read_evaluations(run)]


def _means(runs: list[list[Mapping[str, float]]]) -> list[Point]:
    count = min(len(run) for run in runs)
    found = []
    for place in range(count):
        here = [run[place] for run in runs]
        spread = {key: round(stdev(entry[key] for entry in here), 3) if len(here) > 1 else None for key in MEASURES}
        seconds, knn, linear = (fmean(entry[key] for entry in here) for key in ("seconds", *MEASURES))
        found.append(Point(round(seconds, 1), round(knn, 3), round(linear, 3), spread["knn"], spread["linear"]))
    return found


def _publish(
    config: BenchAccuracyConfig,
    points: Mapping[str, list[Point]],
    ratios: Mapping[str, Any],
    tokenising: float,
    data: LabelledFolder,
) -> None:
    settings = machine() | {
        "images": f"{len(data.train):,} train, {len(data.val):,} val, {len(data.classes)} classes",
        "recipes": f"{config.recipe}, {config.mae_recipe}",
        "teacher": config.teacher,
        "training": f"{config.minutes:g} minutes in all, {config.seeds} seed{'s' if config.seeds > 1 else ''} of each method",
        "tokenising": f"{tokenising:.0f} s, once",
    }
    rows = [_shown(name, point) for name, found in points.items() for point in found]
    notes = [_sentence(MEASURES[key], ratio) for key, ratio in ratios.items()]
    notes.append("Between two measurements a straight line counts.")
    notes.append("Seconds are of training alone; measuring stands outside of them, and tokenising is told apart.")
    Table("Accuracy against training time", settings, rows, notes).publish(config.out / "accuracy.md")
    panels = [_panel(points, key, label, tokenising) for key, label in MEASURES.items()]
    charts = [panel.svg() for panel in panels]
    write_whole(config.out / "accuracy.png", lambda aside: aside.write_bytes(curves_png(panels)))
    lead = "; ".join(f"{name}: {value}" for name, value in settings.items())
    sections = [Section("Accuracy against seconds", " ".join(notes), charts=charts), Section("All points", rows=rows)]
    write_page(config.out / "accuracy.html", "FastMAE and MAE: accuracy against training time", lead, sections)
    print(f"{config.out / 'accuracy.html'}: the figure; also as accuracy.png, and accuracy.md: the table")


def _panel(points: Mapping[str, list[Point]], key: str, label: str, tokenising: float) -> Curves:
    series = {
        name: [{"s": point.seconds, "y": getattr(point, key)} for point in found] for name, found in points.items()
    }
    series["FastMAE, tokenising added"] = [{"s": entry["s"] + tokenising, "y": entry["y"]} for entry in series[FASTMAE]]
    return Curves(series, "s", "y", "seconds of training", label)


def _shown(name: str, point: Point) -> dict[str, str]:
    def with_spread(value: float, deviation: float | None) -> str:
        return f"{value:.1f}" if deviation is None else f"{value:.1f} ± {deviation:.1f}"

    return {
        "method": name,
        "seconds": f"{point.seconds:.0f}",
        MEASURES["knn"]: with_spread(point.knn, point.knn_deviation),
        MEASURES["linear"]: with_spread(point.linear, point.linear_deviation),
    }


def _sentence(label: str, ratio: Mapping[str, Any]) -> str:
    best = f"{label}: MAE's best, {ratio['accuracy']:.1f}, after {ratio['mae_seconds']:.0f} s"
    if ratio["ratio"] is None:
        return f"{best}; FastMAE {'begins there' if ratio['fastmae_seconds'] == 0 else 'does not reach it'}."
    times = f"{ratio['ratio']:g} x (with tokenising {ratio['with_tokenising']:g} x)"
    return f"{best}; FastMAE reaches it in {ratio['fastmae_seconds']:.0f} s: {times}."
