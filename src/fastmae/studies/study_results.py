"""What a study found: the figures of its runs; for each arm, the mean over seeds and the difference to the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fastmae.bench.table import machine
from fastmae.studies.held_out import EVERY
from fastmae.studies.measure import TRAINING, read_figures
from fastmae.studies.statistics import mean_and_std, paired_difference
from fastmae.studies.study_runs import Runs, Variant, candidate_label

Figures = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        variant: what was trained.
        seed: its seed.
        message: one line.
    """

    variant: Variant
    seed: int
    message: str


def study_results(
    runs: Runs,
    sizes: Mapping[str, Mapping[str, int]],
    speeds: Mapping[str, Mapping[str, float]],
    chosen: Mapping[Variant, int],
    failures: Sequence[Failure],
    device: str,
) -> dict[str, Any]:
    """study.json: what was compared and how, every run, and the rows of the tables.

    Args:
        runs: the study's runs.
        sizes: name of a data set -> numbers of its images and classes.
        speeds: key of a variant -> its speeds and FLOPs.
        chosen: arm of a data set and teacher (as candidate 0) -> index of the candidate that tuning chose.
        failures: runs without figures.
        device: that trained.
    """
    study = runs.study
    figures = {
        cell: {seed: read_figures(runs.folder(variant, seed) / f"{runs.split}.json") for seed in runs.seeds}
        for cell, variant in _reported(runs, chosen).items()
    }
    rows = [_row(runs, cell, variant, figures, speeds) for cell, variant in _reported(runs, chosen).items()]
    return {
        "fastmae study": 1,
        "title": study.title,
        "study": study.source,
        "machine": {**machine(), "device": device, "jobs": runs.config.jobs},
        "split": runs.split,
        "protocol": protocol(runs),
        "metrics": list(study.metrics),
        "baseline": study.baseline,
        "seeds": runs.seeds,
        "epochs": study.epochs,
        "seconds": study.seconds,
        "base": dict(study.base),
        "tokenize": dict(study.tokenize),
        "teachers": {**study.teachers, **{name: list(members) for name, members in study.together.items()}},
        "finetune": None if study.finetune is None else dict(study.finetune),
        "data": {
            name: {"path": str(path), **sizes[name], **study.data.get(name, {})} for name, path in runs.data.items()
        },
        "arms": {
            name: {
                "options": dict(arm.options),
                "candidates": [dict(candidate) for candidate in arm.candidates] if len(arm.candidates) > 1 else [],
                "share": arm.share,
                "note": arm.note,
            }
            for name, arm in study.arms.items()
        },
        "rows": rows,
        "tuning": [_tuning(runs, variant, best) for variant, best in chosen.items()],
        "runs": [
            {"data": data, "teacher": teacher, "arm": arm, "seed": seed, **result}
            for (data, teacher, arm), by_seed in figures.items()
            for seed, result in by_seed.items()
            if result
        ],
        "failures": [
            {**vars(failure.variant), "seed": failure.seed, "message": failure.message} for failure in failures
        ],
    }


def protocol(runs: Runs) -> str:
    """How the figures were measured, in a few sentences."""
    fifth = f"every {EVERY}th image of each class of train/, which did not vote"
    measured = (
        f"Measured on {fifth}: exploration, val/ was not touched."
        if runs.config.held_out
        else ("Measured on val/, once per run.")
    )
    tuned = any(len(arm.candidates) > 1 for arm in runs.study.arms.values())
    choice = f" Tuned by {runs.study.tune_by} on {fifth}, with seed {runs.seeds[0]}." if tuned else ""
    return measured + choice


def speed_key(variant: Variant) -> str:
    """How the record of speeds names a variant."""
    return f"{variant.data}/{variant.teacher}/{variant.arm}/{variant.candidate}"


def tuned_key(data: str, teacher: str, arm: str) -> Variant:
    """The key of a tuned arm in the record of choices."""
    return Variant(data, teacher, arm, 0)


def _reported(runs: Runs, chosen: Mapping[Variant, int]) -> dict[tuple[str, str, str], Variant]:
    """The variant whose figures each row shows; rows whose tuning is not done are left out."""
    found = {}
    for data, teacher, arm in runs.cells():
        trained = runs.trained(data, teacher, arm, 0)
        if len(runs.study.arms[arm].candidates) == 1:
            found[data, teacher, arm] = trained
        elif trained in chosen:
            found[data, teacher, arm] = Variant(trained.data, trained.teacher, arm, chosen[trained])
    return found


def _row(
    runs: Runs,
    cell: tuple[str, str, str],
    variant: Variant,
    figures: Mapping[tuple[str, str, str], Mapping[int, Figures]],
    speeds: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    data, teacher, arm = cell
    own = {seed: result for seed, result in figures[cell].items() if result}
    baseline = figures.get((data, teacher, runs.study.baseline), {})
    candidates = runs.study.arms[arm].candidates
    row: dict[str, Any] = {"data": data, "teacher": teacher, "arm": arm, "seeds": len(own)}
    for metric in runs.study.metrics:
        row |= _summary(metric, own, baseline if arm != runs.study.baseline else {})
    row |= {name: round(fmean(result[name] for result in own.values()), 4) if own else None for name in TRAINING}
    speed = speeds.get(speed_key(variant), {})
    flops = speed.get("flops_per_image")
    row["gflops_per_image"] = None if flops is None else round(flops / 1e9, 4)
    row["images_per_second"] = speed.get("images_per_second")
    row["tuned"] = candidate_label(candidates[variant.candidate]) if len(candidates) > 1 else ""
    row["note"] = runs.study.arms[arm].note
    return row


def _summary(metric: str, own: Mapping[int, Figures], baseline: Mapping[int, Figures]) -> dict[str, Any]:
    """Mean, standard deviation, and difference to the baseline, of one metric."""
    values = {seed: result[metric] for seed, result in own.items() if metric in result}
    others = {seed: result[metric] for seed, result in baseline.items() if metric in result}
    mean, std = mean_and_std(list(values.values())) if values else (None, None)
    difference = paired_difference(values, others)
    middle, interval = difference or (None, None)
    return {
        metric: None if mean is None else round(mean, 3),
        f"{metric}_std": None if std is None else round(std, 3),
        f"{metric}_difference": None if middle is None else round(middle, 3),
        f"{metric}_interval": None if interval is None else [round(bound, 3) for bound in interval],
    }


def _tuning(runs: Runs, variant: Variant, best: int) -> dict[str, Any]:
    """The candidates of an arm with their figures on the held-out images."""
    seed, arm = runs.seeds[0], runs.study.arms[variant.arm]
    tried = [
        {
            "options": dict(candidate),
            **read_figures(
                runs.folder(Variant(variant.data, variant.teacher, variant.arm, number), seed) / "held-out.json"
            ),
        }
        for number, candidate in enumerate(arm.candidates)
    ]
    return {
        "data": variant.data,
        "teacher": variant.teacher,
        "arm": variant.arm,
        "tuned_by": runs.study.tune_by,
        "chosen": dict(arm.candidates[best]),
        "candidates": tried,
    }
