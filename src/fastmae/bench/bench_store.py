"""`fastmae bench store`: what each codec takes on disk and loses, by one pass of the teacher; and how fast a store is built.

With labels, codecs learn on train/, their loss is val/'s, and train/'s mean decoded features vote on val/'s. Without, every
second image at most is for learning, and the loss is that of the others. Nothing grows with the images but the mean features.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastmae.bench.building import building_rate
from fastmae.bench.codecs import VIEWS, Kept, speeds, view_size
from fastmae.bench.sample import check_fit, check_patches, codec_names, evenly, listed, part_of, store_info
from fastmae.bench.table import Table, check_out, machine
from fastmae.bench.timing import Rate, check_positive, figure
from fastmae.config import BenchStoreConfig
from fastmae.errors import InputError
from fastmae.images.entries import entry_of
from fastmae.images.image_list import ImageList, write_list
from fastmae.images.middle import MiddleImage
from fastmae.images.sources import Source, labelled_split, open_source
from fastmae.offline.estimate import RECORD_BYTES, bytes_per_image
from fastmae.offline.fill import ImageRange, LoaderOptions, MiddleImages, run_teacher, sample_tokens
from fastmae.probes.neighbours import knn_accuracy
from fastmae.runtime.device import own_device
from fastmae.runtime.progress import Progress
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher, load_teacher
from fastmae.tokens.codec import Codec, learns, load_codec
from fastmae.tokens.quantise import learn_from

LEARNT, MEASURED = 0, 1
"""The two lists of images: those that codecs learn on (train/, with labels), and those whose loss is measured (val/)."""
GRIDS = 64
"""Images whose tokens are kept, for timing."""
K, TEMPERATURE = 20, 0.07
IMAGENET = 1_281_167
LEAST_COSINE, MOST_KNN_LOST = 0.95, 0.3
RULE = f"the smallest with a cosine of {LEAST_COSINE} or more and, where there are labels, a kNN at most {MOST_KNN_LOST} points below fp16's"

NOTES = (
    f"kB an image on disk: tokens, pixels as JPEG, and both with what names and checks an image (about {RECORD_BYTES} bytes). "
    f"ImageNet: that times {IMAGENET:,}.",
    "Cosine: of the decoded tokens with the teacher's float32, mean over the tokens. Error: ||x - x'|| / ||x|| over all of them. Both "
    "again after patch norm over the grid, which is what the student is asked to predict.",
    f"Encoding is timed on the CPU over whole grids, as when a shard is written; decoding on the device, in a batch of {VIEWS} views. "
    "Medians over rounds in which all codecs take turns.",
)


@dataclass(frozen=True)
class Split:
    """The images of the two lists, and whether they have labels; why not, if not."""

    entries: tuple[list[bytes], list[bytes]]
    labelled: bool
    why: str


@dataclass(frozen=True)
class Seen:
    """What a pass over a list found: keys of the decoded images, bytes of their pixels, and the first ones' tokens."""

    keys: list[str]
    pixel_bytes: int
    grids: torch.Tensor


@dataclass(frozen=True)
class Measured:
    """All that one pass over the images gave.

    Attributes:
        kept: of each codec.
        train: seen of train/, with labels.
        val: seen of the images whose loss is measured.
        pixel_bytes: of an image, in the mean, by JPEG quality; the first is the one that the teacher saw.
    """

    kept: list[Kept]
    train: Seen | None
    val: Seen
    pixel_bytes: dict[int, float]


