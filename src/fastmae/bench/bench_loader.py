"""`fastmae bench loader`: views per second that one core loads from a store, with tokens, compared with MAE's loading.

MAE's side is what its authors' training script does with torchvision: Pillow decodes the whole file, then
RandomResizedCrop to the view's size (scale 0.2 to 1, bicubic), flip, ToTensor and Normalize, and the images are stacked
into a batch. Our side is the reader alone, `StoreViews.fill`, which loader workers call, and what such a worker
delivers to the training process through `ring_batches`, in the same rounds.

Each process has one thread. The files are in the system's cache, so the work is the CPU's alone and CPU seconds are
those of the clock on an idle machine. On a busy machine they are still the same.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from fastmae.bench.loading import Batches, MaeImages, StoreTurns
from fastmae.bench.options import check_codecs_fit
from fastmae.bench.sample import evenly_spaced, list_images
from fastmae.bench.stores import CachedTeacher, begin_store, build_store, store_info
from fastmae.bench.table import Table, machine
from fastmae.bench.timing import Rate, Turn, format_rate, format_spread, interleave, one_thread
from fastmae.config import BenchLoaderConfig, PretrainConfig, TokenizeConfig
from fastmae.errors import InputError
from fastmae.images.decode import UndecodableError, decode_image
from fastmae.images.sources import Source, open_source
from fastmae.images.views import ViewDraws
from fastmae.offline.fill import LoaderOptions
from fastmae.outside.codec_names import codec_names
from fastmae.runtime.device import own_device
from fastmae.runtime.progress import counted_through
from fastmae.runtime.wording import counted
from fastmae.student.encoder import visible_patches
from fastmae.teachers import Teacher, load_teacher
from fastmae.tokens import TokenStore

MAE = "MAE: decode, RandomResizedCrop, flip, normalise"
PIXELS: tuple[Literal["jpeg", "raw"], ...] = ("jpeg", "raw")
PARTS = ("decode", "pixels", "tokens", "draws")
"""Parts of the loading that are timed by themselves."""
SHARES = ("decode", "copy", "tokens", "draws", "rest")
"""The parts that are reported."""

DELIVERY = (
    *("delivered_views_per_second", "reader_views_per_second", "delivered_over_reader"),
    "main_process_milliseconds_per_view",
)

NOTES = (
    "In every round each row loads all images once, in random order; the median over the rounds is given with the "
    "slowest and the fastest. Seconds are CPU time, so other work on the machine does not count. The files of both "
    "sides are in the system's cache: no disk is measured.",
    "The columns from images/s to 'rest' are the reader alone: one process, one thread, no loader workers. MAE's rows "
    "end in a stacked float32 batch. fastmae's rows end in a uint8 batch, in memory that is there already, with tokens "
    "as the codec stores them, and with positions, flips and masks drawn. `pretrain` moves that batch to the device, "
    "which normalises and decodes; 'normalised here' adds the normalisation on this core.",
    "'first pass': the same from a store that was just opened, when each shard is mapped and the checksum of every "
    "record is verified.",
    "Shares are of the median time: decode (of the whole file, or of the view's part of the stored JPEG), copy (of "
    "raw pixels into the batch, and the mirroring of flipped views), tokens (reading them into the batch) and draws. "
    "Each is timed by itself in the same rounds; the rest is what remains.",
    "'delivered images/s': views that one loader worker delivers to the training process in a second of its CPU time, "
    "the system's share included, and that rate over the reader's. 'main ms' is the CPU time that the training process "
    "itself spends on a view.",
)

Seconds = dict[tuple[str, str], list[float]]
"""The seconds of each round, by contender (MAE or a store) and by work (whole batches or a part)."""


def bench_loader(config: BenchLoaderConfig) -> dict[str, Any]:
    """Measure both sides and publish the table.

    Returns:
        The command's JSON.
    """
    codecs = codec_names(config.codecs)
    source = open_source(config.images)
    with tempfile.TemporaryDirectory(prefix="fastmae-") as temporary, torch.random.fork_rng(devices=[]):
        folder = Path(temporary)
        entries = _decodable(source, evenly_spaced(list_images(source, folder), config.sample))
        grid = config.middle_size // config.patch_size
        teacher = load_teacher(config.teacher, config.middle_size, grid, config.teacher_weights, config.teacher_block)
        check_codecs_fit(codecs, teacher)
        stores = _build_stores(config, folder, source, entries, teacher.to(own_device(config.device)), codecs)
        torch.manual_seed(config.seed)  # of MAE's transforms
        with one_thread():
            seconds, delivered = _measure(config, source, entries, stores)
    rows = _rows(seconds, len(entries), delivered, list(stores))
    settings = machine() | {
        "images": f"{len(entries)} of {config.images}",
        "sizes": f"views of {config.image_size} px out of {config.middle_size}, patches of {config.patch_size}",
        "batches": counted(config.batch_size, "view"),
        "tokens": f"{config.teacher}, {counted(teacher.token_dim, 'channel')}",
        "pixels": f"JPEG quality {TokenizeConfig.jpeg_quality}, or raw",
        "rounds": str(config.rounds),
    }
    Table("Loading on one core", settings, [_cells(row) for row in rows], NOTES).publish(config.out)
    return {"rows": rows, "images": len(entries), "settings": settings}


def _decodable(source: Source, entries: list[bytes]) -> list[bytes]:
    """The images that both sides can decode."""
    mae = MaeImages.of(source, entries, size=1)
    decodable = []
    for index, entry in enumerate(counted_through(entries, "check the images", "images", len(entries))):
        try:
            with source.open(entry) as file:
                decode_image(file)
            mae.decode(index)
        except (UndecodableError, OSError, ValueError):
            continue
        decodable.append(entry)
    if not decodable:
        raise InputError(
            f"{source.path}: none of the {len(entries)} images tried could be decoded by both sides; give photos"
        )
    return decodable


def _build_stores(
    config: BenchLoaderConfig, folder: Path, source: Source, entries: list[bytes], teacher: Teacher, codecs: list[str]
) -> dict[str, TokenStore]:
    """One store for each way to store pixels and tokens."""
    loading = LoaderOptions(TokenizeConfig.batch_size, config.workers)
    stores = {}
    for pixels in PIXELS:
        cached_teacher = CachedTeacher(teacher)
        for codec in codecs:
            store = folder / f"{pixels}-{codec}.tokens"
            part = begin_store(store, source, entries)
            info = store_info(
                teacher, [part], config.middle_size, config.patch_size, codec, pixels, TokenizeConfig.jpeg_quality
            )
            stores[f"{pixels} pixels, {codec} tokens"] = build_store(
                store, info, source, cached_teacher, loading, TokenizeConfig.codec_images, config.seed
            )
    return stores


def _measure(
    config: BenchLoaderConfig, source: Source, entries: list[bytes], stores: dict[str, TokenStore]
) -> tuple[Seconds, int]:
    """The seconds, and the number of views that a worker delivers in a round."""
    size = config.image_size // config.patch_size
    draws = ViewDraws(size, True, "random", visible_patches(size**2, PretrainConfig.mask_ratio), config.seed)
    batches = Batches(len(entries), config.batch_size, config.seed)
    mae = MaeImages.of(source, entries, config.image_size)
    turns: dict[tuple[str, str], Turn] = {
        (MAE, "views"): lambda number: batches.seconds(number, mae.batch),
        (MAE, "decode"): lambda number: batches.seconds(number, mae.decode_batch),
    }
    for name, store in stores.items():
        store_turns = StoreTurns(store, draws, batches)
        delivery = store_turns.delivery(1 + config.rounds)  # the first warms up
        turns |= {(name, work): turn for work, turn in (store_turns.turns() | delivery.turns()).items()}
    return interleave(turns, config.rounds, "bench loader"), delivery.views_per_round


def _rows(seconds: Seconds, images: int, delivered: int, stores: list[str]) -> list[dict[str, Any]]:
    rows = [_row(seconds, images, MAE, MAE, "views") | dict.fromkeys(DELIVERY)]
    for store in stores:
        delivery = _delivery(seconds, images, delivered, store)
        rows.append(_row(seconds, images, f"fastmae: {store}", store, "views") | delivery)
        rows.append(_row(seconds, images, f"fastmae: {store}, normalised here", store, "normalised") | delivery)
    return rows


def _delivery(seconds: Seconds, images: int, delivered: int, store: str) -> dict[str, float]:
    """Of a store: the rate of a worker, that of the reader alone, their ratio, and the training process's own time.

    The ratio is the median of those of the rounds.
    """
    worker, main, reader = (seconds[store, work] for work in ("delivered", "received", "views"))
    ratios = [reader_s / images / (worker_s / delivered) for reader_s, worker_s in zip(reader, worker, strict=True)]
    values = (delivered / median(worker), images / median(reader), median(ratios), 1000 * median(main) / delivered)
    return {name: round(value, 4) for name, value in zip(DELIVERY, values, strict=True)}


def _row(seconds: Seconds, images: int, method: str, contender: str, work: str) -> dict[str, Any]:
    """A row of the command's JSON: the rate of a contender's `work` ('views' or 'normalised') and its parts' shares."""
    total = median(seconds[contender, work])
    shares = {part: median(seconds[contender, part]) / total for part in PARTS if (contender, part) in seconds}
    if "pixels" in shares:  # decoded, if they are JPEGs, and copied
        shares["copy"] = shares.pop("pixels") - shares["decode"]
    shares["rest"] = 1 - sum(shares.values())
    first_pass = seconds.get((contender, "first")) if work == "views" else None
    return {
        "method": method,
        **Rate.of(images, seconds[contender, work]).to_json("images_per_second"),
        "milliseconds_per_image": round(1000 * total / images, 4),
        "times_mae": round(median(seconds[MAE, "views"]) / total, 2),
        "first_pass_images_per_second": None if first_pass is None else round(Rate.of(images, first_pass).median, 2),
        **{f"share_{part}": round(shares[part], 3) if part in shares else None for part in SHARES},
    }


def _cells(row: dict[str, Any]) -> dict[str, str]:
    first_pass = row["first_pass_images_per_second"]
    delivered, _, ratio, main = (row[name] for name in DELIVERY)
    if first_pass is None:  # of the row above already, or none
        delivered = None
    shares = {part: row[f"share_{part}"] for part in SHARES}
    return {
        "method": row["method"],
        "images/s": format_rate(row["images_per_second"]),
        "min-max": format_spread(row, "images_per_second"),
        "ms per image": f"{row['milliseconds_per_image']:.3f}",
        "x MAE": f"{row['times_mae']:.1f}",
        "first pass images/s": "-" if first_pass is None else format_rate(first_pass),
        **{part: "-" if share is None else f"{100 * share:.0f} %" for part, share in shares.items()},
        "delivered images/s": "-" if delivered is None else f"{format_rate(delivered)} ({100 * ratio:.0f} %)",
        "main ms": "-" if delivered is None else f"{main:.3f}",
    }
