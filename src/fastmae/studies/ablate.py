"""`fastmae ablate`: a study, from its file to its tables. This file is the sequence:

1. read the study and check every arm (`study_file`, `study_runs`)
2. tokenise each data set once per teacher
3. time every arm, say how long the study will take, and fix the epochs (`speeds`)
4. train and measure, several runs at once (`study_call`, `jobs`, `worker`, `measure`), and draw the results
"""

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmae.config import AblateConfig
from fastmae.errors import InputError
from fastmae.evaluate.finetune import IMAGENET, check_mixing
from fastmae.evaluate.recipe import settle
from fastmae.offline.tokenize import tokenize
from fastmae.probes.embed import check_decodable
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.runtime.durable import write_json
from fastmae.runtime.ownership import owned
from fastmae.runtime.progress import Progress
from fastmae.runtime.wording import counted
from fastmae.studies.held_out import held_out_fifth
from fastmae.studies.jobs import Job, Outcome, Workers, run_jobs
from fastmae.studies.measure import finetune_options
from fastmae.studies.speeds import (
    FORECAST_ROUNDS,
    ROUNDS,
    TIMINGS_FILE,
    as_json,
    merged,
    read_speeds,
    signature,
    timings_done,
)
from fastmae.studies.study_call import StudyCall
from fastmae.studies.study_file import check_data_names, load_study
from fastmae.studies.study_results import speed_key
from fastmae.studies.study_runs import JOB_FILE, Runs, Variant
from fastmae.studies.study_syntax import as_file_name, check_folder_names
from fastmae.studies.worker import DONE, LOG_FILE, SPEEDS
from fastmae.tokens.files import is_url
from fastmae.tokens.reader import open_scales