def bench_store(config: BenchStoreConfig) -> dict[str, Any]:
    """Measure, print the table, recommend; the command's JSON."""
    check_positive(codec_images=config.codec_images, batch_size=config.batch_size, rounds=config.rounds)
    check_patches(config.patch_size, middle_size=config.middle_size)
    names, qualities = codec_names(config.codecs), _qualities(config.jpeg_qualities)
    check_out(config.out)
    source, loading = open_source(config.images), LoaderOptions(config.batch_size, config.workers)
    with tempfile.TemporaryDirectory(prefix="fastmae-") as aside:
        split = _split(config, source, Path(aside))
        grid = config.middle_size // config.patch_size
        teacher = load_teacher(config.teacher, config.middle_size, grid, config.teacher_weights, config.teacher_block)
        check_fit(names, teacher)
        teacher = teacher.to(own_device(config.device))
        images = _images(config, source, Path(aside), split, teacher, qualities[0])
        codecs = _learn(config, names, images, teacher, loading)
        found = _measure(images, codecs, qualities, split.labelled, teacher, loading)
        seconds = speeds(codecs, found.val.grids, teacher.mean.device, config.rounds)
        built = next((codec for codec in codecs if codec.name == "fp16"), codecs[0])
        info = replace(images.info, codec=built.name)
        building = building_rate(
            Path(aside), info, built, source, split.entries[MEASURED], teacher, loading, config.rounds
        )
    rows = [_row(images, found, kept, *timed) for kept, timed in zip(found.kept, seconds, strict=True)]
    return _published(config, rows, building, found, _settings(config, images, split, found, teacher))


def recommended(rows: Sequence[dict[str, Any]]) -> str | None:
    """The codec that the rule names, if any."""
    knns = {row["codec"]: row["knn"] for row in rows}
    reference = knns.get("fp16", knns.get("fp32"))

    def holds(row: dict[str, Any]) -> bool:
        keeps_knn = row["knn"] is None or reference is None or row["knn"] >= reference - MOST_KNN_LOST
        return keeps_knn and row["cosine"] >= LEAST_COSINE

    return min((row for row in rows if holds(row)), key=lambda row: row["bytes_per_image"], default={"codec": None})[
        "codec"
    ]


def _qualities(given: str) -> list[int]:
    """`--jpeg-qualities`."""
    parts = given.split(",")
    if not all(part.strip().isdigit() and 1 <= int(part) <= 100 for part in parts):
        raise InputError(f"--jpeg-qualities {given}: give numbers from 1 to 100 with commas between them, as 90,75")
    return list(dict.fromkeys(int(part) for part in parts))


