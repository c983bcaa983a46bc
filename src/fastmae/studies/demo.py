"""`fastmae demo`: the whole path in minutes on real labelled images, next to MAE, on one HTML page.

FastMAE is shown twice: as in the paper, and beyond it without a decoder.
"""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastmae.config import OFFLINE_TEACHER, DemoConfig, KnnConfig, PretrainConfig, TokenizeConfig
from fastmae.errors import InputError
from fastmae.evaluate.knn import knn
from fastmae.offline.timed import tokenize_timed
from fastmae.pretraining.pretrain import pretrain
from fastmae.pretraining.speed import fitted_to_time
from fastmae.probes.embed import check_decodable
from fastmae.probes.labelled import open_labelled
from fastmae.reporting.charts import Curves, Svg, bars
from fastmae.reporting.html_page import Section, write_page
from fastmae.reporting.predictions import predictions_png
from fastmae.reporting.report import LOSS_TERMS
from fastmae.runs.folder import read_metrics
from fastmae.runtime.durable import write_whole
from fastmae.runtime.ownership import owned
from fastmae.runtime.table import text_table
from fastmae.tokens import TokenStore

log = logging.getLogger(__name__)
PATCH_SIZE = 8
PHOTO_OPTIONS: dict[str, Any] = {"middle_size": 96, "teacher_size": None, "flip": True}
DIGIT_OPTIONS: dict[str, Any] = {"middle_size": 72, "teacher_size": 128, "flip": False}
"""A digit fills its picture and is another sign when mirrored. It has 8 x 8 pixels, so the teacher needs no 224."""
PICTURES = 6
TIMED_STEPS = 12
RANDOM, MAE, TEACHER = "random init", "MAE (pixels)", f"teacher ({OFFLINE_TEACHER})"
PAPER, BEYOND = "FastMAE, the paper's", "FastMAE, visible patches alone"
RECIPES = {MAE: "mae_tiny_cpu", PAPER: "vit_tiny_cpu", BEYOND: "visible_tiny_cpu"}
FOLDERS = {MAE: "mae", PAPER: "fastmae", BEYOND: "visible"}


def demo(config: DemoConfig) -> dict[str, Any]:
    """Tokenise, pre-train all methods equally long, compare by k-NN, draw the page; the command's JSON.

    Raises:
        InputError: images that can't be used, or another process that works in the folder.
    """
    with owned(config.out, "demo"):
        return _demo(config)


def _demo(config: DemoConfig) -> dict[str, Any]:
    start = time.monotonic()
    data = config.images or _write_digits(config.out / "digits")
    data_options = PHOTO_OPTIONS if config.images else DIGIT_OPTIONS
    store = config.out / "demo.tokens"
    options = TokenizeConfig(
        images=data / "train",
        store=store,
        teacher=OFFLINE_TEACHER,
        middle_size=data_options["middle_size"],
        teacher_size=data_options["teacher_size"],
        patch_size=PATCH_SIZE,
        seed=config.seed,
        device=config.device,
    )
    check_decodable(open_labelled(data), options, "images")
    tokenized, tokenize_seconds = tokenize_timed(options, config.out / "tokenizing.json")
    runs = {method: config.out / folder for method, folder in FOLDERS.items()}
    for method, run in runs.items():
        _pretrain(config, store, run, RECIPES[method], data_options["flip"])
    accuracies = _accuracies(config, data, runs)
    logs = {method: read_metrics(run) for method, run in runs.items()}
    rows = [_row(name, accuracy, logs.get(name)) for name, accuracy in accuracies.items()]
    page = config.out / "index.html"
    sections = _sections(rows, accuracies, logs, runs, store, tokenize_seconds, config.seed)
    write_page(page, "fastmae demo", _lead(config, data, tokenized, logs), sections)
    seconds = time.monotonic() - start
    log.info(
        f"{text_table(rows)}\n"
        f"{page}: curves and pictures; {seconds:.0f} s in all, {tokenize_seconds:.0f} s of it tokenising"
    )
    return {"top1": accuracies[BEYOND]["top1"], "html": str(page), "rows": rows, "seconds": round(seconds, 1)}


