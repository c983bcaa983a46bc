"""The runs that one call of a study does: which are missing, in which order, and what comes out of them.

The candidates of a tuned arm come first. Once all of them are measured, the chosen one is trained with every seed.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmae.errors import FailedCheckError, InterruptedRunError
from fastmae.evaluate.finetune import IMAGENET
from fastmae.evaluate.recipe import settle
from fastmae.probes.labelled import LabelledFolder
from fastmae.reporting.study_page import PAGE_FILE, STUDY_FILE, study_text, write_study_page
from fastmae.runtime.device import own_device
from fastmae.runtime.durable import write_json
from fastmae.runtime.forecast import Forecast
from fastmae.runtime.progress import Progress, duration
from fastmae.runtime.wording import counted
from fastmae.studies.jobs import Job, Outcome, Workers, run_jobs
from fastmae.studies.measure import HELD_OUT, finetune_options, is_measured, read_figures
from fastmae.studies.study_results import Failure, speed_key, study_results, tuned_key
from fastmae.studies.study_runs import JOB_FILE, Runs, Variant, candidate_label
from fastmae.studies.worker import DONE, FAILED_CHECK, LOG_FILE

log = logging.getLogger(__name__)
DIVERGED = "diverged"
"""Instead of figures, of a candidate whose loss did not stay finite."""
BACKWARD = 2
"""A backward pass takes about twice the time of the forward pass."""


class StudyCall:
    """The runs that one call of a study does, and what it knows about the others.

    Args:
        runs: the study's runs.
        data: name of a data set -> its labelled images.
        speeds: key of a variant -> its speeds and FLOPs.

    Attributes:
        chosen: tuned arm -> the candidate that was chosen.
        tuning: tuned arm -> number of its candidates' jobs that have not ended. A candidate is measured a moment before
            its job ends, and until then its folder is in use.
    """

    def __init__(self, runs: Runs, data: dict[str, LabelledFolder], speeds: dict[str, dict[str, Any]]):
        self.runs, self.data, self.speeds = runs, data, speeds
        self.chosen: dict[Variant, int] = {}
        self.tuning: dict[Variant, int] = {}
        self.failures: list[Failure] = []
        self.progress = Progress("ablate", "runs")
        self.forecast = Forecast(0.0)

    def result(self, workers: Workers) -> dict[str, Any]:
        """Let the workers do the missing runs, and write the study; the command's JSON."""
        first = self.first_jobs()
        if first:
            self.announce()
            try:
                with self.progress:
                    run_jobs(workers, first, self.finished, self.begin, self.tick)
            except InterruptedRunError as error:
                done = f"{self.progress.done} of {counted(self.progress.total or 0, 'run')} done"
                raise InterruptedRunError(f"{done}; {error}") from None
        return self._publish()

    def first_jobs(self) -> list[Job]:
        """Jobs that wait for nothing: seed after seed, so that the arms take turns; candidates of tuned arms first."""
        arms = self.runs.study.arms
        tuned = {
            tuned_key(v.data, v.teacher, v.arm): None for v in self.runs.variants() if len(arms[v.arm].candidates) > 1
        }
        by_arm = {key: self._tuning_jobs(key) for key in tuned}
        self.tuning = {key: len(of_arm) for key, of_arm in by_arm.items()}
        jobs = [job for of_arm in by_arm.values() for job in of_arm]
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
        if key in self.chosen or self.tuning[key]:
            return []
        candidates, seed = self._candidates(key), self.runs.seeds[0]
        diverged = [self._has_diverged(candidate) for candidate in candidates]
        figures = [
            {} if has_diverged else self._figures(candidate, seed, HELD_OUT)
            for candidate, has_diverged in zip(candidates, diverged, strict=True)
        ]
        done = [is_measured(figure, self.runs.study.metrics) for figure in figures]
        if not all(map(any, zip(done, diverged, strict=True))):
            return []
        scores = [figure.get(self.runs.study.tune_by, -math.inf) for figure in figures]
        best = max(range(len(scores)), key=scores.__getitem__)
        if not figures[best]:
            self.failures.append(Failure(key, self.runs.seeds[0], "the loss of every candidate has diverged"))
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

    def _figures(self, variant: Variant, seed: int, split: str) -> dict[str, float]:
        return read_figures(self.runs.folder(variant, seed) / f"{split}.json")

    def _has_diverged(self, variant: Variant) -> bool:
        return (self.runs.folder(variant, self.runs.seeds[0]) / f"{DIVERGED}.json").exists()

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

    def announce(self) -> None:
        """Say how long the runs will take and how many there are."""
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
        self.progress = Progress("ablate", "runs", total, done)
        self.forecast = Forecast(todo, min(runs.config.jobs, max(1, total - done)))
        device = own_device(runs.config.device).type
        log.info(
            f"{runs.study.title}: about {duration(self.forecast.seconds_left())} here: {self._sizes()}; "
            f"{total - done} of {counted(total, 'run')} to do, {runs.config.jobs} at once, on {device}, in {runs.out}"
        )

    def _sizes(self) -> str:
        """`7 arms x 3 seeds`; also the teachers and the data sets, where there are several."""
        study = self.runs.study
        sizes = [(len(study.arms), "arm"), (len(self.runs.seeds), "seed")]
        others = [(len(study.teachers) + len(study.together), "teacher"), (len(self.data), "data set")]
        return " x ".join(counted(*size) for size in [*sizes, *(other for other in others if other[0] > 1)])

    def begin(self, job: Job) -> None:
        """A job starts."""
        self.runs.write_job(*job.about)
        self.forecast.begin(job.file)
        self.tick()

    def tick(self) -> None:
        """Bring the time left up to date."""
        self.progress.expect(self.forecast.seconds_left())
        at_work = [str(Path(str(file)).parent.relative_to(self.runs.out / "runs")) for file in self.forecast.started]
        self.progress.now(", ".join(at_work))

    def finished(self, job: Job, outcome: Outcome) -> list[Job]:
        """A job has ended; the jobs that can be done now."""
        variant, seed, split = job.about
        self.forecast.end(job.file, job.seconds)
        if outcome.code == DONE:
            figures = self._figures(variant, seed, split)
            shown = ", ".join(f"{metric} {figures[metric]:.1f}" for metric in self.runs.study.metrics)
            log.info(f"{job.name}: {shown}")
        else:
            where = job.file.with_name(LOG_FILE)
            log.info(f"{job.name}: FAILED: {outcome.message} (see {where})")
            if (
                outcome.code == FAILED_CHECK
                and len(self.runs.study.arms[variant.arm].candidates) > 1
                and (split, seed) == (HELD_OUT, self.runs.seeds[0])
            ):
                # A learning rate that is too high for the loss to stay finite is an answer, not a failure.
                write_json(job.file.with_name(f"{DIVERGED}.json"), {"message": outcome.message})
            else:
                self.failures.append(Failure(variant, seed, outcome.message))
        self.progress.advance(1)
        key = tuned_key(variant.data, variant.teacher, variant.arm)
        if self.tuning.get(key):
            self.tuning[key] -= 1
            return self._chosen_jobs(key)
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
