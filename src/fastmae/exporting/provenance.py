"""Where a model's weights come from, for its card: images, teacher, settings, metrics. Paths are left out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmae.exporting.output_folder import read_export
from fastmae.outside.documents import checked
from fastmae.runs.checkpoint import is_checkpoint, load_checkpoint
from fastmae.runs.description import with_effect
from fastmae.runs.encoder import OpenedEncoder
from fastmae.runs.folder import CHECKPOINT_FILE, RUN_FILE, read_evaluations, read_metrics, read_run
from fastmae.student.encoder import names_plain_vit

Facts = dict[str, dict[str, str]]
"""The card's tables: heading -> name -> value."""
TARGETS = {
    "tokens": "the features of all patches, which a frozen teacher computed once, before training (FastMAE)",
    "teacher": "the features of all patches, which a frozen teacher computed at every step (FastMAE, online teacher)",
    "pixels": "the pixels of the other patches (MAE)",
    "hog": "the histograms of oriented gradients of the other patches (MaskFeat)",
}
"""`--target` -> what the encoder learnt to predict from the visible patches."""
TARGETS_WITHOUT_DECODER = {
    "tokens": "their features, which a frozen teacher computed once, before training (FastMAE without a decoder)",
    "teacher": "their features, which a frozen teacher computed at every step (FastMAE without a decoder)",
    "hog": "their histograms of oriented gradients",
}
"""The same without a decoder, where only what the encoder saw is predicted."""


@dataclass(frozen=True)
class Provenance:
    """How a model's weights were made.

    Attributes:
        kind: 'pretraining', 'supervised', or 'other' for weights that fastmae did not train.
        story: the same in a few sentences.
        facts: tables for the card.
    """

    kind: str
    story: str
    facts: Facts


RANDOM_WEIGHTS = Provenance("other", "The weights are random: nothing was trained.", {})


def provenance_of(opened: OpenedEncoder) -> Provenance:
    """All that is known about an encoder's weights.

    A run knows its whole history. An earlier export repeats what its card says. Other weights have only a name.
    """
    path = Path(opened.source)
    earlier = read_export(path).get("made")
    if earlier:
        return checked(earlier, Provenance, name=path, way_out="export the model again")
    if not path.exists() or not ((path / CHECKPOINT_FILE).is_file() or is_checkpoint(path)):
        weights = {"source": _without_path(opened.source), "SHA-256": opened.describe()["weights_sha256"]}
        story = "The weights were not trained with fastmae and are unchanged."
        return Provenance("other", story, {"Weights": weights})
    checkpoint = load_checkpoint(path / CHECKPOINT_FILE if path.is_dir() else path)
    description, step = checkpoint["run"], checkpoint.get("step", 0)
    trained = _pretraining(description) if "store" in description else _supervised_training(description)
    metrics = {"steps": str(step), **_last_metrics(path if path.is_dir() else path.parent, step)}
    if "epoch" in metrics:
        planned_epochs = description["options"]["epochs"]
        metrics["epoch"] += f" of {planned_epochs:g}"
    return Provenance(trained.kind, trained.story, {**trained.facts, "Metrics": metrics})


def _pretraining(description: dict[str, Any]) -> Provenance:
    store, options = description["store"], description["options"]
    visible = round(100 * (1 - options["mask_ratio"]))
    seen = f"{visible} % of an image's patches" if options["mask_ratio"] else "all patches of an image"
    targets = TARGETS if options["decoder_depth"] else TARGETS_WITHOUT_DECODER
    story = f"It was pre-trained without labels. From {seen} it learnt to predict {targets[options['target']]}."
    if names_plain_vit(options["encoder"]):
        story += " The patch tokens were trained."
        if not (options["decoder_depth"] and options["decoder_class_token"]):
            story += " No loss reached the class token, so it describes an image less well."
    facts = {
        "Images": {
            "images": f"{store['images']:,}",
            "SHA-256 of the image list": store["images_sha256"],
            "channels": str(store["channels"]),
            "middle images": (
                f"{', '.join(map(str, store['middle_sizes']))} px, resize {store['resize']}, pixels {store['pixels']}"
            ),
            "tokens": f"codec {store['codec']}, flips {store['flips']}",
        }
    }
    if options["target"] not in ("pixels", "hog"):
        facts["Teacher"] = _teachers(store["teachers"])
    facts["Pre-training settings"] = _settings(with_effect(options))
    return Provenance("pretraining", story, facts)


def _supervised_training(description: dict[str, Any]) -> Provenance:
    """Training on labels, with the history of the pre-trained run that it started from if that is still there."""
    encoder = description["encoder"]
    facts = {
        "Initial weights": {"architecture": encoder["architecture"], "SHA-256": encoder["weights_sha256"]},
    }
    source = Path(encoder["source"])
    source_folder = source if source.is_dir() else source.parent
    if (source_folder / RUN_FILE).is_file() and "store" in (source_run := read_run(source_folder)):
        facts |= _pretraining(source_run).facts
    data = description.get("data", description.get("photos", {}))
    facts["Labelled images"] = {split: _image_count(data[split]) for split in ("train", "val") if split in data}
    facts["Supervised training settings"] = _settings(description["options"])
    return Provenance("supervised", f"It was trained on labels with `fastmae {description['task']}`.", facts)


def _image_count(split: Any) -> str:
    """A split's size: one number, or several numbers by name."""
    return ", ".join(f"{n:,} {name}" for name, n in split.items()) if isinstance(split, dict) else f"{split:,}"


def _teachers(teachers: list[dict[str, Any]]) -> dict[str, str]:
    facts = {}
    for number, teacher in enumerate(teachers, 1):
        label = f"teacher {number}" if len(teachers) > 1 else "teacher"
        spec, weights_file = teacher["spec"], teacher["weights_file"]
        is_local_folder = spec.startswith("hf/") and weights_file
        name = f"hf/{Path(spec).name}" if is_local_folder else _without_path(spec)
        if weights_file and spec.startswith(("timm/", "clip/")):
            name += f", weights from {Path(weights_file).name}"
        facts[label] = name
        facts[f"{label}: features"] = (
            f"block {teacher['block']}, norm {teacher['norm']}, input of {teacher['input_size']} px"
        )
        facts[f"{label}: SHA-256 of the weights"] = teacher["weights_sha256"]
    return facts


def _settings(options: dict[str, Any]) -> dict[str, str]:
    """The options that have a value."""
    return {
        name.replace("_", " "): f"{value:g}" if isinstance(value, float) else _without_path(str(value))
        for name, value in options.items()
        if value is not None and value != ""
    }


def _without_path(value: str) -> str:
    """The last part of a path; a hub's model name stays whole."""
    if "/" not in value or value.startswith(("timm/", "hf/", "clip/")):
        return value
    return f"{'file/' if value.startswith('file/') else ''}{Path(value).name}"


def _last_metrics(run: Path, step: int) -> dict[str, str]:
    """The last value of every metric that the run logged up to a step."""
    last: dict[str, Any] = {}
    for entry in [*read_metrics(run), *read_evaluations(run)]:
        if entry["step"] <= step:
            last |= {name: value for name, value in entry.items() if name != "step" and value is not None}
    return {
        name.replace("_", " "): f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in last.items()
    }
