"""A study file: what is compared (arms), on what base, with which teachers, and how it is measured.

A YAML file, by a path or by the name of one in `files/`. The command line goes over it. What is wrong with it is one
line that names the file, the arm and the key. `docs/studies.md` describes every key.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from fastmae.config import OFFLINE_TEACHER, AblateConfig, FinetuneConfig, PretrainConfig
from fastmae.config.ranges import EPOCHS, SECONDS, SEEDS, Range
from fastmae.config.resolve import converted, near
from fastmae.config.teacher import GivenTeacher
from fastmae.errors import InputError
from fastmae.studies.study_syntax import (
    beside,
    check_folder_names,
    check_keys,
    choices_of,
    mapping_of,
    options_of,
    pairs,
    pretrain_options,
    read_study,
    tokenize_options,
)

FOLDER = Path(__file__).parent / "files"
SUFFIXES = (".yaml", ".yml")
DEFAULT_RECIPE = "vit_tiny_cpu"
DEFAULT_TOKENIZE: dict[str, Any] = {"middle_size": 96, "patch_size": 8}
"""For views of 64 px, as the default recipe's."""
DEFAULT_TEACHERS = {OFFLINE_TEACHER: {"teacher": OFFLINE_TEACHER}}

STUDY_KEYS = (
    *("title", "recipe", "base", "seconds", "tokenize", "teachers", "data", "stores", "seeds", "finetune"),
    *("tune_by", "baseline", "arms"),
)
ARM_KEYS = ("options", "tune", "share", "teachers", "note")
DATA_KEYS = ("base", "tokenize")
SHARE = Range(gt=0, le=1000)
"""Of an arm, in the training of the study."""
MOST_CANDIDATES = 1000
METRICS = ("knn", "linear", "finetune")
"""What a run is measured by; `finetune` only if the study asks for it."""


@dataclass(frozen=True)
class Arm:
    """One of the alternatives that a study compares.

    Attributes:
        options: options of pretrain, over the study's base.
        candidates: options to choose from on held-out images, each over `options`; a single empty one if nothing is
            tuned.
        share: of the study's epochs or seconds.
        teachers: names of the teachers that it is trained with; None: all.
        note: a remark for the table, such as the paper's figure.
    """

    options: Mapping[str, Any]
    candidates: tuple[Mapping[str, Any], ...] = ({},)
    share: float = 1.0
    teachers: tuple[str, ...] | None = None
    note: str = ""


@dataclass(frozen=True)
class Study:
    """A study, with what the command line has changed in it.

    Attributes:
        name: the file's name without its suffix.
        source: the file, for messages.
        title: heading of its tables.
        base: options of pretrain for every arm, the recipe among them, without the epochs.
        epochs: of every run; None: the recipe's own.
        seconds: training time of every run, instead of epochs.
        tokenize: options of tokenize.
        teachers: name -> options of tokenize, over those above.
        together: name -> names of teachers whose stores are used at once.
        data: name of a data set -> its `base` and `tokenize`, over those above.
        stores: `DATA/TEACHER` -> an existing store.
        seeds: number of runs of an arm.
        finetune: options of finetune; None: runs are not fine-tuned.
        tune_by: the metric that chooses among an arm's candidates.
        baseline: the arm with which the others are compared.
        arms: by name.
    """

    name: str
    source: str
    title: str
    base: Mapping[str, Any]
    epochs: float | None
    seconds: float | None
    tokenize: Mapping[str, Any]
    teachers: Mapping[str, Mapping[str, Any]]
    together: Mapping[str, tuple[str, ...]]
    data: Mapping[str, Mapping[str, Mapping[str, Any]]]
    stores: Mapping[str, str]
    seeds: int
    finetune: Mapping[str, Any] | None
    tune_by: str
    baseline: str
    arms: Mapping[str, Arm]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What every run is measured by."""
        return METRICS if self.finetune is not None else METRICS[:-1]

    def members(self, teacher: str) -> tuple[str, ...]:
        """The teachers whose stores a name stands for."""
        return self.together.get(teacher, (teacher,))

    def teachers_of(self, arm: str) -> list[str]:
        """The names of the teachers that an arm is trained with, in the file's order."""
        chosen = self.arms[arm].teachers
        return [name for name in (*self.teachers, *self.together) if chosen is None or name in chosen]


