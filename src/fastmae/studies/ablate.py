"""`fastmae ablate`: the paper's ablations, row by row, at a size of one's own."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fastmae.config import AblateConfig, KnnConfig, PretrainConfig, TokenizeConfig, implied_values
from fastmae.config.recipes import baseline_recipe, load_recipe
from fastmae.errors import InputError
from fastmae.evaluate.knn import accuracy_of, labelled_features
from fastmae.images.sources import labelled_split
from fastmae.offline.tokenize import tokenize
from fastmae.pretraining.plan import plan
from fastmae.pretraining.pretrain import pretrain
from fastmae.probes.logistic import linear_accuracy
from fastmae.reporting.charts import bars
from fastmae.reporting.html_page import Section, write_page
from fastmae.runtime.durable import write_json


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: what is in the first column, and the name of its runs' folders.
        paper: what the paper measured for it on ImageNet, fine-tuned, in per cent, with its setting; '' where it has no such row.
        options: of pretrain, over the recipe's.
        teacher: which of the teachers given, by its place.
    """

    name: str
    paper: str
    options: dict[str, Any]
    teacher: int = 0


PLAIN: dict[str, Any] = {"norm": "none", "all_layers": False}


def _targets(config: AblateConfig) -> list[Row]:
    mae = {
        name: value for name, value in baseline_recipe(config.mae_recipe, config.recipe).items() if "epochs" not in name
    }
    return [
        Row("MAE, pixels", "82.9 (ViT-B, 300 epochs)", mae),
        Row("HOG", "", {"target": "hog"}),
        Row("FastMAE, stored tokens", "84.3 (MAE-B teacher)", {"target": "tokens"}),
        Row("FastMAE, online teacher", "84.4 (MAE-B teacher)", {"target": "teacher"}),
    ]


def _teachers(config: AblateConfig) -> list[Row]:
    papers = "MAE-B 84.3 / 84.4, DINO-B 84.5 / 84.5, CLIP-B 84.4 / 84.4, iBOT-B 84.6 / 84.7"
    rows: list[Row] = []
    for place, spec in enumerate(_specs(config)):
        rows += [
            Row(f"{spec}, stored", f"{papers} (stored / online)" if place == 0 else "", {"target": "tokens"}, place),
            Row(f"{spec}, online", "", {"target": "teacher"}, place),
        ]
    return rows


def _tricks(_: AblateConfig) -> list[Row]:
    return [
        Row("nothing", "83.9", PLAIN),
        Row("patch norm", "84.2", {**PLAIN, "norm": "patch"}),
        Row("channel norm", "84.1", {**PLAIN, "norm": "channel"}),
        Row("all layers", "84.1", {**PLAIN, "all_layers": True}),
        Row("channel norm, all layers", "84.4", {"norm": "channel", "all_layers": True}),
        Row("patch norm, all layers", "84.5", {"norm": "patch", "all_layers": True}),
        Row("store norm, all layers", "", {"norm": "store", "all_layers": True}),
    ]


