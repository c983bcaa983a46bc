"""`fastmae bench store`: disk space and distortion of each codec, from one pass of the teacher; what precisions do to
its tokens; and the cost of building a store.

With labels, codecs learn on train/, their distortion is measured on val/, and the mean decoded features of train/
classify those of val/ by k-NN. Without labels, at most every second image is for learning and the others are measured.
Of each image only the mean features stay in memory.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastmae.bench.building import building_rate
from fastmae.bench.codecs import VIEWS, RoundTrip, time_codecs, view_size
from fastmae.bench.host_cost import host_costs
from fastmae.bench.options import check_codecs_fit
from fastmae.bench.sample import IMAGENET_IMAGES, Split, split_images
from fastmae.bench.stores import part_of, store_info
from fastmae.bench.table import Table, machine
from fastmae.bench.timing import Rate, format_rate, format_spread
from fastmae.config import BenchStoreConfig, KnnConfig
from fastmae.errors import InputError
from fastmae.images.image_list import ImageList, write_list
from fastmae.images.sources import Source, open_source
from fastmae.offline.codec_choice import MIN_COSINE
from fastmae.offline.estimate import RECORD_BYTES, bytes_per_image
from fastmae.offline.middle_images import ImageRange, LoaderOptions, MiddleImages
from fastmae.offline.options import check_precision
from fastmae.offline.sample import sample_tokens, tokens_on_cpu
from fastmae.offline.settle import fastest, first_pixels
from fastmae.outside.codec_names import codec_names
from fastmae.probes.neighbours import knn_accuracy
from fastmae.runtime.device import own_device, resolve_device
from fastmae.runtime.progress import Progress, counted_through
from fastmae.runtime.wording import counted
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher, load_teacher
from fastmae.teachers.precision import precision_cosines
from fastmae.tokens.codec import Codec, learns, load_codec
from fastmae.tokens.learn import learn_from

LEARNING, HELD_OUT = 0, 1
"""Numbers of the two image lists, as parts of a store."""
TIMED_GRIDS = 64
"""Images whose tokens are kept, to time the codecs on."""
MAX_KNN_LOSS = 0.3
RULE = (
    f"the smallest codec with a cosine of at least {MIN_COSINE} and, if there are labels, a kNN at most {MAX_KNN_LOSS} "
    "points below fp16's"
)

NOTES = (
    "kB per image on disk: tokens, pixels as JPEG, and both together with the image's name and checksums (about "
    f"{RECORD_BYTES} bytes). ImageNet: that times {IMAGENET_IMAGES:,}.",
    "Cosine: similarity of the decoded tokens and the teacher's float32 tokens, mean over the tokens. Error: "
    "||x - x'|| / ||x|| over all tokens. Both are also given after patch norm over the grid, which is what the student "
    "predicts.",
    "Encoding is timed on the CPU over whole grids, as when a shard is written; decoding on the device, in a batch of "
    f"{VIEWS} views. Medians over rounds in which all codecs take turns.",
    "Host: CPU time of the main process's threads per image, without decoding, teacher and codec, as beside an "
    "accelerator: images from the loading processes, checksums, shards on disk.",
)


@dataclass(frozen=True)
class TeacherPass:
    """What one pass of the teacher over an image list gave.

    Attributes:
        keys: keys of the images that could be decoded.
        pixel_bytes: bytes of their stored pixels, in all.
        grids: tokens of the first `TIMED_GRIDS` of them, float32 [n, grid, grid, C].
    """

    keys: list[str]
    pixel_bytes: int
    grids: torch.Tensor


@dataclass(frozen=True)
class Measurement:
    """What was measured on the images.

    Attributes:
        round_trips: what each codec made of the tokens.
        train: the pass over train/; None without labels.
        held_out: the pass over the held-out images.
        pixel_bytes: mean bytes of an image's pixels by JPEG quality; the first quality is the one that the teacher saw.
    """

    round_trips: list[RoundTrip]
    train: TeacherPass | None
    held_out: TeacherPass
    pixel_bytes: dict[int, float]


def bench_store(config: BenchStoreConfig) -> dict[str, Any]:
    """Measure the codecs, publish the table and recommend a codec.

    Returns:
        The command's JSON.
    """
    names, qualities = codec_names(config.codecs), list(config.qualities())
    check_precision(config.precision, resolve_device(config.device))
    source, loading = open_source(config.images), LoaderOptions(config.batch_size, config.workers)
    with tempfile.TemporaryDirectory(prefix="fastmae-") as temporary:
        folder = Path(temporary)
        split = split_images(source, config.limit, config.codec_images, folder)
        grid = config.middle_size // config.patch_size
        teacher = load_teacher(config.teacher, config.middle_size, grid, config.teacher_weights, config.teacher_block)
        check_codecs_fit(names, teacher)
        teacher = teacher.to(own_device(config.device))
        images = _middle_images(config, source, folder, split, teacher, qualities[0])
        precisions = _settle_precision(config, images, teacher)
        codecs = _learn_codecs(config, names, images, teacher, loading)
        measurement = _measure(images, codecs, qualities, split.labelled, teacher, loading)
        seconds = time_codecs(codecs, measurement.held_out.grids, teacher.mean.device, config.rounds)
        codec = next((codec for codec in codecs if codec.name == "fp16"), codecs[0])
        info = replace(images.info, codec=codec.name)
        costs = host_costs(
            folder, info, codecs, measurement.held_out.grids, source, split.held_out, loading, config.rounds
        )
        building = building_rate(folder, info, codec, source, split.held_out, teacher, loading, config.rounds)
    trips = zip(measurement.round_trips, seconds, costs, strict=True)
    rows = [_row(images, measurement, trip, encode, decode) | cost for trip, (encode, decode), cost in trips]
    settings = _settings(config, images, split, measurement, teacher)
    return _publish(config, rows, {"building": building, "precisions": precisions}, measurement, settings)


def recommended(rows: Sequence[dict[str, Any]]) -> str | None:
    """The codec that `RULE` names; None if no codec fulfils it.

    Args:
        rows: the command's JSON rows, with `codec`, `bytes_per_image`, `cosine` and `knn`.
    """
    knn_of = {row["codec"]: row["knn"] for row in rows}
    reference = knn_of.get("fp16", knn_of.get("fp32"))

    def keeps_accuracy(row: dict[str, Any]) -> bool:
        keeps_knn = row["knn"] is None or reference is None or row["knn"] >= reference - MAX_KNN_LOSS
        return keeps_knn and row["cosine"] >= MIN_COSINE

    candidates = [row for row in rows if keeps_accuracy(row)]
    return min(candidates, key=lambda row: row["bytes_per_image"])["codec"] if candidates else None


def _middle_images(
    config: BenchStoreConfig, source: Source, folder: Path, split: Split, teacher: Teacher, quality: int
) -> MiddleImages:
    """The two image lists as the parts of one store."""
    files = [folder / f"{number}.list" for number in (LEARNING, HELD_OUT)]
    entries = (split.learning, split.held_out)
    parts = [part_of(source, write_list(group, file)) for group, file in zip(entries, files, strict=True)]
    info = store_info(teacher, parts, config.middle_size, config.patch_size, "fp32", "jpeg", quality)
    lists = {LEARNING: ImageList(files[LEARNING]), HELD_OUT: ImageList(files[HELD_OUT])}
    return MiddleImages(info, lists, {LEARNING: source, HELD_OUT: source})


def _settle_precision(config: BenchStoreConfig, images: MiddleImages, teacher: Teacher) -> dict[str, float]:
    """Set the teacher's precision; returns the cosine of each precision's tokens to fp32's, by its name."""
    with Progress("compare precisions", minor=True):
        pixels = first_pixels(images, config.batch_size).to(teacher.mean.device)
        cosines = precision_cosines(teacher, pixels) if len(pixels) else {}
    automatic = config.precision == "auto"
    teacher.precision = fastest(cosines, teacher.mean.device) if automatic else config.precision
    return {name: round(cosine, 6) for name, cosine in cosines.items()}