def study_names() -> list[str]:
    """The studies that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_study(config: AblateConfig) -> Study:
    """Read the study that the command names, with the command line's values over the file's.

    Raises:
        InputError: no such study, or a mistake in it.
    """
    path = _path_of(config.study)
    source = str(config.study) if path.parent != FOLDER else f"study {path.stem}"
    values = read_study(path, source, ", ".join(study_names()))
    check_keys(values, STUDY_KEYS, source)
    _override(values, config, source)
    recipe = {"recipe": values.get("recipe") or DEFAULT_RECIPE}
    base = recipe | pretrain_options(values.get("base") or {}, f"{source}: base", path)
    epochs, seconds, finetune = base.pop("epochs", None), values.get("seconds"), values.get("finetune")
    if epochs is not None and seconds is not None:
        raise InputError(f"{source}: has seconds and base epochs; give one of the two")
    teachers, together = _teachers(values, source, path)
    data = {
        str(name): _data(f"{source}: data {name}", entry, path)
        for name, entry in mapping_of(values, "data", source).items()
    }
    arms = {str(name): _arm(str(name), arm, source, path) for name, arm in mapping_of(values, "arms", source).items()}
    if not arms:
        raise InputError(f"{source}: arms: give at least one, as `name: {{option: value}}`")
    study = Study(
        name=path.stem,
        source=source,
        title=str(values.get("title") or path.stem),
        base=base,
        epochs=converted(Annotated[float | None, EPOCHS], epochs, f"{source}: base: epochs"),
        seconds=converted(Annotated[float | None, SECONDS], seconds, f"{source}: seconds"),
        tokenize={**DEFAULT_TOKENIZE, **tokenize_options(values.get("tokenize") or {}, f"{source}: tokenize", path)},
        teachers=teachers,
        together=together,
        data=data,
        stores={str(name): beside(path, str(store)) for name, store in mapping_of(values, "stores", source).items()},
        seeds=converted(Annotated[int, SEEDS], values.get("seeds", 1), f"{source}: seeds"),
        finetune=None if finetune is None else options_of(finetune, FinetuneConfig, f"{source}: finetune"),
        tune_by=str(values.get("tune_by", "knn")),
        baseline=str(values.get("baseline", next(iter(arms)))),
        arms=arms,
    )
    _check_names(study)
    return study


def _path_of(study: Path) -> Path:
    if study.suffix in SUFFIXES:
        return study
    if str(study) not in study_names():
        names = ", ".join(study_names())
        raise InputError(f"no study '{study}'{near(study, study_names()) or '.'} Give a .yaml file, or one of {names}")
    return FOLDER / f"{study}.yaml"


def _override(values: dict[str, Any], config: AblateConfig, source: str) -> None:
    """The command line's values, over those of the file."""
    base = dict(mapping_of(values, "base", source))
    if config.epochs is not None and config.seconds is not None:
        raise InputError("--seconds: sets the epochs; leave out --epochs")
    if config.epochs is not None:
        base["epochs"] = config.epochs
        values.pop("seconds", None)
    if config.seconds is not None:
        base.pop("epochs", None)
        values["seconds"] = config.seconds
    given = options_of(pairs(config.base, "--base"), PretrainConfig, "--base")
    values["base"] = base | given
    if config.seeds is not None:
        values["seeds"] = config.seeds
    if config.recipe is not None:
        values["recipe"] = config.recipe
        values["base"].pop("recipe", None)
    sizes = {name: getattr(config, name) for name in ("middle_size", "patch_size")}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    values["tokenize"] = dict(mapping_of(values, "tokenize", source)) | sizes
    gone = {"base": {*given}, "tokenize": {*sizes}}
    gone["base"] |= {"recipe"} if config.recipe is not None else set()
    gone["base"] |= {"epochs"} if config.epochs is not None or config.seconds is not None else set()
    _forget_in_data(values, gone, source)
    _override_teachers(values, config, source)


def _forget_in_data(values: dict[str, Any], gone: Mapping[str, set[str]], source: str) -> None:
    """Take what the command line sets out of the data sets' own sections, which would go over it."""
    for entry in mapping_of(values, "data", source).values():
        for section, names in gone.items():
            if isinstance(entry, dict) and isinstance(entry.get(section), dict):
                own = entry[section].items()
                entry[section] = {name: value for name, value in own if str(name).replace("-", "_") not in names}


def _override_teachers(values: dict[str, Any], config: AblateConfig, source: str) -> None:
    if config.teacher is not None:
        specs = [config.teacher] if isinstance(config.teacher, GivenTeacher) else config.teacher.split(",")
        values["teachers"] = {spec: {"teacher": spec} for spec in specs if spec}
        values.pop("stores", None)  # those of the file's teachers
    weights = None if config.teacher_weights is None else str(config.teacher_weights.absolute())
    own = {"teacher_weights": weights, "teacher_block": config.teacher_block}
    given = {name: value for name, value in own.items() if value is not None}
    if not given:
        return
    teachers = mapping_of(values, "teachers", source) or DEFAULT_TEACHERS
    if len(teachers) != 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"--teacher: there are {len(teachers)} teachers, {', '.join(teachers)}; {flags} fit only one")
    (name, options), *_ = teachers.items()
    values["teachers"] = {name: {**({"teacher": options} if isinstance(options, str) else options), **given}}


