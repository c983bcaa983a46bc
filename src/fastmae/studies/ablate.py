"""`fastmae ablate`: a study, from its file to its tables. This file is the sequence:

1. read the study and check every arm (`study_file`, `study_runs`)
2. tokenise each data set once per teacher
3. time every arm, say how long the study will take, and fix the epochs (`speeds`)
4. train and measure, several runs at once (`jobs`, `worker`, `measure`); an arm's candidates before its seeds
5. write study.json and draw it (`study_results`, `reporting.study_page`)
"""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmae.config import AblateConfig
from fastmae.errors import FailedCheckError, InputError
from fastmae.evaluate.finetune import IMAGENET
from fastmae.evaluate.recipe import settle
from fastmae.offline.tokenize import tokenize
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.reporting.study_page import PAGE_FILE, STUDY_FILE, study_text, write_study_page
from fastmae.runtime.device import own_device
from fastmae.runtime.durable import write_json
from fastmae.runtime.wording import counted
from fastmae.studies.held_out import held_out_fifth
from fastmae.studies.jobs import Job, Outcome, Progress, run_jobs
from fastmae.studies.measure import HELD_OUT, finetune_options, is_measured, read_figures
from fastmae.studies.speeds import as_json, merged, signature
from fastmae.studies.study_file import check_data_names, load_study
from fastmae.studies.study_results import Failure, speed_key, study_results, tuned_key
from fastmae.studies.study_runs import JOB_FILE, Runs, Variant, candidate_label
from fastmae.studies.study_syntax import as_file_name
from fastmae.studies.worker import DONE, FAILED_CHECK, LOG_FILE, SPEEDS
from fastmae.tokens import TokenStore
from fastmae.tokens.files import is_url

log = logging.getLogger(__name__)
SPEEDS_FILE = "speeds.json"
FEWEST_EPOCHS = 0.01
DIVERGED = "diverged"
"""Instead of figures, of a candidate whose loss did not stay finite."""
BACKWARD = 2
"""A backward pass takes about twice the time of the forward pass."""


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Do what is missing of a study, then draw it; the command's JSON.

    Raises:
        InputError: a mistake in the study or its data.
        FailedCheckError: a run has failed. The others are finished and shown.
        InterruptedRunError: after a signal, when the runs are saved.
    """
    names = [path.absolute().name for path in config.data]
    study = check_data_names(load_study(config), names)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"DATA {twice}: two data sets of this name; rename one of the folders")
    out = (config.out or Path("fastmae-ablate") / study.name).absolute()
    runs = Runs(study, config, dict(zip(names, (path.absolute() for path in config.data), strict=True)), out)
    data = {name: open_labelled(path) for name, path in runs.data.items()}
    if config.held_out or any(len(arm.candidates) > 1 for arm in study.arms.values()):
        for name, labelled in data.items():
            held_out_fifth(labelled, name)
    _name_stores(runs)
    runs.check_options()
    _check_finetune(runs)
    _tokenize(runs)
    runs.check_plans()
    if study.seconds is None:
        runs.check_begun()
    speeds = _speeds(runs)
    _fix_epochs(runs, speeds)
    runs.check_begun()
    return StudyCall(runs, data, speeds).result()


def _name_stores(runs: Runs) -> None:
    """Where the stores are that exist already."""
    for name, location in runs.study.stores.items():
        data, _, teacher = name.partition("/")
        if data in runs.data:
            runs.stores[data, teacher] = location


def _check_finetune(runs: Runs) -> None:
    if runs.study.finetune is None:
        return
    job = {"data": ".", "device": runs.config.device, "workers": 0, "pretrain": {"run": ".", "seed": 0}}
    try:
        finetune_options(dict(runs.study.finetune), job, Path())
    except InputError as error:
        raise InputError(f"{runs.study.source}: finetune: {error}") from error


def _tokenize(runs: Runs) -> None:
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
        if not store.exists():
            tokenize(replace(options, dry_run=True))  # says how long it will take
        tokenize(options)
    for (data, teacher), location in runs.stores.items():
        if (data, teacher) in used and not is_url(location):
            TokenStore(location)


def _speeds(runs: Runs) -> dict[str, dict[str, Any]]:
    """The speed of every variant, as recorded by an earlier call or measured now."""
    file = runs.out / SPEEDS_FILE
    recorded: dict[str, dict[str, Any]] = read_figures(file)
    wanted = {variant: signature(runs.options(variant, runs.seeds[0])) for variant in runs.variants()}
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
    measured = _time_arms(runs, firsts)
    for variants in alike.values():
        for variant in variants:
            recorded[speed_key(variant)] = {**measured[speed_key(variants[0])], "options": unknown[variant]}
    write_json(file, recorded)
    return recorded


def _time_arms(runs: Runs, variants: list[Variant]) -> dict[str, dict[str, float]]:
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
    jobs = []
    for number in range(runs.config.jobs):
        own = folder / str(number)
        own.mkdir(exist_ok=True)
        first = number * len(arms) // runs.config.jobs
        write_json(own / JOB_FILE, {"kind": SPEEDS, "arms": arms, "first": first, "file": SPEEDS_FILE})
        jobs.append(Job(f"timing {number}", own / JOB_FILE, 0.0))

    def finished(job: Job, outcome: Outcome) -> list[Job]:
        if outcome.code != DONE:
            raise InputError(f"the arms can't be timed: {outcome.message} (see {job.file.with_name(LOG_FILE)})")
        return []

    run_jobs(jobs, runs.config.jobs, finished)
    return merged([read_figures(job.file.with_name(SPEEDS_FILE)) for job in jobs])


def _fix_epochs(runs: Runs, speeds: dict[str, dict[str, Any]]) -> None:
    """With `seconds`, the epochs that each variant's speed allows."""
    if runs.study.seconds is None:
        return
    for variant in runs.variants():
        images = len(TokenStore(runs.stores[variant.data, runs.study.members(variant.teacher)[0]]))
        seconds = runs.study.seconds * runs.study.arms[variant.arm].share
        epochs = seconds * speeds[speed_key(variant)]["images_per_second"] / images
        runs.epochs[variant] = max(FEWEST_EPOCHS, round(epochs, 2))


