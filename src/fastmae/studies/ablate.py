"""`fastmae ablate`: the paper's ablations, row by row, at your size."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fastmae.config import AblateConfig, KnnConfig, PretrainConfig
from fastmae.config.recipes import check_baseline, load_recipe
from fastmae.errors import InputError
from fastmae.evaluate.knn import labelled_features
from fastmae.offline.tokenize import tokenize
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretrain
from fastmae.probes.labelled import open_labelled
from fastmae.probes.logistic import linear_accuracy
from fastmae.probes.neighbours import knn_accuracy
from fastmae.reporting.charts import bars
from fastmae.reporting.html_page import Section, write_page
from fastmae.runtime.durable import write_json
from fastmae.runtime.table import text_table, with_std

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: first column of the table, and name of the run folders.
        paper: the paper's figure (ImageNet, fine-tuned, percent) with its setting; '' if the paper has no such row.
        options: options of pretrain, on top of the study's.
        teacher: index of its teacher among those given.
    """

    name: str
    paper: str
    options: dict[str, Any]
    teacher: int = 0


WITHOUT_TRICKS: dict[str, Any] = {"norm": "none", "all_layers": False}


def _targets(config: AblateConfig) -> list[Row]:
    check_baseline(config.mae_recipe, config.recipe)
    return [
        Row("MAE, pixels", "82.9 (ViT-B, 300 epochs)", {"recipe": config.mae_recipe}),
        Row("HOG", "", {"target": "hog"}),
        Row("FastMAE, stored tokens", "84.3 (MAE-B teacher)", {"target": "tokens"}),
        Row("FastMAE, online teacher", "84.4 (MAE-B teacher)", {"target": "teacher"}),
    ]


def _teachers(config: AblateConfig) -> list[Row]:
    figures = "MAE-B 84.3 / 84.4, DINO-B 84.5 / 84.5, CLIP-B 84.4 / 84.4, iBOT-B 84.6 / 84.7 (stored / online)"
    rows: list[Row] = []
    for index, spec in enumerate(_teacher_specs(config)):
        rows += [
            Row(f"{spec}, stored", figures if index == 0 else "", {"target": "tokens"}, index),
            Row(f"{spec}, online", "", {"target": "teacher"}, index),
        ]
    return rows


def _tricks(_: AblateConfig) -> list[Row]:
    return [
        Row("nothing", "83.9", WITHOUT_TRICKS),
        Row("patch norm", "84.2", {**WITHOUT_TRICKS, "norm": "patch"}),
        Row("channel norm", "84.1", {**WITHOUT_TRICKS, "norm": "channel"}),
        Row("all layers", "84.1", {**WITHOUT_TRICKS, "all_layers": True}),
        Row("channel norm, all layers", "84.4", {"norm": "channel", "all_layers": True}),
        Row("patch norm, all layers", "84.5", {"norm": "patch", "all_layers": True}),
        Row("store norm, all layers", "", {"norm": "store", "all_layers": True}),
    ]


