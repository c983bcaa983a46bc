"""One run of a study: train it, then measure its encoder. Each figure is written as soon as it is known.

FOLDER/pretrain/          the run
FOLDER/val.json           its figures on val/, measured once and read back ever after
FOLDER/held-out.json      the same on the held-out fifth of train/
FOLDER/finetune-val/      the fine-tuned classifier, if the study asks for it
"""

import math
from pathlib import Path
from typing import Any

from fastmae.config import FinetuneConfig, KnnConfig, PretrainConfig
from fastmae.evaluate.finetune import finetune
from fastmae.evaluate.knn import labelled_features
from fastmae.outside.documents import read_json
from fastmae.pretraining.pretrain import pretrain
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.probes.logistic import linear_accuracy
from fastmae.probes.neighbours import knn_accuracy
from fastmae.runtime.durable import write_json
from fastmae.studies.held_out import held_out_fifth

VAL, HELD_OUT = "val", "held-out"
TRAINING = ("epochs", "steps", "loss", "seconds")
"""What a run's figures keep of its training."""


def train_and_measure(job: dict[str, Any], folder: Path) -> None:
    """Do what is missing of a run.

    Args:
        job: `pretrain` and `finetune` (None: not asked for), their options; `data`, a labelled folder; `split`, where
            to measure; `device` and `workers` for measuring.
        folder: the run's folder.
    """
    trained = pretrain(PretrainConfig(**job["pretrain"]))
    assert trained is not None  # there is one process
    file = folder / f"{job['split']}.json"
    figures = read_figures(file)
    data = open_labelled(Path(job["data"]))
    if job["split"] == HELD_OUT:
        data = held_out_fifth(data, job["data"])
    if "knn" not in figures:
        figures = {name: trained[name] for name in TRAINING} | _probed(job, data)
        write_json(file, figures)
    if job["finetune"] is not None and "finetune" not in figures:
        write_json(file, figures | {"finetune": _fine_tuned(job, data, folder / f"finetune-{job['split']}")})


def read_figures(file: Path) -> dict[str, float]:
    """A run's figures; none if it was not measured yet.

    Raises:
        InputError: a file that holds something else.
    """
    kind = dict[str, int | float]
    return read_json(file, kind, way_out="delete it; the same call measures the run again") if file.exists() else {}


def _probed(job: dict[str, Any], data: LabelledFolder) -> dict[str, float]:
    """k-NN and linear accuracy, read from the same features."""
    options: dict[str, Any] = {name: job[name] for name in ("data", "device", "workers")}
    features = labelled_features(KnnConfig(run=job["pretrain"]["run"], **options), data)
    parts = (features.train, features.train_labels, features.val, features.val_labels, features.classes)
    knn, linear = knn_accuracy(*parts, device=features.device), linear_accuracy(*parts, device=features.device)
    return {"knn": round(knn[0], 3), "linear": round(linear[0], 3)}


def _fine_tuned(job: dict[str, Any], data: LabelledFolder, out: Path) -> float:
    """Accuracy at the end of fine-tuning; the best one on the way would be chosen by the images it is measured on."""
    result = finetune(finetune_options(job["finetune"], job, out), data)
    assert result is not None
    return round(result["top1"], 3)


def finetune_options(given: dict[str, Any], job: dict[str, Any], out: Path) -> FinetuneConfig:
    """The options of fine-tuning a run. With a known number of epochs, it is evaluated at the end alone."""
    ends = {"eval_every": given["epochs"]} if given.get("epochs") else {}
    shared: dict[str, Any] = {name: job[name] for name in ("data", "device", "workers")}
    pretraining = job["pretrain"]
    return FinetuneConfig(run=pretraining["run"], out=out, seed=pretraining["seed"], **{**shared, **ends, **given})


def is_measured(figures: dict[str, Any], metrics: tuple[str, ...]) -> bool:
    """Whether a run's figures hold all these metrics."""
    return all(isinstance(figures.get(metric), int | float) and math.isfinite(figures[metric]) for metric in metrics)