def _teachers(
    values: Mapping[str, Any], source: str, path: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[str, ...]]]:
    """The teachers by name, and the names that stand for several teachers at once."""
    entries = mapping_of(values, "teachers", source) or DEFAULT_TEACHERS
    alone, together = {}, {}
    for name, entry in entries.items():
        if isinstance(entry, list):
            if not entry:
                raise InputError(f"{source}: teacher {name}: give a name or more")
            together[str(name)] = tuple(map(str, entry))
        else:
            where = f"{source}: teacher {name}"
            options = tokenize_options({"teacher": entry} if isinstance(entry, str) else entry, where, path)
            if "teacher" not in options:
                raise InputError(f"{where}: give `teacher:`, as in tokenize")
            alone[str(name)] = options
    for name, members in together.items():
        unknown = next((member for member in members if member not in alone), None)
        if unknown is not None:
            raise InputError(f"{source}: teacher {name}: no teacher '{unknown}'{near(unknown, list(alone))}")
    return alone, together


def _arm(name: str, entry: Any, source: str, path: Path) -> Arm:
    where = f"{source}: arm {name}"
    entry = {} if entry is None else entry
    if not isinstance(entry, dict):
        raise InputError(f"{where}: give options, as `{{loss: cosine}}`, not {entry!r}")
    if not entry.keys() & set(ARM_KEYS):
        return Arm(pretrain_options(entry, where, path))
    check_keys(entry, ARM_KEYS, where)
    options = pretrain_options(entry.get("options") or {}, where, path)
    tune = choices_of(entry.get("tune") or {}, f"{where}: tune", path)
    for option in tune:
        if option in {*options, "epochs"}:
            raise InputError(f"{where}: tune: {option}: is set by the arm or the study; leave it out of one of the two")
    if math.prod(map(len, tune.values())) > MOST_CANDIDATES:
        raise InputError(f"{where}: tune: more than {MOST_CANDIDATES} candidates; leave some out")
    grid = tuple(dict(zip(tune, choice, strict=True)) for choice in itertools.product(*tune.values()))
    teachers = entry.get("teachers")
    if teachers is not None and (not isinstance(teachers, list) or not teachers):
        raise InputError(f"{where}: teachers: give a list of names")
    return Arm(
        options=options,
        candidates=grid,
        share=converted(Annotated[float, SHARE], entry.get("share", 1.0), f"{where}: share"),
        teachers=None if teachers is None else tuple(map(str, teachers)),
        note=str(entry.get("note", "")),
    )


def _data(where: str, entry: Any, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: give `base:` or `tokenize:`")
    check_keys(entry, DATA_KEYS, where)
    return {
        "base": pretrain_options(entry.get("base") or {}, f"{where}: base", path),
        "tokenize": tokenize_options(entry.get("tokenize") or {}, f"{where}: tokenize", path),
    }


def _check_names(study: Study) -> None:
    """Names that refer to others, and names that would share a folder."""
    teachers = [*study.teachers, *study.together]
    references = [(f"arm {arm}: teachers", name) for arm in study.arms for name in study.arms[arm].teachers or ()]
    for where, teacher in references:
        if teacher not in teachers:
            raise InputError(f"{study.source}: {where}: no teacher '{teacher}'{near(teacher, teachers)}")
    if study.baseline not in study.arms:
        raise InputError(f"{study.source}: baseline: no arm '{study.baseline}'{near(study.baseline, list(study.arms))}")
    if study.tune_by not in study.metrics:
        raise InputError(f"{study.source}: tune_by {study.tune_by}: give one of {', '.join(study.metrics)}")
    for kind, names in (("arms", list(study.arms)), ("teachers", teachers)):
        check_folder_names(names, f"{study.source}: {kind}")
    if study.seconds is not None:
        own = {f"arm {name}": arm.options for name, arm in study.arms.items()}
        own |= {f"data {name}: base": entry["base"] for name, entry in study.data.items()}
        for where, options in own.items():
            if "epochs" in options:
                raise InputError(
                    f"{study.source}: {where}: epochs: the study has seconds, which set them; leave one out"
                )


def check_data_names(study: Study, names: list[str]) -> Study:
    """The study without settings for other data sets than these.

    Raises:
        InputError: `stores:` names a data set or a teacher that is not there.
    """
    for name in study.stores:
        data, _, teacher = name.partition("/")
        if data in names and teacher not in study.teachers:
            raise InputError(
                f"{study.source}: stores: {name}: no teacher '{teacher}'{near(teacher, list(study.teachers))}"
            )
        if not teacher:
            example = f"{names[0]}/{next(iter(study.teachers))}"
            raise InputError(f"{study.source}: stores: {name}: give DATA/TEACHER, as {example}")
    return replace(study, data={name: entry for name, entry in study.data.items() if name in names})
