"""How fast each arm trains and is measured on this machine: what a study says about its duration, and its epochs when
every run gets the same time. Measured once, before the first run, and recorded.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

from fastmae.config import PretrainConfig
from fastmae.outside.documents import read_json
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretraining_task
from fastmae.pretraining.speed import images_per_second
from fastmae.probes.embed import WholeImages, embed_images, embed_with_encoder
from fastmae.probes.labelled import open_labelled
from fastmae.runtime.device import own_device, synchronise
from fastmae.runtime.durable import write_json
from fastmae.studies.flops import training_flops

log = logging.getLogger(__name__)
TIMINGS_FILE = "timings.json"
"""How many timings a process has done, for progress."""
ROUNDS = 5
"""Where the speeds decide the epochs. The arms take turns, so that a change in the machine's load meets them all; the
median forgives a slow round."""
FORECAST_ROUNDS = 2
"""Where the epochs are fixed, and the speeds are for the forecast and the table."""
TIMED_STEPS, ENOUGH_SECONDS = 10, 2.0
"""Of an arm whose steps are slow, fewer are timed."""
EMBEDDED_IMAGES = 128
BATCH_SIZE = 64
WITHOUT_EFFECT = (
    *("run", "seed", "epochs", "warmup_epochs", "base_lr", "min_lr", "weight_decay", "betas", "recipe"),
    *("save_every", "log_every", "resume", "knn_every", "cache", "cache_size", "stores"),
)
"""Options that don't change the speed: arms that differ only in these are timed once. Of stores, their contents do."""


class Speed(TypedDict, total=False):
    """The speeds of an arm: as one process measures them, or the medians of all.

    Attributes:
        images_per_second: of training; one for each round, or their median.
        embed_images_per_second: of decoding and embedding.
        flops_per_image: of a training step; None where they can't be counted.
        options: what they depend on, see `signature`.
    """

    images_per_second: list[float] | float
    embed_images_per_second: float
    flops_per_image: float | None
    options: dict[str, Any]


def read_speeds(file: Path) -> dict[str, Any]:
    """The record of speeds: key of an arm -> `Speed`; empty if there is none yet.

    Raises:
        InputError: a file that holds something else.
    """
    way_out = "delete it; the same call times the arms again"
    return read_json(file, dict[str, Speed], way_out=way_out) if file.exists() else {}


def signature(options: PretrainConfig, read: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's speed depends on, as JSON holds it: its options, and what it reads from its stores."""
    return {name: value for name, value in as_json(options).items() if name not in WITHOUT_EFFECT} | {"read": read}


def as_json(options: Any) -> dict[str, Any]:
    """Options as JSON holds them."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(part) for part in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(options).items()}


def measure_speeds(job: dict[str, Any], folder: Path) -> None:
    """Time some steps of every arm, in turns; and, once, the embedding of images and the FLOPs of a step.

    Args:
        job: `arms`, a list of `key`, `pretrain` (options) and `data` (labelled folder); `first`, the arm to begin with,
            so that several processes that do this at once don't time the same arm; `rounds`, how often each arm is
            timed; `file`, the result's name.
        folder: where the result is written: key -> figures.
    """
    arms = job["arms"][job["first"] :] + job["arms"][: job["first"]]
    figures: dict[str, dict[str, Any]] = {arm["key"]: {"images_per_second": []} for arm in arms}
    timings = 0
    for number in range(job["rounds"]):
        for arm in arms:
            options = PretrainConfig(**arm["pretrain"])
            speed = images_per_second(options, TIMED_STEPS, ENOUGH_SECONDS)
            figures[arm["key"]]["images_per_second"].append(speed)
            log.info(f"{arm['key']}: {speed:.1f} images/s")
            if number == 0:
                figures[arm["key"]]["embed_images_per_second"] = _embedding_speed(options, Path(arm["data"]))
                figures[arm["key"]]["flops_per_image"] = training_flops(options)
            timings += 1
            write_json(folder / TIMINGS_FILE, {"done": timings})
    write_json(folder / job["file"], figures)


def timings_done(folder: Path) -> int:
    """Timings that a process has done that writes into this folder."""
    file = folder / TIMINGS_FILE
    return read_json(file, dict[str, int], way_out="delete it").get("done", 0) if file.exists() else 0


def merged(measurements: list[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """The medians over the rounds and over the processes that measured at once."""
    return {
        key: {
            "images_per_second": round(median([s for one in measurements for s in one[key]["images_per_second"]]), 2),
            "embed_images_per_second": round(median([one[key]["embed_images_per_second"] for one in measurements]), 2),
            "flops_per_image": first["flops_per_image"],
        }
        for key, first in measurements[0].items()
    }


def _embedding_speed(options: PretrainConfig, data: Path) -> float:
    """Images per second of decoding and embedding, with the arm's encoder before training."""
    plan = make_plan(options)
    student: Any = pretraining_task(options, plan).network
    store = plan.stores[0][-1]
    device = own_device(options.device)
    embed = embed_with_encoder(student.encoder.to(device).eval(), "mean", None, *store.normalisation)
    paths = open_labelled(data).train[:EMBEDDED_IMAGES]
    info = store.info
    images = WholeImages(paths, options.image_size, info.resize, info.channels, info.value_range)
    start = time.monotonic()
    embed_images(images, embed, device, BATCH_SIZE, options.workers, "features", quiet=True)
    synchronise(device)
    return len(paths) / (time.monotonic() - start)