def _split(config: BenchStoreConfig, source: Source, aside: Path) -> Split:
    """Which images are for what.

    Raises:
        InputError: fewer than two.
    """
    if config.limit < 0 or config.limit == 1:
        raise InputError(f"--limit {config.limit}: give 2 or more, or 0 for all")
    labelled, why = _labelled(source)
    images: ImageList | list[bytes] = labelled or listed(source, aside)
    chosen = evenly(images, config.limit or len(images))
    if labelled:
        split = [e for e in chosen if e.startswith(b"train/")], [e for e in chosen if e.startswith(b"val/")]
    else:
        learnt = set(evenly(chosen, min(config.codec_images, len(chosen) // 2)))
        split = [e for e in chosen if e in learnt], [e for e in chosen if e not in learnt]
    if not all(split):
        raise InputError(
            f"{config.images}: {len(chosen)} images are too few to learn on some and to measure on others; give more"
        )
    return Split(split, bool(labelled), why)


def _labelled(source: Source) -> tuple[list[bytes], str]:
    """Entries of train/<class>/* and val/<class>/*; none, and why, where there are no labels."""
    if source.kind != "folder":
        return [], "only folders train/<class>/ and val/<class>/ have them"
    try:
        found = [path for split in ("train", "val") for path in labelled_split(source.path, split)[0]]
    except InputError as error:
        return [], str(error)
    return [entry_of(source.path, path.relative_to(source.path).as_posix()) for path in found], ""


def _images(
    config: BenchStoreConfig, source: Source, aside: Path, split: Split, teacher: Teacher, quality: int
) -> MiddleImages:
    """The images as a store's: list `LEARNT`, list `MEASURED`."""
    files = [aside / f"{number}.list" for number in (LEARNT, MEASURED)]
    parts = [part_of(source, write_list(entries, file)) for entries, file in zip(split.entries, files, strict=True)]
    info = store_info(teacher, parts, config.middle_size, config.patch_size, "fp32", "jpeg", quality)
    return MiddleImages(info, dict(enumerate(ImageList(file) for file in files)), {LEARNT: source, MEASURED: source})


def _learn(
    config: BenchStoreConfig, names: list[str], images: MiddleImages, teacher: Teacher, loading: LoaderOptions
) -> list[Codec]:
    """All codecs, from one sample of the images to learn on."""
    tokens = means = torch.empty(0)
    if any(learns(name) for name in names):
        with Progress("learn", "images", total=sum(len(places) for _, places in _sampled(config, images))) as shown:
            tokens, means = sample_tokens(images, teacher, loading, _to_sample(config, images), config.seed, shown)
    return [
        learn_from(n, tokens, means, config.seed) if learns(n) else load_codec(n, teacher.token_dim, {}) for n in names
    ]


def _to_sample(config: BenchStoreConfig, images: MiddleImages) -> int:
    return min(config.codec_images, images.info.parts[LEARNT].images)


def _sampled(config: BenchStoreConfig, images: MiddleImages) -> list[ImageRange]:
    """Where codecs learn, as `sample_tokens` chooses."""
    return images.evenly_spaced(_to_sample(config, images), config.batch_size)


def _measure(
    images: MiddleImages,
    codecs: Sequence[Codec],
    qualities: Sequence[int],
    labelled: bool,
    teacher: Teacher,
    loading: LoaderOptions,
) -> Measured:
    """One pass of the teacher over train/, if its labels are there to vote, and over what is measured."""
    kept = [Kept(codec) for codec in codecs]
    train = _pass(images, LEARNT, teacher, loading, kept) if labelled else None
    val = _pass(images, MEASURED, teacher, loading, kept)
    pixel_bytes = {qualities[0]: val.pixel_bytes / len(val.keys)}
    pixel_bytes |= {quality: _pixel_bytes(images, quality, loading) for quality in qualities[1:]}
    return Measured(kept, train, val, pixel_bytes)


def _pass(images: MiddleImages, part: int, teacher: Teacher, loading: LoaderOptions, kept: Sequence[Kept]) -> Seen:
    """Run the teacher over a list and let every codec take its tokens in."""
    keys: list[str] = []
    pixel_bytes, grids = 0, torch.empty(0)
    batches = _batches(images, part, loading.batch_size)
    with Progress("measure", "images", total=images.info.parts[part].images) as progress:
        for batch in images.load(batches, min(worker_count(loading.workers), len(batches))):
            found = run_teacher(teacher, batch, images, loading).to_host()
            if len(found.tokens):
                for codec in kept:
                    codec.add(found.tokens, part == MEASURED)
                if len(grids) < GRIDS:
                    grids = torch.cat([grids.reshape(-1, *found.tokens.shape[1:]), found.tokens])[:GRIDS]
            keys += [key for key, image in batch if isinstance(image, MiddleImage)]
            pixel_bytes += sum(pixels.numel() for pixels in found.pixels)
            progress.advance(len(batch))
    if not keys:
        raise InputError(
            f"{images.sources[part].path}: none of {images.info.parts[part].images} images could be decoded"
        )
    return Seen(keys, pixel_bytes, grids)


def _batches(images: MiddleImages, part: int, batch_size: int) -> list[ImageRange]:
    places = range(images.info.parts[part].images)
    return [(part, places[start : start + batch_size]) for start in range(0, len(places), batch_size)]


def _pixel_bytes(images: MiddleImages, quality: int, loading: LoaderOptions) -> float:
    """Of a measured image's JPEG at another quality, in the mean."""
    others = MiddleImages(replace(images.info, jpeg_quality=quality), images.lists, images.sources)
    batches = _batches(others, MEASURED, loading.batch_size)
    sizes = [
        image.jpeg.numel()
        for batch in others.load(batches, min(worker_count(loading.workers), len(batches)))
        for _, image in batch
        if isinstance(image, MiddleImage) and image.jpeg is not None
    ]
    return sum(sizes) / len(sizes)


def _knn(kept: Kept, train: Seen | None, val: Seen) -> float | None:
    """Top-1 of val/'s mean decoded features by train/'s votes, in percent."""
    if train is None:
        return None
    names = [[key.split("/")[1] for key in seen.keys] for seen in (train, val)]
    classes = sorted({*names[0], *names[1]})
    labels = [torch.tensor([classes.index(name) for name in split]) for split in names]
    features = torch.cat(kept.features)
    votes = features[: len(train.keys)], labels[0], features[len(train.keys) :], labels[1]
    return knn_accuracy(*votes, len(classes), K, TEMPERATURE)[0]


def _row(images: MiddleImages, found: Measured, kept: Kept, encode: list[float], decode: list[float]) -> dict[str, Any]:
    info, grids = replace(images.info, codec=kept.codec.name), found.val.grids
    pixel_bytes, knn = next(iter(found.pixel_bytes.values())), _knn(kept, found.train, found.val)
    size = bytes_per_image(info, pixel_bytes)
    return {
        "codec": kept.codec.name,
        "bytes_per_image": round(size),
        "token_bytes_per_image": round(bytes_per_image(info, 0) - RECORD_BYTES),
        "pixel_bytes_per_image": round(pixel_bytes),
        "cosine": round(kept.plain.cosine, 6),
        "relative_error": round(kept.plain.relative_error, 6),
        "cosine_patch_norm": round(kept.normed.cosine, 6),
        "relative_error_patch_norm": round(kept.normed.relative_error, 6),
        "knn": None if knn is None else round(knn, 3),
        "imagenet_gb": round(IMAGENET * size / 1e9, 3),
        **Rate.of(len(grids), encode).to_json("encode_images_per_second"),
        **Rate.of(len(grids) * info.grid**2, encode).to_json("encode_tokens_per_second"),
        **Rate.of(VIEWS * view_size(grids) ** 2, decode).to_json("decode_tokens_per_second"),
    }


def _settings(
    config: BenchStoreConfig, images: MiddleImages, split: Split, found: Measured, teacher: Teacher
) -> dict[str, str]:
    learnt = sum(len(places) for _, places in _sampled(config, images))
    on = f"of val/; {len(split.entries[LEARNT])} of train/ vote" if split.labelled else f"no labels: {split.why}"
    return machine() | {
        "torch threads": str(torch.get_num_threads()),
        "device": str(teacher.mean.device),
        "images": f"{config.images}; measured on {len(found.val.keys)} ({on}); codecs learnt on {learnt} others",
        "sizes": f"middle images of {config.middle_size} px, patches of {config.patch_size}",
        "teacher": f"{config.teacher}, block {teacher.block}, {teacher.grid} x {teacher.grid} tokens of {teacher.token_dim}",
        "batches": f"{config.batch_size} images",
        "rounds": str(config.rounds),
    }


def _published(
    config: BenchStoreConfig,
    rows: list[dict[str, Any]],
    building: dict[str, Any],
    found: Measured,
    settings: dict[str, str],
) -> dict[str, Any]:
    """Print the table, or write it too; the command's JSON."""
    pixel_bytes = {str(quality): round(size) for quality, size in found.pixel_bytes.items()}
    result: dict[str, Any] = {
        "rows": rows,
        "recommended": recommended(rows),
        "rule": RULE,
        "building": building,
        "pixel_bytes_per_image": pixel_bytes,
        "images": len(found.val.keys),
        "settings": settings,
    }
    notes = (*NOTES, *_said(result, None if found.train is None else len(found.val.keys)))
    Table("Token stores", settings, [_shown(row, pixel_bytes) for row in rows], notes).publish(config.out)
    return result


def _said(result: dict[str, Any], val: int | None) -> list[str]:
    """Recommendation and building rate, in words."""
    built = result["building"]
    image = "" if val is None else f" One of the {val} images of val/ is {100 / val:.2f} points of kNN."
    return [
        f"Recommended: {result['recommended'] or 'none of these'} ({RULE}).{image}",
        f"Building: the teacher alone {figure(built['teacher_images_per_second'])} images/s, the store (decoding by {built['workers']} "
        f"workers, {built['codec']}, written) {figure(built['tokenize_images_per_second'])}: {built['ratio']:.2f} of it "
        f"({built['images']} images a round).",
    ]


def _shown(row: dict[str, Any], pixel_bytes: dict[str, int]) -> dict[str, str]:
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
        "encode images/s": figure(row["encode_images_per_second"]),
        "min-max": f"{figure(row['encode_images_per_second_min'])}-{figure(row['encode_images_per_second_max'])}",
        "encode Mtokens/s": f"{row['encode_tokens_per_second'] / 1e6:.2f}",
        "decode Mtokens/s": f"{row['decode_tokens_per_second'] / 1e6:.2f}",
        "its min-max": f"{row['decode_tokens_per_second_min'] / 1e6:.2f}-{row['decode_tokens_per_second_max'] / 1e6:.2f}",
    }
