"""`fastmae demo`: the whole path in minutes on real images, next to MAE, on one HTML page.

The work is fixed: steps, seeds, and one CPU thread for each of the two methods, which train at the same time. So the
numbers depend neither on how fast nor on how busy the machine is.
"""

import contextlib
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastmae.bench.gemm import BlockProducts
from fastmae.config import OFFLINE_TEACHER, DemoConfig, KnnConfig, PretrainConfig, TokenizeConfig
from fastmae.errors import InputError, InterruptedRunError
from fastmae.evaluate.knn import knn
from fastmae.images.sources import list_images
from fastmae.offline.timed import tokenize_timed
from fastmae.outside.documents import read_json
from fastmae.probes.embed import check_decodable
from fastmae.probes.labelled import open_labelled
from fastmae.runs.folder import read_evaluations, read_metrics
from fastmae.runtime.device import cores
from fastmae.runtime.durable import write_json
from fastmae.runtime.ownership import owned
from fastmae.runtime.progress import Progress, duration
from fastmae.runtime.table import text_table
from fastmae.studies.demo_images import DemoImages, demo_images
from fastmae.studies.demo_page import BASELINE, FASTMAE, RANDOM, TEACHER, Demo, accuracy_rows, write_demo_page
from fastmae.studies.jobs import Job, Outcome, Workers, run_jobs
from fastmae.studies.speeds import as_json
from fastmae.studies.study_runs import JOB_FILE
from fastmae.studies.worker import DONE, INTERRUPTED, LOG_FILE, PRETRAIN
from fastmae.tokens import TokenStore
from fastmae.tokens.format import INDEX_FILE

log = logging.getLogger(__name__)
PATCH_SIZE, TEACHER_BLOCK = 8, 3
"""A small student learns more from this stage of the CNN than from its last one, and its map is finer."""
RECIPES = {FASTMAE: "visible_tiny_cpu", BASELINE: "mae_tiny_cpu"}
SHARES = {FASTMAE: 1.0, BASELINE: 0.25}
"""Steps of each method, as a share of `--steps`. A step of MAE takes 3.5 to 4 times as long: it has a decoder of eight
blocks over all patches. So both train for about the same time, and MAE, if anything, a little longer."""
BATCH_SIZE = 32
OPTIONS_FILE = "demo.json"
WAY_OUT = "give another --out, or delete the folder"
STORE = "demo.tokens"
POINTS = 3
"""Measurements on the way, the end included."""
SECONDS_BETWEEN_LOOKS = 1.0


def demo(config: DemoConfig) -> dict[str, Any]:
    """Tokenise, pre-train both methods, compare by k-NN, draw the page; the command's JSON.

    Raises:
        InputError: images that can't be used, or another process that works in the folder.
    """
    with owned(config.out, "demo"):
        return _demo(config)


def _demo(config: DemoConfig) -> dict[str, Any]:
    start = time.monotonic()
    _check_begun(config)
    images = demo_images(config)
    _announce(config, images)
    options = TokenizeConfig(
        images=images.train,
        store=config.out / STORE,
        teacher=OFFLINE_TEACHER,
        patch_size=PATCH_SIZE,
        teacher_block=TEACHER_BLOCK,
        seed=config.seed,
        device=config.device,
        **images.tokenize,
    )
    if images.labelled and config.images:  # a damaged one would stop the comparison after all the training
        check_decodable(open_labelled(images.labelled), options, "images")
    tokenized, tokenize_seconds = tokenize_timed(options, config.out / "tokenizing.json")
    runs = _pretrain(config, images, len(TokenStore(options.store)))
    curves = {method: read_evaluations(run) for method, run in runs.items()}
    result = Demo(
        images=images,
        store=options.store,
        store_bytes=tokenized["bytes"],
        tokenize_seconds=tokenize_seconds,
        runs=runs,
        recipes=RECIPES,
        logs={method: read_metrics(run) for method, run in runs.items()},
        curves=curves,
        knn=_accuracies(config, images.labelled, runs, curves) if images.labelled else {},
    )
    page = config.out / "index.html"
    write_demo_page(result, page, config.seed)
    seconds = time.monotonic() - start
    table = f"{text_table(accuracy_rows(result))}\n"
    log.info(f"{table}{page}: curves and pictures; open it in a browser ({duration(seconds)} in all)")
    names = {"fastmae": FASTMAE, "mae": BASELINE, "random": RANDOM, "teacher": TEACHER}
    return {
        "knn": {name: result.knn.get(method) for name, method in names.items()},
        "top1": result.knn.get(FASTMAE),
        "training_seconds": {name: result.seconds(names[name]) for name in ("fastmae", "mae")},
        "tokenize_seconds": tokenize_seconds,
        "html": str(page),
        "rows": accuracy_rows(result),
        "seconds": round(seconds, 1),
    }


def _check_begun(config: DemoConfig) -> None:
    """Compare the options with those of the demo that was begun in the folder, or record them."""
    file = config.out / OPTIONS_FILE
    images = None if config.images is None else str(config.images.absolute())
    asked = {"images": images, "steps": config.steps, "seed": config.seed, "device": config.device}
    if not file.exists():
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(file, asked)
        return
    begun = read_json(file, dict[str, Any], way_out=WAY_OUT)
    other = [f"--{name} {begun.get(name)}, not {value}" for name, value in asked.items() if begun.get(name) != value]
    if other:
        raise InputError(f"{config.out}: holds a demo with {'; '.join(other)}; give the same, or {WAY_OUT}")


