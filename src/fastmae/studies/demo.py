"""`fastmae demo`: the whole path in minutes on real labelled images, with the baseline beside it, in one HTML page."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from fastmae.config import OFFLINE_TEACHER, DemoConfig, KnnConfig, PretrainConfig, TokenizeConfig, implied_values
from fastmae.config.recipes import load_recipe
from fastmae.errors import InputError
from fastmae.evaluate.knn import knn
from fastmae.images.sources import labelled_split
from fastmae.offline.tokenize import tokenize
from fastmae.pretraining.pretrain import pretrain
from fastmae.pretraining.step import speed
from fastmae.reporting.charts import Curves, bars
from fastmae.reporting.html_page import Section, write_page
from fastmae.reporting.predictions import predictions_png
from fastmae.runs.folder import read_metrics, read_run
from fastmae.runtime.durable import write_whole
from fastmae.tokens import TokenStore

RECIPE, MAE_RECIPE = "vit_tiny_cpu", "mae_tiny_cpu"
PATCH_SIZE = 8
PHOTOS = {"middle_size": 96, "teacher_size": None, "flip": True}
DIGITS = {"middle_size": 72, "teacher_size": 128, "flip": False}
"""A digit fills its picture and is another sign when mirrored; it has 8 x 8 pixels, so the teacher need not look at 224."""
PICTURES = 6
TIMED_STEPS = 12

RANDOM, MAE, FASTMAE, TEACHER = "random init", "MAE (pixels)", "FastMAE", f"teacher ({OFFLINE_TEACHER})"


def demo(config: DemoConfig) -> dict[str, Any]:
    """Tokenise, pre-train both for the same time, compare by kNN, draw; the command's JSON."""
    begun = time.monotonic()
    data = config.images or _write_digits(config.out / "digits")
    sizes: dict[str, Any] = PHOTOS if config.images else DIGITS
    for split in ("train", "val"):
        labelled_split(data, split)  # fails now, not after the training
    common: dict[str, Any] = {"seed": config.seed, "device": config.device}
    store = config.out / "demo.tokens"
    tokenized = tokenize(
        TokenizeConfig(
            images=data / "train",
            store=store,
            teacher=OFFLINE_TEACHER,
            middle_size=str(sizes["middle_size"]),
            teacher_size=sizes["teacher_size"],
            patch_size=PATCH_SIZE,
            **common,
        )
    )
    tokenize_seconds = time.monotonic() - begun
    runs = {FASTMAE: config.out / "fastmae", MAE: config.out / "mae"}
    for name, run in runs.items():
        _pretrain_for(config, store, run, RECIPE if name == FASTMAE else MAE_RECIPE, sizes["flip"])
    accuracy = {
        name: knn(KnnConfig(run=str(run), data=data, features=cast(Any, features), **common))
        for name, run, features in (
            (RANDOM, runs[FASTMAE], "random"),
            (MAE, runs[MAE], "encoder"),
            (FASTMAE, runs[FASTMAE], "encoder"),
            (TEACHER, runs[FASTMAE], "teacher"),
        )
    }
    logs = {name: read_metrics(run) for name, run in runs.items()}
    rows = [
        {
            "features": name,
            "kNN top-1 %": f"{result['top1']:.1f}",
            "top-5 %": f"{result['top5']:.1f}",
            "pre-training s": f"{logs[name][-1]['seconds']:.0f}" if name in logs else "-",
            "epochs": f"{logs[name][-1]['epoch']:.0f}" if name in logs else "-",
        }
        for name, result in accuracy.items()
    ]
    page = config.out / "index.html"
    sections = _sections(rows, accuracy, logs, runs, store, tokenize_seconds, config.seed)
    write_page(page, "fastmae demo", _lead(config, data, tokenized, logs), sections)
    _print_table(rows)
    print(
        f"{page}: curves and pictures; {time.monotonic() - begun:.0f} s in all, {tokenize_seconds:.0f} s of it tokenising"
    )
    return {
        "top1": accuracy[FASTMAE]["top1"],
        "html": str(page),
        "rows": rows,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _write_digits(folder: Path) -> Path:
    """scikit-learn's 1,797 handwritten digits (8 x 8, grey) as PNG files; every fourth for validation.

    The demo's sizes were chosen on another quarter (the numbers 3 mod 4), which is for training here.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise InputError(
            "the demo's images come with scikit-learn; pip install 'fastmae[demo]', or give --images DIR"
        ) from error
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("val" if number % 4 == 1 else "train") / str(label) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((pixels * (255 / 16)).astype("uint8"))
            write_whole(path, partial(picture.save, format="PNG"))
    return folder


def _pretrain_for(config: DemoConfig, store: Path, run: Path, recipe: str, flip: bool) -> None:
    """Pre-train for the asked time: the epochs come from the measured speed, so that the schedule ends with the time."""
    values = load_recipe(recipe)
    values |= {
        **implied_values(values.get("target", "tokens")),
        **values,
        "recipe": recipe,
        "seed": config.seed,
        "device": config.device,
    }
    options = PretrainConfig(stores=(str(store),), run=run, **{**values, "flip": flip})
    if not (run / "run.json").exists():
        epochs = round(60 * config.minutes * speed(options, TIMED_STEPS) / len(TokenStore(store)))
        options = replace(options, epochs=max(1, epochs))
    else:  # an interrupted demo goes on with what it had chosen
        options = replace(options, epochs=read_run(run)["options"]["epochs"])
    pretrain(replace(options, warmup_epochs=min(options.warmup_epochs, options.epochs / 5)))


def _lead(config: DemoConfig, data: Path, tokenized: dict[str, Any], logs: dict[str, list[dict[str, Any]]]) -> str:
    seconds = {name: entries[-1]["seconds"] for name, entries in logs.items()}
    what = "your images" if config.images else "scikit-learn's handwritten digits"
    return (
        f"{what} ({data}): {tokenized['images']} images tokenised once by {OFFLINE_TEACHER}, {tokenized['bytes'] / 1e6:.0f} MB on disk; "
        f"then FastMAE trained {seconds[FASTMAE]:.0f} s and MAE {seconds[MAE]:.0f} s on the same images, "
        f"with the same encoder, batch and machine ({torch.get_num_threads()} threads, torch {torch.__version__})."
    )


def _sections(
    rows: list[dict[str, Any]],
    accuracy: dict[str, dict[str, Any]],
    logs: dict[str, list[dict[str, Any]]],
    runs: dict[str, Path],
    store: Path,
    tokenize_seconds: float,
    seed: int,
) -> list[Section]:
    losses = {
        "FastMAE, masked patches": [{"s": e["seconds"], "loss": e["decoder_loss"]} for e in logs[FASTMAE]],
        "FastMAE, mean over the encoder's layers": [
            {"s": e["seconds"], "loss": e["layers_loss"]} for e in logs[FASTMAE]
        ],
        "MAE, masked pixels": [{"s": e["seconds"], "loss": e["decoder_loss"]} for e in logs[MAE]],
    }
    return [
        Section(
            "k-nearest neighbours on images never trained on",
            f"One seed. Random init is the floor, the teacher the ceiling. Tokenising took {tokenize_seconds:.0f} s, once, "
            "and is not in the pre-training seconds.",
            rows,
            charts=[bars({name: result["top1"] for name, result in accuracy.items()}, "kNN top-1 %")],
        ),
        Section(
            "What FastMAE predicts",
            "Features as colours, by the stored features' first three principal components. The encoder saw a quarter of the patches.",
            picture=predictions_png(runs[FASTMAE], TokenStore(store), PICTURES, seed),
        ),
        Section(
            "Losses while training",
            "The two methods' losses are of different targets and can't be compared with each other.",
            charts=[Curves(losses, "s", "loss", "seconds of training", "loss").svg()],
        ),
    ]


def _print_table(rows: list[dict[str, Any]]) -> None:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in [dict(zip(widths, widths, strict=True)), *rows]:
        print(
            "  ".join(
                f"{row[name]:<{width}}" if name == "features" else f"{row[name]:>{width}}"
                for name, width in widths.items()
            )
        )