def _learn_codecs(
    config: BenchStoreConfig, names: list[str], images: MiddleImages, teacher: Teacher, loading: LoaderOptions
) -> list[Codec]:
    """All codecs. Those that learn do so from the same sample of the images."""
    tokens = means = torch.empty(0)
    if any(learns(name) for name in names):
        count = _codec_images(config, images)
        with Progress("learn", "images", total=_images_learned_from(config, images)) as progress:
            sample = sample_tokens(images, teacher, loading, count, config.seed, progress)
        tokens, means = sample.tokens, sample.means
    return [
        learn_from(name, tokens, means, config.seed) if learns(name) else load_codec(name, teacher.token_dim, {})
        for name in names
    ]


def _codec_images(config: BenchStoreConfig, images: MiddleImages) -> int:
    return min(config.codec_images, images.info.parts[LEARNING].images)


def _images_learned_from(config: BenchStoreConfig, images: MiddleImages) -> int:
    """Images that `sample_tokens` takes: about as many as `--codec-images` asks for."""
    return sum(len(indices) for _, indices in images.evenly_spaced(_codec_images(config, images), config.batch_size))


def _measure(
    images: MiddleImages,
    codecs: Sequence[Codec],
    qualities: Sequence[int],
    labelled: bool,
    teacher: Teacher,
    loading: LoaderOptions,
) -> Measurement:
    """Run the teacher over the held-out images, and over train/ if it has labels for k-NN."""
    round_trips = [RoundTrip(codec) for codec in codecs]
    train = _run_teacher_over(images, LEARNING, teacher, loading, round_trips) if labelled else None
    held_out = _run_teacher_over(images, HELD_OUT, teacher, loading, round_trips)
    pixel_bytes = {qualities[0]: held_out.pixel_bytes / len(held_out.keys)}
    pixel_bytes |= {quality: _mean_pixel_bytes(images, quality, loading) for quality in qualities[1:]}
    return Measurement(round_trips, train, held_out, pixel_bytes)


