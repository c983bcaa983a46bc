"""How fast images are tokenised, beside what limits it: the bare teacher, and the decoding on all cores."""

import time
from statistics import median

import torch
from fastmae.offline.middle_images import MiddleImages
from fastmae.offline.settle import use_precision

from fastmae.images.sources import open_source
from fastmae.runtime.device import synchronise
from fastmae.runtime.wording import counted
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher, load_teacher
from fastmae.tokens.format import read_store_info
from gpu_check.inputs import tokenise_rates
from gpu_check.report import Goal, Report
from gpu_check.setting import Setting

ROUNDS = 5
BATCH_SIZE = 32
SHARE = Goal(0.8)
PRECISIONS = ("32-true", "tf32", "bf16-mixed")


def tokenising(setting: Setting, report: Report) -> None:
    """The rates, and `tokenize`'s share of the lowest limit."""
    bare = _bare_teacher(setting, report)
    decoding = _decoding_rate(setting)
    report.figure(f"decoding alone, with {counted(worker_count(-1), 'worker')}", decoding, "images/s")
    limit = min(bare, decoding)
    for codec, rate in tokenise_rates(setting).items():
        report.figure(f"tokenize, {codec}", rate, "images/s")
        report.figure(f"tokenize, {codec} / the lower of bf16 teacher and decoding", rate / limit, "", SHARE)


def _bare_teacher(setting: Setting, report: Report) -> float:
    """Tell the teacher's rate in each precision; returns that of the last, bf16, in images per second."""
    sizes = setting.sizes
    weights = setting.weights(sizes.teacher)
    teacher = load_teacher(f"timm/{sizes.teacher}", sizes.middle, sizes.middle // 16, weights).to(setting.device)
    pixels = torch.randint(0, 256, (sizes.teacher_batch, 3, sizes.middle, sizes.middle), dtype=torch.uint8)
    pixels = pixels.to(setting.device)
    rate = 0.0
    for precision in PRECISIONS:
        use_precision(teacher, precision)
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


def _decoding_rate(setting: Setting) -> float:
    """Images per second that the workers of `tokenize` alone bring to the middle size."""
    store = setting.store("pq38")
    info = read_store_info(store)
    images = MiddleImages.of_store(store, info, {0: open_source(setting.photos)})
    ranges = [each for shard in range(info.shards) for each in images.batches_of(shard, BATCH_SIZE)]
    start = time.perf_counter()
    for _ in images.load(ranges, min(worker_count(-1), len(ranges))):
        pass
    return info.images / (time.perf_counter() - start)
