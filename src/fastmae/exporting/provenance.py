"""Where an encoder comes from, for its model card: its data, its teacher, its settings, its figures. No paths of this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmae.exporting.folder import read_export
from fastmae.runs.checkpoint import is_checkpoint, load_checkpoint
from fastmae.runs.encoder import OpenedEncoder
from fastmae.runs.folder import CHECKPOINT_FILE, RUN_FILE, read_evaluations, read_metrics, read_run

Facts = dict[str, dict[str, str]]
"""Heading -> name -> value."""
PREDICTED = {
    "tokens": "the features that a frozen teacher, which ran once and before the training, gave of all of them: FastMAE's way",
    "teacher": "the features that a frozen teacher gives of all of them: FastMAE's way, with the teacher run at every step",
    "pixels": "the pixels of the others: MAE's way",
    "hog": "histograms of oriented gradients of the others: MaskFeat's way",
}
"""`--target` -> what the encoder learnt to predict from the visible patches."""


@dataclass(frozen=True)
class Provenance:
    """What a card tells.

    Attributes:
        kind: 'pretraining', 'supervised', or 'other' for weights that are not fastmae's.
        story: a sentence or two.
        facts: tables.
    """

    kind: str
    story: str
    facts: Facts


def provenance_of(opened: OpenedEncoder) -> Provenance:
    """All that is known of how an encoder was made; of an earlier export, what that knew; of a bare name, its name."""
    path = Path(opened.source)
    earlier = read_export(path).get("made")
    if earlier:
        return Provenance(**earlier)
    if not path.exists() or not ((path / CHECKPOINT_FILE).is_file() or is_checkpoint(path)):
        weights = {"from": _without_path(opened.source), "SHA-256": opened.describe()["weights_sha256"]}
        return Provenance(
            "other", "Its weights are not fastmae's: they were taken over as they are.", {"Weights": weights}
        )
    saved = load_checkpoint(path / CHECKPOINT_FILE if path.is_dir() else path)
    described = _of_pretraining(saved["run"]) if "store" in saved["run"] else _of_supervised(saved["run"])
    figures = {"steps": str(saved["step"]), **_logged(path if path.is_dir() else path.parent, saved["step"])}
    planned = (saved["run"].get("settings") or saved["run"]["options"])["epochs"]
    if "epoch" in figures:
        figures["epoch"] += f" of {planned}"
    return Provenance(described.kind, described.story, {**described.facts, "Figures": figures})


def _of_pretraining(description: dict[str, Any]) -> Provenance:
    store, options = description["store"], description["options"]
    images = {
        "images": f"{store['images']:,}",
        "SHA-256 of their list": store["images_sha256"],
        "channels": str(store["channels"]),
        "middle images": f"{', '.join(map(str, store['middle_sizes']))} px, {store['resize']}, {store['pixels']}",
        "tokens": f"{store['codec']}, flips {store['flips']}",
    }
    visible = round(100 * (1 - options["mask_ratio"]))
    story = (
        f"Pre-trained without labels: from {visible} % of an image's patches it learnt to predict {PREDICTED[options['target']]}. "
        "The patch tokens are what was trained; no loss reaches the class token, so it is the weaker description of an image."
    )
    teachers = {} if options["target"] in ("pixels", "hog") else {"Teacher": _teachers(store["teachers"])}
    return Provenance(
        "pretraining", story, {"Images": images, **teachers, "Settings of the pre-training": _settings(options)}
    )


def _of_supervised(description: dict[str, Any]) -> Provenance:
    encoder, source = description["encoder"], Path(description["encoder"]["source"])
    facts = {
        "Started from": {"architecture": encoder["architecture"], "SHA-256 of its weights": encoder["weights_sha256"]}
    }
    folder = source if source.is_dir() else source.parent
    if (folder / RUN_FILE).is_file() and "store" in (pretraining := read_run(folder)):
        facts |= _of_pretraining(pretraining).facts
    held = description.get("data", description.get("photos", {}))
    labels = {split: _counts(held[split]) for split in ("train", "val") if split in held}
    settings = _settings({**description["options"], **description["settings"]})
    facts |= {"Labelled images": labels, "Settings of the training on labels": settings}
    return Provenance("supervised", f"Trained on labels, by `fastmae {description['task']}`.", facts)


def _counts(held: Any) -> str:
    """Of a split: a number, or several by name."""
    return ", ".join(f"{count:,} {what}" for what, count in held.items()) if isinstance(held, dict) else f"{held:,}"


def _teachers(teachers: list[dict[str, Any]]) -> dict[str, str]:
    shown = {}
    for number, teacher in enumerate(teachers, 1):
        name, spec = f"teacher {number}" if len(teachers) > 1 else "teacher", teacher["spec"]
        local = spec.startswith("hf/") and teacher["weights_file"]
        shown[name] = f"hf/{Path(spec).name}" if local else _without_path(spec)
        if teacher["weights_file"] and spec.startswith(("timm/", "clip/")):
            shown[name] += f", weights of {Path(teacher['weights_file']).name}"
        shown[f"{name}, its features"] = (
            f"block {teacher['block']}, norm {teacher['norm']}, seen at {teacher['input_size']} px"
        )
        shown[f"{name}, SHA-256 of its weights"] = teacher["weights_sha256"]
    return shown


def _settings(options: dict[str, Any]) -> dict[str, str]:
    """The options that were set."""
    shown = {name.replace("_", " "): str(value) for name, value in options.items() if value is not None and value != ""}
    return {name: _without_path(value) for name, value in shown.items()}


def _without_path(value: str) -> str:
    """A name of a hub as it is; of a file or a folder its own name alone."""
    if "/" not in value or value.startswith(("timm/", "hf/", "clip/")):
        return value
    return f"{'file/' if value.startswith('file/') else ''}{Path(value).name}"


def _logged(run: Path, step: int) -> dict[str, str]:
    """The last value of everything that was logged up to a step."""
    last: dict[str, Any] = {}
    for entry in [*read_metrics(run), *read_evaluations(run)]:
        if entry["step"] <= step:
            last |= {
                name.replace("_", " "): value for name, value in entry.items() if name != "step" and value is not None
            }
    return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in last.items()}