def _run_teacher_over(
    images: MiddleImages, part: int, teacher: Teacher, loading: LoaderOptions, round_trips: Sequence[RoundTrip]
) -> TeacherPass:
    """Run the teacher over an image list and pass its tokens through every codec."""
    keys: list[str] = []
    pixel_bytes, grids = 0, torch.empty(0)
    ranges = _ranges(images, part, loading.batch_size)
    with Progress("measure", "images", total=images.info.parts[part].images) as progress:
        for batch in images.load(ranges, min(worker_count(loading.workers), len(ranges))):
            tokens = tokens_on_cpu(teacher, batch)
            if len(tokens):
                for round_trip in round_trips:
                    round_trip.add(tokens, with_distortion=part == HELD_OUT)
                if len(grids) < TIMED_GRIDS:
                    grids = torch.cat([grids.reshape(-1, *tokens.shape[1:]), tokens])[:TIMED_GRIDS]
            keys += batch.decoded_keys
            pixel_bytes += batch.stored_bytes
            progress.advance(len(batch.images))
    if not keys:
        count = images.info.parts[part].images
        raise InputError(f"{images.sources[part].path}: none of {count} images could be decoded")
    return TeacherPass(keys, pixel_bytes, grids)


def _ranges(images: MiddleImages, part: int, batch_size: int) -> list[ImageRange]:
    indices = range(images.info.parts[part].images)
    return [(part, indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]


def _mean_pixel_bytes(images: MiddleImages, quality: int, loading: LoaderOptions) -> float:
    """Mean bytes of a held-out image's JPEG at another quality."""
    recoded = MiddleImages(replace(images.info, jpeg_quality=quality), images.lists, images.sources)
    ranges = _ranges(recoded, HELD_OUT, loading.batch_size)
    batches = recoded.load(ranges, min(worker_count(loading.workers), len(ranges)))
    counted = counted_through(batches, f"JPEG quality {quality}", "batches", len(ranges))
    sizes = [size for batch in counted for size in batch.jpeg_sizes]
    return sum(sizes) / len(sizes)


def _knn(round_trip: RoundTrip, train: TeacherPass | None, val: TeacherPass) -> float | None:
    """Top-1 accuracy, in percent, of classifying the mean decoded features of val/ by those of train/."""
    if train is None:
        return None
    train_classes, val_classes = ([key.split("/")[1] for key in images.keys] for images in (train, val))
    classes = sorted({*train_classes, *val_classes})
    train_labels, val_labels = (
        torch.tensor([classes.index(name) for name in names]) for names in (train_classes, val_classes)
    )
    train_features, val_features = torch.cat(round_trip.features).split([len(train.keys), len(val.keys)])
    top1, _ = knn_accuracy(
        train_features, train_labels, val_features, val_labels, len(classes), KnnConfig.k, KnnConfig.temperature
    )
    return top1


def _row(
    images: MiddleImages, measurement: Measurement, round_trip: RoundTrip, encode: list[float], decode: list[float]
) -> dict[str, Any]:
    """A codec's row of the command's JSON, given the seconds of its encoding and decoding in each round."""
    info, grids = replace(images.info, codec=round_trip.codec.name), measurement.held_out.grids
    pixel_bytes = next(iter(measurement.pixel_bytes.values()))
    knn = _knn(round_trip, measurement.train, measurement.held_out)
    image_bytes = bytes_per_image(info, pixel_bytes)
    return {
        "codec": round_trip.codec.name,
        "bytes_per_image": round(image_bytes),
        "token_bytes_per_image": round(bytes_per_image(info, 0) - RECORD_BYTES),
        "pixel_bytes_per_image": round(pixel_bytes),
        "cosine": round(round_trip.plain.cosine, 6),
        "relative_error": round(round_trip.plain.relative_error, 6),
        "cosine_patch_norm": round(round_trip.normed.cosine, 6),
        "relative_error_patch_norm": round(round_trip.normed.relative_error, 6),
        "knn": None if knn is None else round(knn, 3),
        "imagenet_gb": round(IMAGENET_IMAGES * image_bytes / 1e9, 3),
        **Rate.of(len(grids), encode).to_json("encode_images_per_second"),
        **Rate.of(len(grids) * info.grid**2, encode).to_json("encode_tokens_per_second"),
        **Rate.of(VIEWS * view_size(grids) ** 2, decode).to_json("decode_tokens_per_second"),
    }


def _settings(
    config: BenchStoreConfig, images: MiddleImages, split: Split, measurement: Measurement, teacher: Teacher
) -> dict[str, str]:
    labels = (
        f"of val/; {len(split.learning)} of train/ vote" if split.labelled else f"no labels: {split.why_unlabelled}"
    )
    measured = f"measured on {len(measurement.held_out.keys)} ({labels})"
    grid = f"{teacher.grid} x {teacher.grid} tokens of {counted(teacher.token_dim, 'channel')}"
    return machine() | {
        "torch threads": str(torch.get_num_threads()),
        "device": str(teacher.mean.device),
        "images": f"{config.images}; {measured}; codecs learnt on {_images_learned_from(config, images)} others",
        "sizes": f"middle images of {config.middle_size} px, patches of {config.patch_size}",
        "teacher": f"{config.teacher}, block {teacher.block}, {grid}",
        "precision": teacher.precision,
        "batches": counted(config.batch_size, "image"),
        "rounds": str(config.rounds),
    }


def _publish(
    config: BenchStoreConfig,
    rows: list[dict[str, Any]],
    measured: dict[str, dict[str, Any]],
    measurement: Measurement,
    settings: dict[str, str],
) -> dict[str, Any]:
    """Publish the table and return the command's JSON; `measured` are the parts of it that have no rows."""
    choice, count = recommended(rows), len(measurement.held_out.keys)
    pixel_bytes = {str(quality): round(size) for quality, size in measurement.pixel_bytes.items()}
    notes = [*NOTES, f"Recommended: {choice or 'none of these'} ({RULE}).", _building_note(measured["building"])]
    if measurement.train is not None:
        notes[len(NOTES)] += f" One of the {count} images of val/ is {100 / count:.2f} points of kNN."
    cosines = ", ".join(f"{name} {cosine:.5f}" for name, cosine in measured["precisions"].items())
    notes.append(f"Cosine of the teacher's tokens to fp32's, by its precision: {cosines or 'none on this device'}.")
    Table("Token stores", settings, [_cells(row, pixel_bytes) for row in rows], notes).publish(config.out)
    return {
        "rows": rows,
        "recommended": choice,
        "rule": RULE,
        **measured,
        "pixel_bytes_per_image": pixel_bytes,
        "images": count,
        "settings": settings,
    }


def _building_note(building: dict[str, Any]) -> str:
    teacher, store = (format_rate(building[f"{name}_images_per_second"]) for name in ("teacher", "tokenize"))
    work = f"decoded by {counted(building['workers'], 'worker')}, stored as {building['codec']} and written"
    ratio = f"{building['ratio']:.2f} of the teacher's rate ({counted(building['images'], 'image')} a round)"
    return f"Building: the teacher alone does {teacher} images/s, a whole store ({work}) {store}: {ratio}."


def _cells(row: dict[str, Any], pixel_bytes: dict[str, int]) -> dict[str, str]:
    """A row of the table, given the mean bytes of an image's pixels by JPEG quality."""
    decode = {key: row[f"decode_tokens_per_second{key}"] / 1e6 for key in ("", "_min", "_max")}
    return {
        "codec": row["codec"],
        "tokens kB": f"{row['token_bytes_per_image'] / 1e3:.1f}",
        **{f"pixels q{quality} kB": f"{size / 1e3:.1f}" for quality, size in pixel_bytes.items()},
        "together kB": f"{row['bytes_per_image'] / 1e3:.1f}",
        "ImageNet GB": f"{row['imagenet_gb']:.1f}",
        "cosine": f"{row['cosine']:.4f}",
        "error": f"{row['relative_error']:.4f}",
        "cosine, patch norm": f"{row['cosine_patch_norm']:.4f}",
        "error, patch norm": f"{row['relative_error_patch_norm']:.4f}",
        "kNN %": "-" if row["knn"] is None else f"{row['knn']:.2f}",
        "encode images/s": format_rate(row["encode_images_per_second"]),
        "encode min-max": format_spread(row, "encode_images_per_second"),
        "encode Mtokens/s": f"{row['encode_tokens_per_second'] / 1e6:.2f}",
        "decode Mtokens/s": f"{decode['']:.2f}",
        "decode min-max": f"{decode['_min']:.2f}-{decode['_max']:.2f}",
        "host ms": f"{row['host_ms_per_image']:.2f}",
        "host min-max": f"{row['host_ms_per_image_min']:.2f}-{row['host_ms_per_image_max']:.2f}",
    }
