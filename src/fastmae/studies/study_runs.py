"""The runs of a study: for each data set, teacher, arm, candidate and seed, its options and its folder.

OUT/runs/DATA/TEACHER/ARM/[CANDIDATE/]seed0/    see `measure`; with job.json, what the run is, and log.txt, what it said
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastmae.config import AblateConfig, PretrainConfig, TokenizeConfig
from fastmae.config.teacher import names_code
from fastmae.config.tokenize import middle_sizes
from fastmae.errors import InputError
from fastmae.outside.documents import read_json
from fastmae.pretraining.plan import check_middle_sizes, hog_target, loss_weights, make_plan
from fastmae.pretraining.pretrain import as_planned, describe
from fastmae.runtime.durable import write_json
from fastmae.student.student import build_student
from fastmae.studies.jobs import loading_workers
from fastmae.studies.measure import HELD_OUT, VAL
from fastmae.studies.speeds import as_json
from fastmae.studies.study_file import Study
from fastmae.studies.study_syntax import as_file_name
from fastmae.studies.worker import RUN
from fastmae.tokens.reader import open_scales

log = logging.getLogger(__name__)

JOB_FILE = "job.json"
SHARED_PIXELS = (
    "images_sha256",
    "middle_size",
    "patch_size",
    "channels",
    "resize",
    "value_range",
    "pixels",
    "jpeg_quality",
)
"""Facts of a store; where two agree in all of them, a run that reads no tokens is the same on both."""
WITHOUT_TOKENS = ("pixels", "hog")
SOME_CHANNELS = 8
"""Channels of a teacher that is not known yet, for checking the sizes of a student."""


@dataclass(frozen=True)
class Variant:
    """What is trained once per seed.

    Attributes:
        data: name of the data set.
        teacher: name of the teacher.
        arm: name of the arm.
        candidate: index among the arm's candidates.
    """

    data: str
    teacher: str
    arm: str
    candidate: int


@dataclass(frozen=True)
class _BegunJob:
    """What is compared of the job of a run that an earlier call began; see `Runs.job`."""

    data: str
    pretrain: dict[str, Any]
    finetune: dict[str, Any] | None
    seconds: float | None = None
    jobs: int | None = None
    store: Any = None


class Runs:
    """Options and folders of a study's runs.

    Args:
        study: the study.
        config: the command's options.
        data: name of a data set -> its folder.
        out: the study's folder.

    Attributes:
        stores: data set and teacher -> the store's location.
        epochs: variant -> its epochs, where the study sets the time instead.
        read: variant -> what it reads from its stores, for recognising them when the study is continued.
    """

    def __init__(self, study: Study, config: AblateConfig, data: Mapping[str, Path], out: Path):
        self.study, self.config, self.data, self.out = study, config, data, out
        self.stores: dict[tuple[str, str], str] = {}
        self.epochs: dict[Variant, float] = {}
        self.read: dict[Variant, dict[str, Any]] = {}
        self._trained: dict[Variant, Variant] = {}

    @property
    def seeds(self) -> list[int]:
        """Of every arm; the first one also tunes."""
        return list(range(self.config.seed, self.config.seed + self.study.seeds))

    @property
    def split(self) -> str:
        """Where the reported figures are measured."""
        return HELD_OUT if self.config.held_out else VAL

    def cells(self) -> list[tuple[str, str, str]]:
        """Data set, teacher and arm of every row of the tables."""
        arms = self.study.arms
        teachers = [*self.study.teachers, *self.study.together]
        return [
            (data, teacher, arm)
            for data in self.data
            for teacher in teachers
            for arm in arms
            if teacher in self.study.teachers_of(arm)
        ]

    def variants(self) -> list[Variant]:
        """Everything that may be trained, each once: a run that reads no tokens is shared by the teachers."""
        found = {
            self.trained(data, teacher, arm, candidate): None
            for data, teacher, arm in self.cells()
            for candidate in range(len(self.study.arms[arm].candidates))
        }
        return list(found)

    def trained(self, data: str, teacher: str, arm: str, candidate: int) -> Variant:
        """The variant whose runs stand for an arm with a teacher. The stores must be there."""
        own = Variant(data, teacher, arm, candidate)
        if own not in self._trained:
            self._trained[own] = own if self._reads_tokens(own) else self._first_alike(own)
        return self._trained[own]

    def _reads_tokens(self, variant: Variant) -> bool:
        return self.options(variant, self.seeds[0]).target not in WITHOUT_TOKENS

    def _first_alike(self, variant: Variant) -> Variant:
        """The variant of the first teacher whose store holds the same pixels."""
        facts = self._facts(variant.data, variant.teacher)
        teachers = self.study.teachers_of(variant.arm)
        first = next(teacher for teacher in teachers if self._facts(variant.data, teacher) == facts)
        return replace(variant, teacher=first)

    def tokenize_options(self, data: str, teacher: str, store: Path) -> TokenizeConfig:
        """The options for tokenising a data set with one teacher.

        Raises:
            InputError: options that can't be used; the message names the file, the teacher and the option.
        """
        study = self.study
        given = {**study.tokenize, **study.data.get(data, {}).get("tokenize", {}), **study.teachers[teacher]}
        shared: dict[str, Any] = {"seed": self.config.seed, "device": self.config.device}
        try:
            return TokenizeConfig(
                images=self.data[data] / "train", store=store, workers=self.config.workers, **{**shared, **given}
            )
        except InputError as error:
            raise InputError(f"{study.source}: data {data}, teacher {teacher}: {error}") from error

    def options(self, variant: Variant, seed: int) -> PretrainConfig:
        """The options of a run.

        Raises:
            InputError: options that can't be used; the message names the file, the arm and the option.
        """
        study, arm = self.study, self.study.arms[variant.arm]
        base = {**study.base, **study.data.get(variant.data, {}).get("base", {})}
        given = {**base, **arm.options, **arm.candidates[variant.candidate]}
        try:
            options = self._options(variant, seed, given)
        except InputError as error:
            try:
                self._options(variant, seed, base)
            except InputError:
                raise InputError(f"{study.source}: base: {error}") from error
            raise InputError(f"{study.source}: arm {variant.arm}: {error}") from error
        return options

    def _options(self, variant: Variant, seed: int, given: Mapping[str, Any]) -> PretrainConfig:
        study = self.study
        stores = [self.stores.get((variant.data, name), name) for name in study.members(variant.teacher)]
        fixed: dict[str, Any] = {
            "stores": tuple(stores),
            "run": self.folder(variant, seed) / "pretrain",
            "seed": seed,
            "device": self.config.device,
            "workers": loading_workers(self.config.workers, self.config.jobs),
        }
        specs = [study.teachers[name]["teacher"] for name in study.members(variant.teacher)]
        code = next(filter(names_code, specs), None)  # of the command line, which alone may name some
        if code is not None and given.get("target") == "teacher":
            fixed["teacher"] = code
        options = PretrainConfig(**{**given, **fixed})
        epochs = self.epochs.get(variant) or self._epochs(variant, options)
        short = options.with_epochs(epochs)
        return replace(short, warmup_epochs=options.warmup_epochs) if "warmup_epochs" in given else short

    def _epochs(self, variant: Variant, options: PretrainConfig) -> float:
        """The arm's own epochs, or its share of the data set's, the study's or the recipe's."""
        arm = self.study.arms[variant.arm]
        if "epochs" in arm.options:
            return options.epochs
        of_data = self.study.data.get(variant.data, {}).get("base", {})
        return arm.share * (options.epochs if "epochs" in of_data else self.study.epochs or options.epochs)

    def seconds(self, variant: Variant) -> float | None:
        """Training time of each run, if the study sets it."""
        return None if self.study.seconds is None else self.study.seconds * self.study.arms[variant.arm].share

    def folder(self, variant: Variant, seed: int) -> Path:
        """The folder of a run."""
        arm = self.study.arms[variant.arm]
        parts = [variant.data, variant.teacher, variant.arm]
        if len(arm.candidates) > 1:
            parts.append(candidate_label(arm.candidates[variant.candidate]))
        return self.out.joinpath("runs", *map(as_file_name, parts), f"seed{seed}")

    def job(self, variant: Variant, seed: int, split: str) -> dict[str, Any]:
        """The job of a run, for `measure`."""
        finetune = self.study.finetune
        return {
            "kind": RUN,
            "pretrain": as_json(self.options(variant, seed)),
            "seconds": self.seconds(variant),
            "jobs": self.config.jobs,
            "store": self.read[variant],
            "data": str(self.data[variant.data]),
            "split": split,
            "finetune": None if finetune is None else dict(finetune),
            "device": self.config.device,
            "workers": loading_workers(self.config.workers, self.config.jobs),
        }

    def write_job(self, variant: Variant, seed: int, split: str) -> Path:
        """Write the job of a run into its folder."""
        folder = self.folder(variant, seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / JOB_FILE, self.job(variant, seed, split))
        return folder / JOB_FILE

    def check_options(self) -> None:
        """Check every arm as far as it can be done without stores: options, and sizes of the student.

        Raises:
            InputError: names the file, the arm and the option.
        """
        for data, teacher, arm in self.cells():
            for candidate in range(len(self.study.arms[arm].candidates)):
                options = self.options(Variant(data, teacher, arm, candidate), self.seeds[0])
                tokenized = self.tokenize_options(data, self.study.members(teacher)[0], self.out)
                if (data, self.study.members(teacher)[0]) not in self.stores:
                    with self._naming(arm):
                        _check_sizes(options, tokenized, len(self.study.members(teacher)))

    def check_plans(self) -> None:
        """Plan every variant, now that the stores are there.

        Raises:
            InputError: names the file, the arm and the option.
        """
        trainings: dict[str, Variant] = {}
        for variant in self.variants():
            options = self.options(variant, self.seeds[0])
            with self._naming(variant.arm):
                plan = make_plan(options)
                self.read[variant] = describe(options, plan)
            planned = as_json(as_planned(options, plan)) | {"run": "", "share": self.study.arms[variant.arm].share}
            training = json.dumps([variant.data, variant.teacher, planned], sort_keys=True)
            first = trainings.setdefault(training, variant)
            if first.arm != variant.arm:
                log.warning(
                    f"{self.study.source}: with {variant.data} and teacher {variant.teacher}, arm {variant.arm} is the "
                    f"same training as arm {first.arm}: what it sets is what auto comes to there"
                )

    def check_begun(self) -> None:
        """Compare the runs with those that an earlier call began in their folders: their figures are read back.

        If the study sets the time, the epochs of a run that was begun are kept.

        Raises:
            InputError: names the file, the arm and the option that differs.
        """
        for variant in self.variants():
            for seed in self.seeds:
                file = self.folder(variant, seed) / JOB_FILE
                if file.exists():
                    begun = read_json(file, _BegunJob, way_out=f"delete {file.parent}, or give another --out")
                    epochs = begun.pretrain.get("epochs")
                    if self.study.seconds is not None and isinstance(epochs, int | float):
                        self.epochs[variant] = epochs
                    self._check_begun(variant, seed, begun, f"{self.study.source}: arm {variant.arm}: {file.parent}")

    @contextmanager
    def _naming(self, arm: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.study.source}: arm {arm}: {error}") from error

    def _check_begun(self, variant: Variant, seed: int, begun: _BegunJob, run: str) -> None:
        now, advice = self.job(variant, seed, self.split), "give another --out"
        if begun.data != now["data"]:
            raise InputError(f"{run} was measured on {begun.data}, not {now['data']}; {advice}, or rename a folder")
        if begun.seconds != now["seconds"]:
            before, after = (
                f"{seconds:g} s" if seconds else "no set time" for seconds in (begun.seconds, now["seconds"])
            )
            raise InputError(f"{run} was begun with {before}, not {after}; {advice}, or the same")
        if now["seconds"] and begun.jobs != now["jobs"]:
            jobs = f"--jobs {begun.jobs}, not {now['jobs']}"
            raise InputError(f"{run} was begun with {jobs}, at another speed; {advice}, or the same")
        for key, may_change in (("pretrain", PretrainConfig.may_change), ("finetune", ())):
            before, after = getattr(begun, key), now[key]
            if key == "finetune" and (before is None or after is None):
                continue  # it may be asked for later
            for name in sorted({*before, *after} - set(may_change)):
                if before.get(name) != after.get(name):
                    flag = f"--{name.replace('_', '-')}"
                    differs = f"with {flag} {before.get(name)}, not {after.get(name)}"
                    raise InputError(f"{run} was begun {differs}; {advice}, or the same settings")
        if begun.store != now["store"]:
            raise InputError(
                f"{run} was trained on another store than {', '.join(now['pretrain']['stores'])}; {advice}"
            )

    def _facts(self, data: str, teacher: str) -> list[Any]:
        """What the pixels of a teacher's store depend on."""
        location = self.stores.get((data, self.study.members(teacher)[0]))
        if location is None or not Path(location).is_dir():
            return [teacher]
        info = open_scales(location, Path(), 0)[-1].info
        return [getattr(info, name) for name in SHARED_PIXELS]


def candidate_label(candidate: Mapping[str, Any]) -> str:
    """`base_lr=0.008, norm=patch`."""
    return ", ".join(f"{name}={value}" for name, value in candidate.items())


def _check_sizes(options: PretrainConfig, tokenized: TokenizeConfig, teachers: int) -> None:
    sizes = middle_sizes(tokenized)
    if options.image_size > min(sizes):
        raise InputError(
            f"--image-size {options.image_size}: larger than the middle images, which have {min(sizes)} px"
        )
    check_middle_sizes(options.target, len(sizes))
    if options.target == "hog":
        hog_target(options, tokenized.patch_size, tokenized.channels)
    loss_weights(options, 1 if options.target in WITHOUT_TOKENS else teachers)
    build_student(replace(options, init=""), tokenized.patch_size, SOME_CHANNELS, tokenized.channels, on="meta")