class StudyCall:
    """The runs that one call of a study does, and what it knows about the others.

    Args:
        runs: the study's runs.
        data: name of a data set -> its labelled images.
        speeds: key of a variant -> its speeds and FLOPs.
    """

    def __init__(self, runs: Runs, data: dict[str, LabelledFolder], speeds: dict[str, dict[str, Any]]):
        self.runs, self.data, self.speeds = runs, data, speeds
        self.chosen: dict[Variant, int] = {}
        self.failures: list[Failure] = []
        self.progress: Progress | None = None

    def result(self) -> dict[str, Any]:
        """Do the missing runs and write the study; the command's JSON."""
        first = self._first_jobs()
        if first:
            self._announce()
            assert self.progress is not None
            run_jobs(first, self.runs.config.jobs, self._finished, self._begin, self.progress.tick)
        return self._publish()

    def _first_jobs(self) -> list[Job]:
        """Jobs that wait for nothing: seed after seed, so that the arms take turns; candidates of tuned arms first."""
        arms = self.runs.study.arms
        tuned = {
            tuned_key(v.data, v.teacher, v.arm): None for v in self.runs.variants() if len(arms[v.arm].candidates) > 1
        }
        jobs = [job for key in tuned for job in self._tuning_jobs(key)]
        for key in tuned:
            jobs += self._chosen_jobs(key)
        untuned = [variant for variant in self.runs.variants() if len(arms[variant.arm].candidates) == 1]
        jobs += [
            job for seed in self.runs.seeds for variant in untuned for job in self._jobs(variant, seed, self.runs.split)
        ]
        return jobs

    def _tuning_jobs(self, key: Variant) -> list[Job]:
        return [
            job
            for candidate in self._candidates(key)
            if not self._has_diverged(candidate)
            for job in self._jobs(candidate, self.runs.seeds[0], HELD_OUT)
        ]

    def _chosen_jobs(self, key: Variant) -> list[Job]:
        """The runs that are reported of a tuned arm; none until all its candidates are measured."""
        if key in self.chosen:
            return []
        figures = [
            {} if self._has_diverged(candidate) else self._figures(candidate, self.runs.seeds[0], HELD_OUT)
            for candidate in self._candidates(key)
        ]
        waits = any(
            not is_measured(figure, self.runs.study.metrics) and not self._has_diverged(candidate)
            for figure, candidate in zip(figures, self._candidates(key), strict=True)
        )
        if waits:
            return []
        scores = [figure.get(self.runs.study.tune_by, -math.inf) for figure in figures]
        best = max(range(len(scores)), key=scores.__getitem__)
        if not figures[best]:
            return []
        self.chosen[key] = best
        variant = replace(key, candidate=best)
        return [job for seed in self.runs.seeds for job in self._jobs(variant, seed, self.runs.split)]

    def _candidates(self, key: Variant) -> list[Variant]:
        return [replace(key, candidate=number) for number in range(len(self.runs.study.arms[key.arm].candidates))]

    def _jobs(self, variant: Variant, seed: int, split: str) -> list[Job]:
        """The job of a run, unless it is done."""
        if is_measured(self._figures(variant, seed, split), self.runs.study.metrics):
            return []
        file = self.runs.folder(variant, seed) / JOB_FILE
        name = f"{variant.data}, {variant.teacher}, {variant.arm}, seed {seed}"
        if split != self.runs.split:
            name += f", tuning {candidate_label(self.runs.study.arms[variant.arm].candidates[variant.candidate])}"
        return [Job(name, file, self._seconds(variant, seed), (variant, seed, split))]

    def _figures(self, variant: Variant, seed: int, split: str) -> dict[str, Any]:
        return read_figures(self.runs.folder(variant, seed) / f"{split}.json")

    def _has_diverged(self, variant: Variant) -> bool:
        return bool(self._figures(variant, self.runs.seeds[0], DIVERGED))

    def _seconds(self, variant: Variant, seed: int) -> float:
        """How long a run will take."""
        options, speed = self.runs.options(variant, seed), self.speeds[speed_key(variant)]
        labelled = self.data[variant.data]
        train = options.epochs * len(labelled.train) / speed["images_per_second"]
        embed = (len(labelled.train) + len(labelled.val)) / speed["embed_images_per_second"]
        return train + embed + self._finetune_seconds(labelled, speed["embed_images_per_second"])

    def _finetune_seconds(self, labelled: LabelledFolder, images_per_second: float) -> float:
        if self.runs.study.finetune is None:
            return 0.0
        job = {"data": ".", "device": "cpu", "workers": 0, "pretrain": {"run": ".", "seed": 0}}
        options = finetune_options(dict(self.runs.study.finetune), job, Path())
        epochs = settle(options, IMAGENET, len(labelled.train)).epochs
        return (epochs * len(labelled.train) * (1 + BACKWARD) + len(labelled.val)) / images_per_second

    def _announce(self) -> None:
        """Say how many runs there are and how long they will take."""
        runs, arms = self.runs, self.runs.study.arms
        todo, total = 0.0, 0
        done = 0
        for variant in runs.variants():
            tuned = len(arms[variant.arm].candidates) > 1
            key = tuned_key(variant.data, variant.teacher, variant.arm)
            splits = [(runs.seeds[0], HELD_OUT)] if tuned else []
            if not tuned or variant.candidate == self.chosen.get(key, 0):
                splits += [(seed, runs.split) for seed in runs.seeds if (seed, runs.split) not in splits]
            for seed, split in splits:
                total += 1
                is_done = is_measured(self._figures(variant, seed, split), runs.study.metrics)
                done += is_done
                todo += 0.0 if is_done else self._seconds(variant, seed)
        self.progress = Progress(total, done, todo, min(runs.config.jobs, max(1, total - done)))
        device = own_device(runs.config.device).type
        self.progress.line(
            f"{runs.study.title}: {counted(runs.config.jobs, 'run')} at once, on {device}, in {runs.out}"
        )

    def _begin(self, job: Job) -> None:
        assert self.progress is not None
        self.runs.write_job(*job.about)
        self.progress.begin(job)

    def _finished(self, job: Job, outcome: Outcome) -> list[Job]:
        variant, seed, split = job.about
        assert self.progress is not None
        if outcome.code == DONE:
            figures = self._figures(variant, seed, split)
            shown = ", ".join(f"{metric} {figures[metric]:.1f}" for metric in self.runs.study.metrics)
            self.progress.end(job, f"{job.name}: {shown}")
        else:
            where = job.file.with_name(LOG_FILE)
            self.progress.end(job, f"{job.name}: FAILED: {outcome.message} (see {where})")
            if (
                outcome.code == FAILED_CHECK
                and len(self.runs.study.arms[variant.arm].candidates) > 1
                and split == HELD_OUT
            ):
                # A learning rate that is too high for the loss to stay finite is an answer, not a failure.
                write_json(job.file.with_name(f"{DIVERGED}.json"), {"message": outcome.message})
            else:
                self.failures.append(Failure(variant, seed, outcome.message))
        if len(self.runs.study.arms[variant.arm].candidates) > 1:
            return self._chosen_jobs(tuned_key(variant.data, variant.teacher, variant.arm))
        return []

    def _publish(self) -> dict[str, Any]:
        runs = self.runs
        sizes = {
            name: {"train": len(data.train), "val": len(data.val), "classes": len(data.classes)}
            for name, data in self.data.items()
        }
        device = str(own_device(runs.config.device))
        study = study_results(runs, sizes, self.speeds, self.chosen, self.failures, device)
        write_json(runs.out / STUDY_FILE, study)
        page = runs.out / PAGE_FILE
        write_study_page(study, page)
        log.info(f"{study_text(study)}\n{page}: the page; {STUDY_FILE} beside it has every figure")
        result = {
            "rows": study["rows"],
            "split": study["split"],
            "html": str(page),
            "study": str(runs.out / STUDY_FILE),
        }
        if self.failures:
            raise FailedCheckError(self._failed(), result)
        return result

    def _failed(self) -> str:
        first = self.failures[0]
        more = f"; and {counted(len(self.failures) - 1, 'more run')}" if len(self.failures) > 1 else ""
        log_file = self.runs.folder(first.variant, first.seed) / LOG_FILE
        name = f"{first.variant.data}, teacher {first.variant.teacher}, arm {first.variant.arm}, seed {first.seed}"
        return f"{name}: {first.message} (see {log_file}){more}; the same call tries again"