def _announce(config: DemoConfig, images: DemoImages) -> None:
    """Say what will be done and about how long it takes, by how fast this machine multiplies matrices now."""
    number = len(list_images(images.train))
    embedded = len(list_images(images.labelled)) if images.labelled else 0
    left = 1 - min(1.0, _steps_done(_runs(config)) / (config.steps * sum(SHARES.values())))
    untokenized = 0 if (config.out / STORE / INDEX_FILE).exists() else number
    work = left * STEP_WORK * config.steps + IMAGE_WORK * untokenized + EMBED_WORK * embedded
    seconds = START_SECONDS + work * _block_seconds() / min(2, cores())
    log.info(
        f"demo: {images.name}, {number} to train on; tokenise, train FastMAE and MAE side by side, compare: "
        f"about {duration(round(seconds, -1))} here"
    )


START_SECONDS = 32.0
"""Imports, pictures, and what else doesn't depend on the amount of work."""
STEP_WORK, IMAGE_WORK, EMBED_WORK = 24.5, 2.0, 6.6
"""Work of one step of both methods, of tokenising an image, and of all features of an image that is compared; in units
of `_block_seconds`, on one core of two that are busy. Measured on an AMD EPYC, where the unit takes 10.5 ms beside an
idle core, and the demo 3.6 min."""
BLOCK_ROUNDS = 20


def _block_seconds() -> float:
    """Seconds in which one thread computes the products of a student's block on a batch, forward and backward."""
    products = BlockProducts(BATCH_SIZE, 16, 128, torch.device("cpu"), torch.float32).implementations()["torch's own"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        products()
        start = time.perf_counter()
        for _ in range(BLOCK_ROUNDS):
            products()
        return (time.perf_counter() - start) / BLOCK_ROUNDS
    finally:
        torch.set_num_threads(threads)


def _pretrain(config: DemoConfig, images: DemoImages, number: int) -> dict[str, Path]:
    """Pre-train both methods at the same time, each in a process with one thread; method -> run.

    Raises:
        InputError: one of them can't train.
        InterruptedRunError: a signal has come; both have saved.
    """
    folder, runs = config.out.absolute(), _runs(config)
    jobs, total = [], 0
    for method, run in runs.items():
        steps = max(1, round(config.steps * SHARES[method]))
        total += steps
        file = folder / "jobs" / run.name / JOB_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        job = {"kind": PRETRAIN, "pretrain": as_json(_options(config, images, method, run, steps, number))}
        write_json(file, job)
        jobs.append(Job(method, file, 0.0))

    def finished(job: Job, outcome: Outcome) -> list[Job]:
        if outcome.code == INTERRUPTED:
            raise InterruptedRunError(outcome.message)
        if outcome.code != DONE:
            raise InputError(f"{job.name}: {outcome.message} (see {job.file.with_name(LOG_FILE)})")
        return []

    with (
        contextlib.closing(Workers(len(jobs), threads=1)) as workers,
        Progress("train", "steps", total, done=_steps_done(runs)) as progress,
    ):
        run_jobs(workers, jobs, finished, idle=_Look(runs, progress))
        progress.advance(total - progress.done)
    return runs


def _runs(config: DemoConfig) -> dict[str, Path]:
    folder = config.out.absolute()
    return {FASTMAE: folder / "fastmae", BASELINE: folder / "mae"}


def _options(config: DemoConfig, images: DemoImages, method: str, run: Path, steps: int, number: int) -> PretrainConfig:
    options = PretrainConfig(
        stores=(str((config.out / STORE).absolute()),),
        run=run,
        recipe=RECIPES[method],
        batch_size=BATCH_SIZE,
        flip=images.flip,
        seed=config.seed,
        device=config.device,
        workers=0,
        log_every=5,
        knn_data=images.labelled and images.labelled.absolute(),
    ).with_epochs(_epochs(steps, number))
    return replace(options, knn_every=_epochs(-(-steps // POINTS), number)) if images.labelled else options


def _epochs(steps: int, images: int) -> float:
    """Epochs of exactly so many steps: a little less, as a begun step counts whole."""
    return round((steps - 0.01) * BATCH_SIZE / images, 9)


class _Look:
    """Looks now and then how far the runs are, and moves the progress bar on."""

    def __init__(self, runs: dict[str, Path], progress: Progress):
        self.runs, self.progress, self.last = runs, progress, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self.last >= SECONDS_BETWEEN_LOOKS:
            self.last = time.monotonic()
            self.progress.advance(max(0, _steps_done(self.runs) - self.progress.done))
            if self.progress.done == self.progress.total:
                self.progress.now("the last evaluations")


def _steps_done(runs: dict[str, Path]) -> int:
    return sum(entries[-1]["step"] for run in runs.values() if (entries := read_metrics(run)))


def _accuracies(
    config: DemoConfig, data: Path, runs: dict[str, Path], curves: dict[str, list[dict[str, Any]]]
) -> dict[str, float]:
    """k-NN top-1 of both methods, as measured at their ends, and of what lies below and above."""
    bounds: dict[str, Any] = {RANDOM: "random", TEACHER: "teacher"}
    options: dict[str, Any] = {"data": data, "seed": config.seed, "device": config.device, "run": str(runs[FASTMAE])}
    return {
        **{method: round(entries[-1]["knn_top1"], 2) for method, entries in curves.items()},
        **{name: round(knn(KnnConfig(**options, features=kind))["top1"], 2) for name, kind in bounds.items()},
    }
