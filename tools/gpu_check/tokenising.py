"""How fast images are tokenised, beside what limits it: the bare teacher, and the decoding on all cores."""

import shutil
import time
from pathlib import Path
from statistics import median

import torch

from fastmae.images.sources import open_source
from fastmae.offline.middle_images import MiddleImages
from fastmae.runtime.device import synchronise
from fastmae.runtime.wording import counted
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher, load_teacher
from fastmae.tokens.format import read_store_info
from gpu_check.inputs import CODECS, tokenise
from gpu_check.report import Goal, Report
from gpu_check.setting import Setting

ROUNDS = 5
BATCH_SIZE = 32
SHARE = Goal(0.8)
PRECISIONS = ("32-true", "tf32", "bf16-mixed")
CODEC = "pq38"
"""A store in fp16 of as many images would take 18 GB."""


def tokenising(setting: Setting, report: Report) -> None:
    """The rates, and `tokenize`'s share of the lower limit."""
    bare = _bare_teacher(setting, report)
    store = setting.work / "many.tokens"
    shutil.rmtree(store, ignore_errors=True)
    outcome = tokenise(setting, CODEC, CODECS[CODEC], setting.many, store)
    if outcome.code != 0:
        report.check(f"tokenize, {CODEC}, many photos", False, "exit code 0", outcome.ending, outcome.details)
        return
    decoding = _decoding_rate(setting.many, store)
    shutil.rmtree(store)
    report.figure(f"decoding alone, with {counted(worker_count(-1), 'worker')}", decoding, "images/s")
    rate = outcome.result["images_per_second"]
    report.figure(f"tokenize, {CODEC}", rate, "images/s")
    report.figure(f"tokenize, {CODEC} / the lower of bf16 teacher and decoding", rate / min(bare, decoding), "", SHARE)


def _bare_teacher(setting: Setting, report: Report) -> float:
    """Tell the teacher's rate in each precision; returns that of the last, bf16, in images per second."""
    sizes = setting.sizes
    weights = setting.weights(sizes.teacher)
    teacher = load_teacher(f"timm/{sizes.teacher}", sizes.middle, sizes.middle // 16, weights).to(setting.device)
    pixels = torch.randint(0, 256, (sizes.teacher_batch, 3, sizes.middle, sizes.middle), dtype=torch.uint8)
    pixels = pixels.to(setting.device)
    rate = 0.0
    for precision in PRECISIONS:
        teacher.precision = precision
        rate = len(pixels) / _seconds(teacher, pixels)
        report.figure(f"the bare teacher in {precision}", rate, "images/s")
    return rate


def _seconds(teacher: Teacher, pixels: torch.Tensor) -> float:
    """Median seconds of a forward pass."""
    found = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        teacher(pixels)
        synchronise(pixels.device)
        found.append(time.perf_counter() - start)
    return median(found[1:])


def _decoding_rate(photos: Path, store: Path) -> float:
    """Images per second that the workers of `tokenize` alone bring to the middle size."""
    info = read_store_info(store)
    images = MiddleImages.of_store(store, info, {0: open_source(photos)})
    ranges = [each for shard in range(info.shards) for each in images.batches_of(shard, BATCH_SIZE)]
    start = time.perf_counter()
    for _ in images.load(ranges, min(worker_count(-1), len(ranges))):
        pass
    return info.images / (time.perf_counter() - start)