log = logging.getLogger(__name__)
SPEEDS_FILE = "speeds.json"
FEWEST_EPOCHS = 0.01
ESTIMATED_FROM = 2000
"""Images from which the time that tokenising will take is measured first."""


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Do what is missing of a study, then draw it; the command's JSON.

    Raises:
        InputError: a mistake in the study or its data, or another process that works on the study.
        FailedCheckError: a run has failed. The others are finished and shown.
        InterruptedRunError: after a signal, when the runs are saved.
    """
    names = [path.absolute().name for path in config.data]
    study = check_data_names(load_study(config), names)
    check_folder_names(names, "DATA")
    out = (config.out or Path("fastmae-ablate") / study.name).absolute()
    runs = Runs(study, config, dict(zip(names, (path.absolute() for path in config.data), strict=True)), out)
    with owned(out, "ablate"):
        return _ablate(config, runs)


def _ablate(config: AblateConfig, runs: Runs) -> dict[str, Any]:
    study, data = runs.study, {name: open_labelled(path) for name, path in runs.data.items()}
    if config.held_out or any(len(arm.candidates) > 1 for arm in study.arms.values()):
        for name, labelled in data.items():
            held_out_fifth(labelled, name)
    _name_stores(runs)
    runs.check_options()
    _check_finetune(runs, data)
    _check_images(runs, data)
    _tokenize(runs, {name: len(labelled.train) for name, labelled in data.items()})
    runs.check_plans()
    runs.check_begun()
    with contextlib.closing(Workers(config.jobs)) as workers:
        speeds = _speeds(runs, workers)
        _fix_epochs(runs, speeds)
        return StudyCall(runs, data, speeds).result(workers)


def _name_stores(runs: Runs) -> None:
    """Where the stores are that exist already."""
    for name, location in runs.study.stores.items():
        data, _, teacher = name.partition("/")
        if data in runs.data:
            runs.stores[data, teacher] = location


def _check_finetune(runs: Runs, data: Mapping[str, LabelledFolder]) -> None:
    if runs.study.finetune is None:
        return
    job = {"data": ".", "device": runs.config.device, "workers": 0, "pretrain": {"run": ".", "seed": 0}}
    try:
        options = finetune_options(dict(runs.study.finetune), job, Path())
        for labelled in data.values():
            check_mixing(options, settle(options, IMAGENET, len(labelled.train)))
    except InputError as error:
        raise InputError(f"{runs.study.source}: finetune: {error}") from error


def _check_images(runs: Runs, data: Mapping[str, LabelledFolder]) -> None:
    """Decode the images of a data set that was not measured yet: a damaged one would stop each run after its training.

    Raises:
        InputError: names the image. It is not too late to remove it: a store keeps its list of images.
    """
    timed = read_speeds(runs.out / SPEEDS_FILE)
    for name, labelled in data.items():
        if not any(key.startswith(f"{name}/") for key in timed):
            check_decodable(labelled, runs.tokenize_options(name, next(iter(runs.study.teachers)), Path()), name)


def _tokenize(runs: Runs, images: Mapping[str, int]) -> None:
    """Make the stores that are missing, one for each data set and teacher."""
    used = {(data, name): None for data, teacher, _ in runs.cells() for name in runs.study.members(teacher)}
    folder = runs.config.stores_in or runs.out / "stores"
    missing = {cell: folder.absolute() / cell[0] / f"{as_file_name(cell[1])}.tokens" for cell in used}
    missing = {cell: store for cell, store in missing.items() if cell not in runs.stores}
    for data, teacher in missing:
        runs.tokenize_options(data, teacher, Path())  # a mistake in the last one is found before the first is made
    for (data, teacher), store in missing.items():
        runs.stores[data, teacher] = str(store)
        options = runs.tokenize_options(data, teacher, store)
        log.info(f"{data}, teacher {teacher}:")
        if not store.exists() and images[data] >= ESTIMATED_FROM:
            tokenize(replace(options, dry_run=True))  # says how long it will take
        tokenize(options)
    for (data, teacher), location in runs.stores.items():
        if (data, teacher) in used and not is_url(location):
            _compare_images(runs.study.source, f"{data}/{teacher}", location, images[data])


def _compare_images(source: str, name: str, location: str, images: int) -> None:
    """A store with another number of images than train/ may be of other images; that is for the reader to judge."""
    listed = open_scales(location, Path(), 0)[0].info.images
    if listed != images:
        log.warning(f"{source}: {name}: {location} was made of {counted(listed, 'image')}, and train/ has {images}")


def _speeds(runs: Runs, workers: Workers) -> dict[str, dict[str, Any]]:
    """The speed of every variant, as recorded by an earlier call or measured now."""
    file = runs.out / SPEEDS_FILE
    recorded: dict[str, dict[str, Any]] = read_speeds(file)
    wanted = {
        variant: signature(runs.options(variant, runs.seeds[0]), runs.read[variant]) for variant in runs.variants()
    }
    unknown = {
        variant: options
        for variant, options in wanted.items()
        if recorded.get(speed_key(variant), {}).get("options") != options
    }
    if not unknown:
        return recorded
    alike: dict[str, list[Variant]] = {}
    for variant, options in unknown.items():
        alike.setdefault(json.dumps([variant.data, options], sort_keys=True), []).append(variant)
    firsts = [variants[0] for variants in alike.values()]
    log.info(f"timing {counted(len(firsts), 'arm')}, in turns:")
    measured = _time_arms(runs, workers, firsts)
    for variants in alike.values():
        for variant in variants:
            recorded[speed_key(variant)] = {**measured[speed_key(variants[0])], "options": unknown[variant]}
    write_json(file, recorded)
    return recorded


def _time_arms(runs: Runs, workers: Workers, variants: list[Variant]) -> dict[str, dict[str, float]]:
    """Time the variants, in as many processes at once as will train at once."""
    folder = runs.out / "timing"
    folder.mkdir(parents=True, exist_ok=True)
    arms = [
        {
            "key": speed_key(variant),
            "pretrain": as_json(runs.options(variant, runs.seeds[0])),
            "data": str(runs.data[variant.data]),
        }
        for variant in variants
    ]
    rounds = FORECAST_ROUNDS if runs.study.seconds is None else ROUNDS
    jobs = []
    for number in range(runs.config.jobs):
        own = folder / str(number)
        own.mkdir(exist_ok=True)
        (own / TIMINGS_FILE).unlink(missing_ok=True)  # of an earlier call
        job = {"kind": SPEEDS, "arms": arms, "rounds": rounds, "file": SPEEDS_FILE}
        write_json(own / JOB_FILE, {**job, "first": number * len(arms) // runs.config.jobs})
        jobs.append(Job(f"timing {number}", own / JOB_FILE, 0.0))

    def finished(job: Job, outcome: Outcome) -> list[Job]:
        if outcome.code != DONE:
            raise InputError(f"the arms can't be timed: {outcome.message} (see {job.file.with_name(LOG_FILE)})")
        return []

    with Progress("time the arms", "timings", rounds * len(arms) * len(jobs)) as progress:

        def count() -> None:
            progress.advance(sum(timings_done(job.file.parent) for job in jobs) - progress.done)

        run_jobs(workers, jobs, finished, idle=count)
        count()
    return merged([read_speeds(job.file.with_name(SPEEDS_FILE)) for job in jobs])


def _fix_epochs(runs: Runs, speeds: dict[str, dict[str, Any]]) -> None:
    """With `seconds`, the epochs that the speed of each variant allows that was not begun yet."""
    for variant in runs.variants():
        seconds = runs.seconds(variant)
        if seconds is not None and variant not in runs.epochs:
            epochs = seconds * speeds[speed_key(variant)]["images_per_second"] / runs.read[variant]["store"]["images"]
            runs.epochs[variant] = max(FEWEST_EPOCHS, round(epochs, 2))
