"""The runs of `bench accuracy`: which there are, how long each trains, and what its encoder is worth.

A schedule that ends early learns more in its time than the first minutes of a long one. So each recipe of FastMAE has
several short runs, whose schedules end at growing fractions of MAE's time and which are measured at their ends. MAE has
one long run, measured along the way, of which the best point counts. Measuring does not count as training time.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import TensorDataset

from fastmae.bench.accuracy_curves import Point, mean_points
from fastmae.config import BenchAccuracyConfig, PretrainConfig
from fastmae.config.recipes import load_recipe
from fastmae.outside.documents import read_json
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretrain
from fastmae.pretraining.speed import fitted_to_time
from fastmae.probes.embed import WholeImages, embed_images, embed_with_encoder
from fastmae.probes.labelled import LabelledFolder
from fastmae.probes.logistic import linear_accuracy
from fastmae.probes.neighbours import knn_accuracy
from fastmae.runs.folder import RUN_FILE, read_evaluations, read_run
from fastmae.runtime.device import own_device
from fastmae.runtime.durable import write_json
from fastmae.runtime.forecast import Forecast
from fastmae.runtime.progress import Progress, duration
from fastmae.runtime.wording import counted
from fastmae.student.student import build_student
from fastmae.tokens import TokenStore

log = logging.getLogger(__name__)
MAE = "MAE"
TIMED_STEPS = 60
DECODE_BATCH_SIZE, EMBED_BATCH_SIZE = 64, 256
Measurement = Mapping[str, float]
"""`seconds` of training, `epoch`, and the `knn` and `linear` accuracy in percent."""


@dataclass(frozen=True)
class Method:
    """A curve of the figure.

    Attributes:
        name: its name in the table.
        label: how the folders of its runs begin.
        recipe: its recipe.
        fractions: the training times of its runs, divided by MAE's; the shortest first.
        points: measurements along each of them, the last one at its end.
        given: pretrain options over the recipe.
    """

    name: str
    label: str
    recipe: str
    fractions: tuple[Fraction, ...]
    points: int = 1
    given: Mapping[str, Any] = field(default_factory=dict)


def methods(config: BenchAccuracyConfig) -> list[Method]:
    """FastMAE's recipes, plain distillation, and MAE at the end."""
    first, fractions = config.recipes[0], config.time_fractions
    rows = [Method(f"FastMAE, {recipe}", recipe, recipe, fractions) for recipe in config.recipes]
    if config.distillation and load_recipe(first).get("mask_ratio") != 0:
        name = f"distillation, {first} unmasked"
        rows.append(Method(name, f"{first}-unmasked", first, fractions, given={"mask_ratio": 0.0}))
    return [*rows, Method(MAE, "mae", config.mae_recipe, (Fraction(1),), config.points)]


class AccuracyMeasure:
    """k-NN and linear accuracy of a student's encoder on the labelled images.

    Args:
        config: the bench's options.
        data: the labelled images.
        store: tells how pictures are brought to the encoder's size.
    """

    def __init__(self, config: BenchAccuracyConfig, data: LabelledFolder, store: TokenStore):
        self.config, self.data, self.store = config, data, store
        self.device = own_device(config.device)

    @cached_property
    def pixels(self) -> dict[str, torch.Tensor]:
        """The images, decoded once, when they are first needed: uint8 [n, K, S, S] of train and val."""
        size, info = int(load_recipe(self.config.recipes[0])["image_size"]), self.store.info
        return {
            split: embed_images(
                WholeImages(paths, size, info.resize, info.channels, info.value_range),
                lambda pixels: pixels,
                torch.device("cpu"),
                DECODE_BATCH_SIZE,
                self.config.workers,
                f"decode {split}",
            ).to(torch.uint8)
            for split, paths in (("train", self.data.train), ("val", self.data.val))
        }

    def __call__(self, student: Any) -> dict[str, float]:
        """`knn` and `linear`, top-1 in percent; and `measuring`, the seconds that it took."""
        pixels = self.pixels
        start = time.monotonic()
        embed = embed_with_encoder(student.encoder, "mean", None, *self.store.normalisation)
        train, val = (
            embed_images(TensorDataset(pixels[split]), embed, self.device, EMBED_BATCH_SIZE, 0, f"measure {split}")
            for split in ("train", "val")
        )
        features = (train, self.data.train_labels, val, self.data.val_labels, len(self.data.classes))
        knn = knn_accuracy(*features, device=self.device)[0]
        linear = linear_accuracy(*features, device=self.device)[0]
        return {"knn": round(knn, 3), "linear": round(linear, 3), "measuring": round(time.monotonic() - start, 2)}