def _write_digits(folder: Path) -> Path:
    """scikit-learn's 1,797 handwritten digits (8 x 8, grey) as PNG files; every fourth one for validation.

    The demo's settings were chosen on another quarter (numbers 3 mod 4), which is for training here.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise InputError(
            "the demo's images come with scikit-learn; pip install 'fastmae[demo]', or give --images"
        ) from error
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("val" if number % 4 == 1 else "train") / str(label) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((pixels * (255 / 16)).astype("uint8"))
            write_whole(path, partial(picture.save, format="PNG"))
    return folder


def _pretrain(config: DemoConfig, store: Path, run: Path, recipe: str, flip: bool) -> None:
    """Pre-train for the demo's time."""
    options = PretrainConfig(
        stores=(str(store),), run=run, recipe=recipe, flip=flip, seed=config.seed, device=config.device
    )
    pretrain(fitted_to_time(options, 60 * config.minutes, TIMED_STEPS))


def _accuracies(config: DemoConfig, data: Path, runs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """k-NN of all methods, between the lower and the upper bound."""
    features: dict[str, tuple[Path, Any]] = {
        RANDOM: (runs[BEYOND], "random"),
        **{method: (run, "encoder") for method, run in runs.items()},
        TEACHER: (runs[BEYOND], "teacher"),
    }
    options: dict[str, Any] = {"data": data, "seed": config.seed, "device": config.device}
    configs = {name: KnnConfig(**options, run=str(run), features=kind) for name, (run, kind) in features.items()}
    return {name: knn(config) for name, config in configs.items()}


def _row(name: str, accuracy: dict[str, Any], entries: list[dict[str, Any]] | None) -> dict[str, str]:
    return {
        "features": name,
        "kNN top-1 %": f"{accuracy['top1']:.1f}",
        "top-5 %": f"{accuracy['top5']:.1f}",
        "pre-training s": f"{entries[-1]['seconds']:.0f}" if entries else "-",
        "epochs": f"{entries[-1]['epoch']:.3g}" if entries else "-",
    }


def _lead(config: DemoConfig, data: Path, tokenized: dict[str, Any], logs: dict[str, list[dict[str, Any]]]) -> str:
    seconds = ", ".join(f"{entries[-1]['seconds']:.0f}" for entries in logs.values())
    images = "your images" if config.images else "scikit-learn's handwritten digits"
    return (
        f"{images} ({data}): {tokenized['images']} images, tokenised once by {OFFLINE_TEACHER}, "
        f"{tokenized['bytes'] / 1e6:.0f} MB on disk. Then three methods were trained for {seconds} s on the same "
        "images, with the same encoder, batch size and machine "
        f"({torch.get_num_threads()} threads, torch {torch.__version__}): MAE; FastMAE as in the paper, with a mask, a "
        "decoder and a loss on every layer; and FastMAE beyond it, which predicts the visible patches alone."
    )


def _sections(
    rows: list[dict[str, str]],
    accuracies: dict[str, dict[str, Any]],
    logs: dict[str, list[dict[str, Any]]],
    runs: dict[str, Path],
    store: Path,
    tokenize_seconds: float,
    seed: int,
) -> list[Section]:
    store_of_runs = TokenStore(store)
    return [
        Section(
            "k-nearest neighbours on images that were not trained on",
            "One seed. Random init is the lower bound, the teacher the upper one. Tokenising took "
            f"{tokenize_seconds:.0f} s, once; this is not part of the pre-training seconds.",
            rows,
            charts=[bars({name: accuracy["top1"] for name, accuracy in accuracies.items()}, "k-NN top-1 %")],
        ),
        Section(
            f"What is predicted: {PAPER}",
            "Features as colours: the first three principal components of the stored features. The encoder saw the "
            "visible patches; the decoder predicts the others.",
            picture=predictions_png(runs[PAPER], store_of_runs, PICTURES, seed),
        ),
        Section(
            f"What is predicted: {BEYOND}",
            "In training the encoder sees as many patches as in the second column, and its last layer predicts their "
            "features. Here it saw the whole view.",
            picture=predictions_png(runs[BEYOND], store_of_runs, PICTURES, seed),
        ),
        Section(
            "Losses during training",
            "The losses of different methods can't be compared with each other.",
            charts=[_losses(method, entries) for method, entries in logs.items()],
        ),
    ]


def _losses(method: str, entries: list[dict[str, Any]]) -> Svg:
    """The terms of a run's loss over time."""
    terms = {
        label: [{"s": entry["seconds"], "loss": entry.get(term)} for entry in entries]
        for term, label in LOSS_TERMS.items()
        if term in entries[-1]
    }
    return Curves(terms, "s", "loss", f"{method}: seconds of training", "loss").svg()