def _encoders(config: AblateConfig) -> list[Row]:
    short = max(1, config.epochs // 5)  # as 60 is to 300
    recipe = load_recipe(config.recipe)
    if not {"encoder_depth", "encoder_width", "encoder_heads"} <= recipe.keys():
        raise InputError(
            f"--recipe {config.recipe}: the table encoders makes its sizes from a recipe that names a depth, a width and heads"
        )
    depth, width, heads = (int(recipe[f"encoder_{name}"]) for name in ("depth", "width", "heads"))
    large = {"encoder_width": width * 3 // 2, "encoder_depth": depth * 3 // 2, "encoder_heads": heads * 3 // 2}
    return [
        Row(f"{depth} x {width}, {config.epochs} epochs", "81.8 (ViT-S, 300 epochs, iBOT-B)", {}),
        Row(
            f"{depth * 3 // 2} x {width * 3 // 2}, {short} epochs",
            "83.5 (ViT-B, 60 epochs, DINO-B)",
            {**large, "epochs": short},
        ),
        Row(f"{depth * 3 // 2} x {width * 3 // 2}, {config.epochs} epochs", "84.3 (ViT-B, 300 epochs, DINO-B)", large),
    ]


def _decoder(_: AblateConfig) -> list[Row]:
    return [
        Row(f"{depth} blocks", "changes little (Sec. 4.3.3)" if depth == 1 else "", {"decoder_depth": depth})
        for depth in range(1, 5)
    ]


TABLES: dict[str, tuple[str, Callable[[AblateConfig], list[Row]]]] = {
    "targets": ("Table 2: what is predicted", _targets),
    "teachers": ("Table 3: the teacher, stored and online", _teachers),
    "tricks": ("Table 4: guidance normalisation and all layers matter", _tricks),
    "encoders": ("Table 5: encoders and epochs", _encoders),
    "decoder": ("Sec. 4.3.3: decoder depth", _decoder),
}


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Run the rows that are missing, then print and draw the table; the command's JSON."""
    if config.seeds < 1 or config.epochs < 1:
        raise InputError("--seeds and --epochs: give 1 or more")
    (_, train_classes), _ = (
        labelled_split(config.images, split) for split in ("train", "val")
    )  # fails now, not after the training
    if len(set(train_classes)) < 2:
        raise InputError(f"{config.images / 'train'}: has one class; accuracy needs two or more")
    title, make_rows = TABLES[config.table]
    rows = make_rows(config)
    stores = _tokenize_all(config, {row.teacher for row in rows})
    runs = {
        row.name: [_run_of(config, row, stores[row.teacher], config.seed + number) for number in range(config.seeds)]
        for row in rows
    }
    for options in runs.values():
        plan(options[0])  # so that the last row's mistake does not wait for the others to be trained
    results = [_table_row(row, [_measure(config, row.name, options) for options in runs[row.name]]) for row in rows]
    _write(config, title, results)
    return {"rows": results, "html": str(config.out / f"{config.table}.html")}


def _specs(config: AblateConfig) -> list[str]:
    specs = config.teacher.split(",")
    if len(specs) > 1 and (config.table != "teachers" or config.teacher_weights or config.teacher_block is not None):
        raise InputError("--teacher: several go with the table teachers, without --teacher-weights and --teacher-block")
    return specs


def _tokenize_all(config: AblateConfig, wanted: set[int]) -> dict[int, Path]:
    stores = {}
    for place, spec in enumerate(_specs(config)):
        if place in wanted:
            stores[place] = config.out / f"{_as_name(spec)}.tokens"
            print(f"teacher {spec}:")
            tokenize(
                TokenizeConfig(
                    images=config.images / "train", store=stores[place], teacher=spec,
                    teacher_weights=config.teacher_weights, teacher_block=config.teacher_block,
                    middle_size=config.middle_size, patch_size=config.patch_size, workers=config.workers, device=config.device,
                )
            )  # fmt: skip
    return stores


def _run_of(config: AblateConfig, row: Row, store: Path, seed: int) -> PretrainConfig:
    """A row's options, for one seed."""
    run = config.out / config.table / f"{_as_name(row.name)}-seed{seed}"
    recipe = load_recipe(config.recipe)
    target = row.options.get("target", recipe.get("target", "tokens"))
    values = {**recipe, **implied_values(target, recipe), "epochs": config.epochs, **row.options, "target": target}
    options = PretrainConfig(
        stores=(str(store),),
        run=run,
        **{**values, "seed": seed, "device": config.device, "workers": config.workers, "flip": config.flip},
    )
    return replace(options, warmup_epochs=min(options.warmup_epochs, options.epochs / 5))


def _measure(config: AblateConfig, name: str, options: PretrainConfig) -> dict[str, float]:
    """One run and its accuracies: made, or read back from an earlier call."""
    print(f"{name}, seed {options.seed}:")
    trained = pretrain(options)  # a finished run says so and does nothing; one with other settings is an error
    assert trained is not None  # one process
    file = options.run.with_name(f"{options.run.name}.json")
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    found = labelled_features(
        KnnConfig(run=str(options.run), data=config.images, device=config.device, workers=config.workers)
    )
    linear, _ = linear_accuracy(found.train, found.train_labels, found.val, found.val_labels, found.classes)
    result = {
        "knn": round(accuracy_of(found)[0], 2),
        "linear": round(linear, 2),
        "seconds": trained["seconds"],
        "loss": trained["loss"],
    }
    write_json(file, result)
    return result


def _table_row(row: Row, found: list[dict[str, float]]) -> dict[str, Any]:
    means = {name: round(fmean(result[name] for result in found), 2) for name in found[0]}
    spread = {
        f"{name}_deviation": round(stdev(result[name] for result in found), 2)
        for name in ("knn", "linear")
        if len(found) > 1
    }
    return {"row": row.name, **means, **spread, "seeds": len(found), "paper": row.paper}


def _write(config: AblateConfig, title: str, results: list[dict[str, Any]]) -> None:
    shown = [
        {
            config.table: result["row"],
            "kNN top-1 %": _with_spread(result, "knn"),
            "linear top-1 %": _with_spread(result, "linear"),
            "seconds": f"{result['seconds']:.0f}",
            "the paper, fine-tuned %": result["paper"] or "-",
        }
        for result in results
    ]
    lead = (
        f"{config.images}, recipe {config.recipe}, {config.epochs} epochs, {config.seeds} seed{'s' if config.seeds > 1 else ''}, "
        f"teacher {config.teacher}. The paper's column is of another size, other images and another measure: "
        "compare the order, not the figures."
    )
    charts = [
        bars({r["row"]: r[key] for r in results}, label)
        for key, label in (("knn", "kNN top-1 %"), ("linear", "linear top-1 %"))
    ]
    sections = [
        Section("The rows", "Nearest neighbours, and a linear classifier on frozen features.", shown, charts=charts)
    ]
    write_page(config.out / f"{config.table}.html", title, lead, sections)
    widths = {name: max(len(name), *(len(row[name]) for row in shown)) for name in shown[0]}
    print(title)
    for line in [dict(zip(widths, widths, strict=True)), *shown]:
        print(
            "  ".join(
                f"{line[name]:<{width}}" if name == config.table else f"{line[name]:>{width}}"
                for name, width in widths.items()
            )
        )
    print(f"{config.out / config.table}.html")


def _with_spread(result: dict[str, Any], name: str) -> str:
    deviation = result.get(f"{name}_deviation", math.nan)
    return f"{result[name]:.1f}" if math.isnan(deviation) else f"{result[name]:.1f} ± {deviation:.1f}"


def _as_name(text: str) -> str:
    """Text as a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)