@dataclass
class AccuracyRuns:
    """Trains and measures the methods. What is done already is read back.

    Attributes:
        config: the bench's options.
        store: the token store.
        data: the labelled images.
        methods: all of them.
        measuring: seconds of a measurement.
        forecast: of the runs' time.
        progress: counts the runs.
    """

    config: BenchAccuracyConfig
    store: Path
    data: LabelledFolder
    methods: list[Method]
    measuring: float = 0.0
    forecast: Forecast = field(default_factory=lambda: Forecast(0.0))
    progress: Progress = field(default_factory=lambda: Progress("bench accuracy", "runs"))

    @cached_property
    def measure(self) -> AccuracyMeasure:
        """Measures a student."""
        return AccuracyMeasure(self.config, self.data, TokenStore(self.store))

    @property
    def seeds(self) -> range:
        """The seeds of each method's runs."""
        return range(self.config.seed, self.config.seed + self.config.seeds)

    @property
    def mae_seconds(self) -> float:
        """Training time of one run of MAE: all runs together take `--minutes`."""
        total = sum(sum(method.fractions) for method in self.methods)
        return 60 * self.config.minutes / len(self.seeds) / float(total)

    def announcement(self) -> str:
        """What will be trained, and for how long."""
        *ours, _ = self.methods
        seeds = len(self.seeds)
        shortest, longest = (float(ours[0].fractions[end]) * self.mae_seconds for end in (0, -1))
        return (
            f"{counted(len(self.all()), 'run')}, {duration(60 * self.config.minutes)} of training in all: MAE for "
            f"{duration(self.mae_seconds)}; {counted(len(ours), 'method')} for {duration(shortest)} to "
            f"{duration(longest)} a run{f'; {seeds} seeds' if seeds > 1 else ''}. Tokenising comes first"
        )

    def all(self) -> list[tuple[Method, Fraction, int]]:
        """Method, fraction and seed of each run."""
        return [(method, share, seed) for method in self.methods for share in method.fractions for seed in self.seeds]

    def begin(self) -> None:
        """Measure the untrained encoders, and say how long the runs will take. The store must be there."""
        untrained = [self._untrained(seed) for seed in self.seeds]
        self.measuring = median([figures.get("measuring", 0.0) for figures in untrained])
        runs = self.all()
        missing = [run for run in runs if not self._is_done(*run)]
        self.forecast = Forecast(sum(self._seconds(method, fraction) for method, fraction, _ in missing))
        self.progress = Progress("bench accuracy", "runs", len(runs), len(runs) - len(missing))
        measurements = sum(method.points for method, _, _ in missing)
        if missing:
            log.info(
                f"about {duration(self.forecast.seconds_left())} here: {len(missing)} of {counted(len(runs), 'run')} "
                f"to do, with {counted(measurements, 'measurement')} of {self.measuring:.1f} s each"
            )

    def _seconds(self, method: Method, fraction: Fraction) -> float:
        """How long a run takes, with its measurements."""
        return float(fraction) * self.mae_seconds + method.points * self.measuring

    def _is_done(self, method: Method, fraction: Fraction, seed: int) -> bool:
        run = self._options(method, fraction, seed).run
        if not (run / RUN_FILE).exists():
            return False
        description, evaluations = read_run(run), read_evaluations(run)
        options = description["options"]
        a_step = options["batch_size"] / description["store"]["images"]  # the last one may end before the last epoch
        return bool(evaluations) and evaluations[-1]["epoch"] >= options["epochs"] - a_step

    def points(self, method: Method) -> list[Point]:
        """Train and measure all runs of a method. To be called within `progress`, after `begin`."""
        measurements: dict[int, list[Measurement]] = {seed: [self._untrained(seed)] for seed in self.seeds}
        for fraction in method.fractions:
            epochs = None
            for seed in self.seeds:
                options = self._options(method, fraction, seed)
                if epochs is None:  # all seeds have the same schedule
                    epochs = fitted_to_time(options, float(fraction) * self.mae_seconds, TIMED_STEPS).epochs
                options = options.with_epochs(epochs)
                share = f" ({fraction} of MAE's time)" if fraction < 1 else ""
                if not (is_done := self._is_done(method, fraction, seed)):
                    log.info(f"{method.name}, seed {seed}: {duration(float(fraction) * self.mae_seconds)}{share}")
                    self.forecast.begin(options.run)
                    self.progress.expect(self.forecast.seconds_left())
                    self.progress.now(f"{method.name}, seed {seed}")
                pretrain(replace(options, knn_every=epochs / method.points), self.measure)
                if not is_done:
                    self.forecast.end(options.run, self._seconds(method, fraction))
                    self.progress.advance(1)
                    self.progress.expect(self.forecast.seconds_left())
                measurements[seed] += read_evaluations(options.run)
        return mean_points(list(measurements.values()))

    def _options(self, method: Method, fraction: Fraction, seed: int) -> PretrainConfig:
        run = self.config.out / f"{method.label}-{str(fraction).replace('/', 'of')}-seed{seed}"
        return self.config.pretrain_options(self.store, run, seed, recipe=method.recipe, **method.given)

    def _untrained(self, seed: int) -> Measurement:
        """The encoder before its training. It is the same one for all methods."""
        file = self.config.out / f"untrained-seed{seed}.json"
        if not file.exists():
            options = self._options(self.methods[0], Fraction(1), seed)
            plan = make_plan(options)
            torch.manual_seed(seed)
            student = build_student(options, plan.patch_size, plan.target_dim, plan.channels)
            with Progress("measure the untrained encoder", minor=True):
                figures = self.measure(student.eval().to(self.measure.device))
            write_json(file, {"seconds": 0.0, "epoch": 0.0, **figures})
        return read_json(file, dict[str, float], way_out="delete it; the same call measures it again")
