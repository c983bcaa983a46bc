"""The demo's page: accuracy over seconds, what is predicted, what is found similar."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmae.config import OFFLINE_TEACHER
from fastmae.pretraining.predictions import predictions_png
from fastmae.reporting.charts import Curves, Svg
from fastmae.reporting.html_page import Section, write_page
from fastmae.reporting.nearest_neighbours import nearest_neighbours_png
from fastmae.reporting.report import LOSS_TERMS
from fastmae.runs.encoder import open_encoder
from fastmae.studies.demo_images import DemoImages
from fastmae.tokens import TokenStore

FASTMAE, BASELINE, RANDOM, TEACHER = "FastMAE", "MAE (pixels)", "random init", f"teacher ({OFFLINE_TEACHER})"
ROWS = (RANDOM, BASELINE, FASTMAE, TEACHER)
PICTURES = 6
GALLERY = 2000
"""Images among which neighbours are sought."""
Entry = dict[str, Any]


@dataclass(frozen=True)
class Demo:
    """What the demo has made.

    Attributes:
        images: what it ran on.
        store: the token store.
        store_bytes: its size.
        tokenize_seconds: what tokenising took.
        runs: method -> its run's folder.
        recipes: method -> its recipe.
        logs: method -> its log entries.
        curves: method -> its evaluations; empty without labels.
        knn: method, `RANDOM` and `TEACHER` -> k-NN top-1 in percent; empty without labels.
    """

    images: DemoImages
    store: Path
    store_bytes: int
    tokenize_seconds: float
    runs: dict[str, Path]
    recipes: dict[str, str]
    logs: dict[str, list[Entry]]
    curves: dict[str, list[Entry]]
    knn: dict[str, float]

    def seconds(self, method: str) -> float:
        """Training time of a method."""
        return round(self.logs[method][-1]["seconds"], 1)


def accuracy_rows(demo: Demo) -> list[dict[str, str]]:
    """The table: a row for each method, from the lower bound to the upper one."""
    return [_row(demo, name) for name in ROWS if name in demo.knn or name in demo.runs]


def _row(demo: Demo, name: str) -> dict[str, str]:
    accuracy = {"k-NN top-1 %": f"{demo.knn[name]:.1f}"} if demo.knn else {}
    last = demo.logs[name][-1] if name in demo.logs else None
    return {
        "features": name,
        **accuracy,
        "training s": f"{last['seconds']:.0f}" if last else "-",
        "steps": f"{last['step']}" if last else "-",
        "recipe": demo.recipes.get(name, "-"),
    }


def write_demo_page(demo: Demo, page: Path, seed: int) -> None:
    """Write the page.

    Args:
        demo: what it shows.
        page: the HTML file.
        seed: seed of the masks in the pictures.
    """
    store = TokenStore(demo.store)
    write_page(
        page,
        "fastmae demo",
        _lead(demo, len(store)),
        [_comparison(demo), *_predictions(demo, store, seed), *_neighbours(demo, store), _losses(demo)],
    )


def _lead(demo: Demo, images: int) -> str:
    return (
        f"{images:,} images ({demo.images.name}). {OFFLINE_TEACHER} saw each of them once, which took "
        f"{demo.tokenize_seconds:.0f} s, and its features are kept on disk ({demo.store_bytes / 1e6:.0f} MB). Then "
        f"FastMAE learnt to predict them for {demo.seconds(FASTMAE):.0f} s, while MAE learnt to predict pixels for "
        f"{demo.seconds(BASELINE):.0f} s: the same images, encoder and batch size, side by side, on one CPU thread "
        "each. Neither saw a label."
    )


def _comparison(demo: Demo) -> Section:
    notes = [
        "The work is fixed (steps and seeds), so another machine gives the same accuracies, sooner or later. One seed. "
        "MAE gets so many steps that it trains at least about as long as FastMAE; its learning rate was tuned for it.",
        "The recipe visible_tiny_cpu goes beyond the paper: no decoder, and the last layer alone predicts the visible "
        f"patches. Tokenising ({demo.tokenize_seconds:.0f} s, once) is not part of the training seconds.",
    ]
    if not demo.knn:
        return Section("What was trained", rows=accuracy_rows(demo), notes=notes)
    return Section(
        "Accuracy on images that were not trained on",
        "k-nearest neighbours on frozen features, while the encoders learn.",
        accuracy_rows(demo),
        notes=notes,
        charts=[_accuracy_over_seconds(demo)],
    )


def _accuracy_over_seconds(demo: Demo) -> Svg:
    start = {"seconds": 0.0, "knn_top1": demo.knn[RANDOM]}
    end = max(demo.seconds(method) for method in demo.runs)
    series = {method: [start, *entries] for method, entries in demo.curves.items()}
    series[TEACHER] = [{"seconds": seconds, "knn_top1": demo.knn[TEACHER]} for seconds in (0.0, end)]
    return Curves(series, "seconds", "knn_top1", "seconds of training", "k-NN top-1 %").svg()


def _predictions(demo: Demo, store: TokenStore, seed: int) -> list[Section]:
    return [
        Section(
            "What FastMAE predicts",
            "Features as colours: the first three principal components of the stored features. In training the encoder "
            "sees a quarter of the patches (second column) and predicts their features. Here it saw the whole view.",
            picture=predictions_png(demo.runs[FASTMAE], store, PICTURES, seed),
        ),
        Section(
            "What MAE predicts",
            "The encoder saw the second column. The pixels of each patch are drawn with the mean and std of the "
            "original patch.",
            picture=predictions_png(demo.runs[BASELINE], store, PICTURES, seed),
        ),
    ]


def _neighbours(demo: Demo, store: TokenStore) -> list[Section]:
    sections = []
    for method, run in demo.runs.items():
        opened = open_encoder(str(run))
        picture = nearest_neighbours_png(opened.network, opened.image_size, store, PICTURES, GALLERY)
        sections.append(Section(f"What {method} finds similar", _NEIGHBOURS, picture=picture))
    return sections


_NEIGHBOURS = f"The nearest of {GALLERY:,} images at most, by the cosine of the mean patch token."


def _losses(demo: Demo) -> Section:
    charts = []
    for method, entries in demo.logs.items():
        terms = {
            label: [{"s": entry["seconds"], "loss": entry.get(term)} for entry in entries]
            for term, label in LOSS_TERMS.items()
            if term in entries[-1]
        }
        charts.append(Curves(terms, "s", "loss", f"{method}: seconds of training", "loss").svg())
    return Section("Losses", f"They can't be compared with each other. (torch {torch.__version__})", charts=charts)
