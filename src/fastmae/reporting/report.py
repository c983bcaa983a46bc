"""`fastmae report`: one HTML page of a pre-training run, with its curves, pictures, settings and data."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmae.config import ReportConfig
from fastmae.errors import InputError
from fastmae.pretraining.predictions import predictions_png
from fastmae.reporting.added_sections import added_section
from fastmae.reporting.attention_maps import attention_maps_png
from fastmae.reporting.charts import Curves
from fastmae.reporting.html_page import Section, write_page
from fastmae.reporting.nearest_neighbours import nearest_neighbours_png
from fastmae.reporting.study_page import PAGE_FILE, STUDY_FILE, read_study, write_study_page
from fastmae.runs.description import with_effect
from fastmae.runs.encoder import open_encoder
from fastmae.runs.folder import CHECKPOINT_FILE, read_evaluations, read_inputs, read_metrics, read_run
from fastmae.runtime.durable import remove_parts
from fastmae.runtime.progress import Progress
from fastmae.runtime.wording import counted
from fastmae.tokens import TokenStore
from fastmae.tokens.reader import open_scales

log = logging.getLogger(__name__)

Entry = dict[str, Any]
"""One line of a run's log, or one evaluation."""
MAX_POINTS = 1000
"""Most points of a curve; a longer log is thinned out."""
LOSS_TERMS = {
    "decoder_loss": "decoder, masked patches",
    "layers_loss": "encoder layers, visible patches",
    "relation_loss": "relations between visible patches",
}
"""Terms of the loss, as a log names them, and their curves' labels."""


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page; returns the command's JSON.

    Raises:
        InputError: not a pre-training run, or its store or a path of `--also` can't be used.
    """
    if (config.run / STUDY_FILE).is_file():
        return _report_study(config)
    description = read_run(config.run)
    if "store" not in description:
        raise InputError(
            f"{config.run}: a run of `fastmae {description['task']}`; give a pre-training run, and this one as --also"
        )
    added = [added_section(Path(path)) for path in config.also.split(",") if path]
    entries, evaluations = read_metrics(config.run), read_evaluations(config.run)
    if not entries or not (config.run / CHECKPOINT_FILE).exists():
        raise InputError(f"{config.run}: nothing to show; the run has not saved a checkpoint yet")
    store = _open_store(config, description)
    sections = [
        _training_curves(entries, evaluations),
        *_pictures(config, store, description["options"]["target"]),
        *added,
        Section("Settings", rows=_settings(with_effect(description["options"]))),
        Section("Images and store", rows=_data(description["store"])),
    ]
    page = config.out or config.run / "report.html"
    remove_parts(page.parent)
    write_page(page, config.run.resolve().name, _lead(description, entries[-1], evaluations), sections)
    log.info(f"{page}: open it in a browser")
    return {"html": str(page), "sections": [section.heading for section in sections]}


def _report_study(config: ReportConfig) -> dict[str, Any]:
    """The page of a study, from its figures."""
    if config.also:
        raise InputError(f"--also: {config.run} is a study, whose page shows nothing else; leave it out")
    page = config.out or config.run / PAGE_FILE
    headings = write_study_page(read_study(config.run), page)
    log.info(f"{page}: open it in a browser")
    return {"html": str(page), "sections": headings}


def _open_store(config: ReportConfig, description: dict[str, Any]) -> TokenStore:
    """The run's store, the largest of its middle sizes.

    Raises:
        InputError: the store is not where it was, or holds other images.
    """
    location = config.store or next(iter(read_inputs(config.run).stores), "")
    if not location:
        raise InputError(f"{config.run}: does not say where its token store is; give --store STORE")
    try:
        store = open_scales(location, config.cache.expanduser(), int(config.cache_size * 1e9))[-1]
    except InputError as error:
        raise InputError(f"{error}; if the store was moved, give --store STORE") from error
    if store.info.images_sha256 != description["store"]["images_sha256"]:
        raise InputError(f"{location}: holds other images than the run was trained on; give --store STORE")
    return store


def _lead(description: dict[str, Any], last: Entry, evaluations: list[Entry]) -> str:
    """The run in a few sentences."""
    options, store = description["options"], description["store"]
    teachers = ", ".join(teacher["spec"] for teacher in store["teachers"])
    targets = {
        "tokens": f"the stored tokens of {teachers}",
        "teacher": f"the tokens of {teachers}, run online",
        "pixels": "pixels (MAE)",
        "hog": "HOG features",
    }
    sentences = [
        f"{options['encoder']} at {options['image_size']} px, trained on {store['images']:,} images.",
        f"It learns to predict {targets[options['target']]}.",
        f"{round(last['epoch'], 1):g} of {counted(options['epochs'], 'epoch')} took {last['seconds']:.0f} s.",
        f"The loss is {last['loss']:.4f}.",
    ]
    if evaluations and evaluations[-1].get("knn_top1") is not None:
        sentences.append(f"The k-NN accuracy is {evaluations[-1]['knn_top1']:.1f} %.")
    return " ".join(sentences)


def _training_curves(entries: list[Entry], evaluations: list[Entry]) -> Section:
    thinned = entries[:: math.ceil(len(entries) / MAX_POINTS)]
    losses = {
        label: [{**entry, "loss": entry.get(term)} for entry in thinned]
        for term, label in LOSS_TERMS.items()
        if term in thinned[-1]
    }
    charts = [Curves(losses, "epoch", "loss", "epoch", "loss").svg()]
    measured = [entry for entry in evaluations if "knn_top1" in entry]
    if measured:
        accuracies = {"top-1": measured}
        if any(entry.get("knn_top5") != 100 for entry in measured):  # with five classes or fewer, it says nothing
            accuracies["top-5"] = [{**entry, "knn_top1": entry.get("knn_top5")} for entry in measured]
        charts.append(Curves(accuracies, "epoch", "knn_top1", "epoch", "k-NN accuracy (%)").svg())
    others = {"lr": "learning rate", "images_per_second": "images per second", "grad_norm": "gradient norm"}
    charts += [Curves({label: thinned}, "epoch", key, "epoch", label).svg() for key, label in others.items()]
    return Section("Training curves", charts=charts)


def _pictures(config: ReportConfig, store: TokenStore, target: str) -> list[Section]:
    images = min(config.images, len(store))
    with Progress("report", minor=True) as progress:
        progress.now("loading the encoder")
        opened = open_encoder(str(config.run))
        progress.now("drawing predictions")
        predictions = predictions_png(config.run, store, images, config.seed)
        progress.now("drawing attention")
        attention = _attention(opened.network, store, images, read_run(config.run)["options"])
        progress.now("finding nearest neighbours")
        neighbours = nearest_neighbours_png(opened.network, opened.image_size, store, images, config.gallery)
    what_was_predicted = (
        "Each predicted patch is shown with the mean and std of the original patch."
        if target == "pixels"
        else "Features are shown as colours: the first three principal components of the target features."
    )
    gallery = min(config.gallery, len(store))
    return [
        Section("Predictions", _what_was_seen(read_run(config.run)) + what_was_predicted, picture=predictions),
        attention,
        Section(
            "Nearest neighbours",
            f"By the cosine of mean patch tokens, among {gallery:,} images of the store. No labels were used.",
            picture=neighbours,
        ),
    ]


def _what_was_seen(description: Mapping[str, Any]) -> str:
    if description["options"]["decoder_depth"]:
        return "The encoder saw only the visible patches. "
    return "In training the encoder sees the visible patches alone. Here it saw the whole view. "


UNTRAINED = "No loss asked in training what this token collects in the last block"


def _attention(encoder: Any, store: TokenStore, images: int, options: Mapping[str, Any]) -> Section:
    heading = "Attention in the last block"
    try:
        picture = attention_maps_png(encoder, store, images)
    except InputError as error:
        return Section(heading, f"Not drawn: {error}.")
    text = (
        "Attention of the class token to the patches: the mean of all heads, and the heads with the sharpest attention."
    )
    if not options["decoder_depth"]:
        text += f" {UNTRAINED}, as predictions were read from the patches alone."
    elif not options["decoder_class_token"]:
        text += f" {UNTRAINED}, as the decoder saw the patches alone; --decoder-class-token shows it this token too."
    return Section(heading, text, picture=picture)


def _settings(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Options as rows. Width, depth and heads of the encoder may be left to its architecture."""
    own = "the encoder's own"
    return [
        {"option": name, "value": own if value is None and name.startswith("encoder_") else value}
        for name, value in options.items()
    ]


def _data(store: dict[str, Any]) -> list[dict[str, str]]:
    teachers = store["teachers"]
    facts = {
        "images": f"{store['images']:,}",
        "SHA-256 of the image list": store["images_sha256"],
        "middle image": ", ".join(f"{size} px" for size in store["middle_sizes"]),
        "patch": f"{store['patch_size']} px",
        "codec": store["codec"],
        "pixels": f"jpeg, quality {store['jpeg_quality']}" if store["pixels"] == "jpeg" else store["pixels"],
        "teacher": "; ".join(
            f"{teacher['spec']}{_weights_file(teacher)}, block {teacher['block']}, norm {teacher['norm']}"
            for teacher in teachers
        ),
        "SHA-256 of the teacher's weights": "; ".join(teacher["weights_sha256"] for teacher in teachers),
    }
    return [{"property": name, "value": value} for name, value in facts.items()]


def _weights_file(teacher: dict[str, Any]) -> str:
    """Where a teacher's weights came from, if not from the hub and not already part of its name."""
    file = teacher.get("weights_file")
    return f" with weights from {Path(file).name}" if file and not teacher["spec"].endswith(Path(file).name) else ""