def _encoders(config: AblateConfig) -> list[Row]:
    few_epochs = max(1, config.epochs // 5)  # the paper: 60 and 300
    recipe = load_recipe(config.recipe)
    if not {"encoder_depth", "encoder_width", "encoder_heads"} <= recipe.keys():
        raise InputError(
            f"--recipe {config.recipe}: the table encoders needs a recipe with the encoder's depth, width and heads"
        )
    depth, width, heads = (int(recipe[f"encoder_{name}"]) for name in ("depth", "width", "heads"))
    large = {"encoder_depth": depth * 3 // 2, "encoder_width": width * 3 // 2, "encoder_heads": heads * 3 // 2}
    large_name = f"{large['encoder_depth']} x {large['encoder_width']}"
    return [
        Row(f"{depth} x {width}, {config.epochs} epochs", "81.8 (ViT-S, 300 epochs, iBOT-B)", {}),
        Row(f"{large_name}, {few_epochs} epochs", "83.5 (ViT-B, 60 epochs, DINO-B)", {**large, "epochs": few_epochs}),
        Row(f"{large_name}, {config.epochs} epochs", "84.3 (ViT-B, 300 epochs, DINO-B)", large),
    ]


def _decoder(_: AblateConfig) -> list[Row]:
    note = "changes little (Sec. 4.3.3)"
    return [Row(f"{depth} blocks", note if depth == 1 else "", {"decoder_depth": depth}) for depth in range(1, 5)]


TABLES: dict[str, tuple[str, Callable[[AblateConfig], list[Row]]]] = {
    "targets": ("Table 2: what is predicted", _targets),
    "teachers": ("Table 3: the teacher, stored and online", _teachers),
    "tricks": ("Table 4: guidance normalisation and all layers matter", _tricks),
    "encoders": ("Table 5: encoders and epochs", _encoders),
    "decoder": ("Sec. 4.3.3: decoder depth", _decoder),
}


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Run the missing rows, then draw the table; the command's JSON.

    Raises:
        InputError: images or options that can't be used.
    """
    open_labelled(config.images)  # fails now rather than after the training
    title, make_rows = TABLES[config.table]
    rows = make_rows(config)
    stores = _tokenize_all(config, {row.teacher for row in rows})
    seeds = range(config.seed, config.seed + config.seeds)
    runs = {row.name: [_run_options(config, row, stores[row.teacher], seed) for seed in seeds] for row in rows}
    for options in runs.values():
        make_plan(options[0])  # a mistake in the last row is found before the first row is trained
    results = [_summary(row, [_measure(config, row.name, options) for options in runs[row.name]]) for row in rows]
    _publish(config, title, results)
    return {"rows": results, "html": str(config.out / f"{config.table}.html")}


def _teacher_specs(config: AblateConfig) -> list[str]:
    specs = config.teacher.split(",")
    if len(specs) > 1 and (config.table != "teachers" or config.teacher_weights or config.teacher_block is not None):
        raise InputError(
            "--teacher: only the table teachers takes several, without --teacher-weights and --teacher-block"
        )
    return specs


def _tokenize_all(config: AblateConfig, teachers: set[int]) -> dict[int, Path]:
    """A store for each teacher that a row needs."""
    stores = {}
    for index, spec in enumerate(_teacher_specs(config)):
        if index in teachers:
            stores[index] = config.out / f"{_as_file_name(spec)}.tokens"
            log.info(f"teacher {spec}:")
            tokenize(config.tokenize_options(config.images / "train", stores[index], spec))
    return stores


def _run_options(config: AblateConfig, row: Row, store: Path, seed: int) -> PretrainConfig:
    """The options of one run of a row."""
    run = config.out / config.table / f"{_as_file_name(row.name)}-seed{seed}"
    options = config.pretrain_options(store, run, seed, **{"epochs": config.epochs, **row.options})
    return options.with_epochs(options.epochs)


def _measure(config: AblateConfig, name: str, options: PretrainConfig) -> dict[str, float]:
    """Train a run and measure its accuracies, or read them back if an earlier call did."""
    log.info(f"{name}, seed {options.seed}:")
    trained = pretrain(options)  # a finished run returns at once; one with other settings is an error
    assert trained is not None  # there is one process
    file = options.run.with_name(f"{options.run.name}.json")
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    features = labelled_features(
        KnnConfig(run=str(options.run), data=config.images, device=config.device, workers=config.workers)
    )
    data = (features.train, features.train_labels, features.val, features.val_labels, features.classes)
    result = {
        "knn": round(knn_accuracy(*data)[0], 2),
        "linear": round(linear_accuracy(*data)[0], 2),
        "seconds": trained["seconds"],
        "loss": trained["loss"],
    }
    write_json(file, result)
    return result


def _summary(row: Row, results: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation over a row's runs."""
    means = {name: round(fmean(result[name] for result in results), 2) for name in results[0]}
    stds = {}
    if len(results) > 1:
        stds = {f"{name}_std": round(stdev(result[name] for result in results), 2) for name in ("knn", "linear")}
    return {"row": row.name, **means, **stds, "seeds": len(results), "paper": row.paper}


def _publish(config: AblateConfig, title: str, results: list[dict[str, Any]]) -> None:
    rows = [
        {
            config.table: result["row"],
            "k-NN top-1 %": with_std(result["knn"], result.get("knn_std")),
            "linear top-1 %": with_std(result["linear"], result.get("linear_std")),
            "seconds": f"{result['seconds']:.0f}",
            "the paper, fine-tuned %": result["paper"] or "-",
        }
        for result in results
    ]
    lead = (
        f"{config.images}, recipe {config.recipe}, {config.epochs} epochs, {config.seeds} "
        f"seed{'s' if config.seeds > 1 else ''}, teacher {config.teacher}. The paper's column is for another size, "
        "other images and another measure: compare the order of the rows, not the figures."
    )
    labels = {"knn": "k-NN top-1 %", "linear": "linear top-1 %"}
    charts = [bars({result["row"]: result[key] for result in results}, label) for key, label in labels.items()]
    text = "k-nearest neighbours, and a linear classifier on frozen features."
    page = config.out / f"{config.table}.html"
    write_page(page, title, lead, [Section("The rows", text, rows, charts=charts)])
    log.info(f"{title}\n{text_table(rows)}\n{page}")


def _as_file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)
