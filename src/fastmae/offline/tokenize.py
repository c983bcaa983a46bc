"""`fastmae tokenize`: images and a frozen teacher in, a token store out (Sec. 3.2). This file is the sequence:

1. list the images (`listing`) and load the teacher (`teachers`)
2. settle the teacher's precision and the codec, where that is left to the command (`settle`)
3. open the store, new or begun earlier
4. learn the codec's codebooks from a sample, where the codec has some
5. build the shards that are missing (`fill`)
6. finish the store, once no process has shards left to build, with its card
7. copy it to a URL (`share`), if one is given

What the options mean is in `options`, what `--dry-run` measures in `estimate`.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from fastmae.config import TokenizeConfig
from fastmae.config.tokenize import middle_sizes
from fastmae.errors import InputError, InterruptedRunError
from fastmae.images.image_list import ImageList
from fastmae.offline.dataset_card import keep_card
from fastmae.offline.estimate import check_disk, dry_run
from fastmae.offline.fill import build_shards, count_images, stored_codec
from fastmae.offline.inspect import store_summary, summary_over_scales
from fastmae.offline.listing import ListedImages, check_lists, keep_list, listed_images, sources_of
from fastmae.offline.middle_images import LoaderOptions, MiddleImages
from fastmae.offline.options import Share, build_teacher, check_options, describe_store, process_share
from fastmae.offline.quality import as_json, as_lines, look_at
from fastmae.offline.sample import sample_tokens
from fastmae.offline.settle import begun_store, settle
from fastmae.offline.share import check_url, share_store
from fastmae.runtime.device import memory_hint
from fastmae.runtime.durable import holds_anything, write_json
from fastmae.runtime.ownership import owned
from fastmae.runtime.progress import Progress
from fastmae.runtime.wording import counted
from fastmae.teachers import Teacher
from fastmae.teachers.factory import load_network
from fastmae.tokens import TokenStore
from fastmae.tokens.codec import Codec, learns, learnt_shapes, load_codec
from fastmae.tokens.format import (
    CODEBOOKS_COPY,
    CODEBOOKS_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SCALES_FILE,
    STORE_FILE,
    StoreInfo,
    read_store_info,
    shard_path,
)
from fastmae.tokens.index import read_rows
from fastmae.tokens.learn import check_can_learn, learn_from
from fastmae.tokens.manifest import Manifest
from fastmae.tokens.tensor_file import load_tensors
from fastmae.tokens.writer import StoreWriter, begin_folder

log = logging.getLogger(__name__)

SHOWN_SKIPS = 20


def tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Build a token store, or continue or extend one that an earlier call began.

    Several middle sizes make a folder of stores, one for each size. Of several processes, each builds its own shards.

    Returns:
        The command's JSON.

    Raises:
        InputError: options, images, a teacher or a folder that can't be used, or another process that builds the same
            shards.
        InterruptedRunError: Ctrl-C; the same call continues.
        FailedCheckError: a file of the finished store did not arrive at the URL.
    """
    sizes = middle_sizes(config)
    check_options(config)
    share = process_share(config)
    folders = [config.store / str(size) for size in sizes] if len(sizes) > 1 else [config.store]
    # Loaded once for all sizes, and only after the images were listed: a wrong folder is reported at once.
    load = cache(partial(load_network, config.teacher, config.teacher_weights))
    if config.dry_run:
        with listed_images(config.images, config.add, folders[0]) as listed:
            return dry_run(config, sizes, listed, load())
    if config.to is not None:
        check_url(config.to)
    summaries = []
    with owned(config.store, "tokenize", share.name):
        for size, folder in zip(sizes, folders, strict=True):
            with listed_images(config.images, config.add, folder) as listed:
                teacher = build_teacher(config, size, *deepcopy(load()))
                info = describe_store(config, size, teacher, listed.part)
                if len(sizes) > 1:
                    _begin_scales(config.store, sizes)
                    log.info(f"middle size {size}:")
                summaries.append(_build_store(config, info, folder, listed, teacher, share, codebooks_from=folders[0]))
        is_finished = all(summary.get("finished", True) for summary in summaries)
        if is_finished:
            keep_card(config.store, [TokenStore(folder) for folder in folders])
    result = summaries[0] if len(sizes) == 1 else summary_over_scales(summaries)
    if config.to is not None and is_finished:  # else by the process that finishes the store
        result["copied_to"] = share_store(config.store, config.to)
    return result


def _begin_scales(folder: Path, sizes: list[int]) -> None:
    """Begin the folder of a store with several middle sizes, or check that it was begun with the same ones."""
    file = folder / SCALES_FILE
    if file.exists():
        begun = [store.name for store in sorted(folder.iterdir()) if store.is_dir()]
        if set(begun) - {str(size) for size in sizes}:
            raise InputError(
                f"{folder}: was begun with --middle-size {','.join(begun)}; give it again, or another folder"
            )
    elif folder.exists() and (not folder.is_dir() or holds_anything(folder)):
        raise InputError(
            f"{folder}: exists and is not a token store of several sizes; give a folder that is new or empty"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"sizes": sizes})


def _build_store(
    config: TokenizeConfig,
    info: StoreInfo,
    folder: Path,
    listed: ListedImages,
    teacher: Teacher,
    share: Share,
    codebooks_from: Path,
) -> dict[str, Any]:
    """Build the store of one middle size, or this process's share of it; returns the summary of what it built.

    `info` describes the store if it is new. All middle sizes share the precision, the codec and the codebooks of the
    store `codebooks_from`.
    """
    with _resumable(config):
        begun = begun_store(folder, codebooks_from)
        info, learnt = settle(config, info, listed, teacher, begun)
        if begun is None and (begun := begun_store(folder)) is not None:  # another process has begun it meanwhile
            info, _ = settle(config, info, listed, teacher, begun)
    # A call that is refused must leave nothing behind, so a new store is checked before it is begun.
    if not (folder / STORE_FILE).exists():
        check_disk(folder, MiddleImages(info, {0: ImageList(listed.file)}, {0: listed.source}), info.images)
        if folder == codebooks_from:
            check_can_learn(info.codec)
    writer = _open_store(config, info, folder, listed)
    if learnt is not None and learnt.name == info.codec and learns(info.codec):
        writer.keep_codebooks(learnt)

    shards = share.shards(writer.info.shards)
    missing = [shard for shard in writer.missing_shards() if shard in shards]
    _announce(writer.info, teacher, len(shards), share.world_size)
    images_per_second = None
    if missing:
        images = MiddleImages.of_store(folder, writer.info, sources_of(listed, writer.info, missing))
        images_per_second = _build_missing(config, writer, shards, missing, images, teacher, codebooks_from)
    else:
        log.info(f"{folder}: nothing left to do")

    left_to_others = len(writer.missing_shards())
    if left_to_others:
        log.info(
            f"{folder}: this process has done its {counted(len(shards), 'shard')}; others have {left_to_others} left"
        )
        return _summary_of_share(writer, shards, images_per_second)
    if missing or not writer.finished:
        writer.finish()
    return _report_finished(TokenStore(folder), images_per_second, is_first_size=folder == codebooks_from)


def _open_store(config: TokenizeConfig, info: StoreInfo, folder: Path, listed: ListedImages) -> StoreWriter:
    """Begin a store, or open one that an earlier call began with the same options; its lists hold the given images.

    Raises:
        InputError: a folder or a store that does not match the options, or a damaged store.
    """
    begin_folder(folder)
    begun = read_store_info(folder).parts if (folder / STORE_FILE).exists() else ()
    if config.add:
        return _open_to_add(replace(info, parts=begun), folder, listed)
    if len(begun) > 1 and str(listed.source.path) not in {part.source for part in begun}:
        raise InputError(
            f"{folder}: holds other images than {config.images}; give --add to take these in too, or another folder"
        )
    if not begun:
        keep_list(listed.file, folder, 0)
    writer = StoreWriter(folder, replace(info, parts=begun) if len(begun) > 1 else info)
    if len(begun) == 1 and writer.missing_shards():
        # The list may be damaged, or an archive may have been packed anew, with its images in other places.
        keep_list(listed.file, folder, 0)
    check_lists(folder, writer.info)
    return writer


def _open_to_add(info: StoreInfo, folder: Path, listed: ListedImages) -> StoreWriter:
    """Open a store for `--add`, and append the new images as a part unless an interrupted `--add` has done so."""
    writer = StoreWriter(folder, info)
    check_lists(folder, writer.info)
    is_appended = len(info.parts) > 1 and info.parts[-1] == listed.part and bool(writer.missing_shards())
    if is_appended or not listed.info.images:
        return writer
    if writer.missing_shards():
        raise InputError(f"{folder}: the store is not finished; give the same `fastmae tokenize` without --add first")
    if (folder / MANIFEST_FILE).exists():
        # The new manifest will list the checksums of the files as they are then, and so hide any damage.
        Manifest.read(folder / MANIFEST_FILE).check_all(folder)
    keep_list(listed.file, folder, len(info.parts))
    writer.extend(listed.part)
    return writer


def _announce(info: StoreInfo, teacher: Teacher, num_shards: int, world_size: int) -> None:
    block = f", block {teacher.block}" if teacher.network.depth > 1 else ""
    averaged = f" and {teacher.last - 1} before it" if teacher.last > 1 else ""
    share = f"; {num_shards} of its shards here, {world_size} processes" if world_size > 1 else ""
    log.info(
        f"teacher {teacher.spec}{block}{averaged}, norm {teacher.norm}, looks at "
        f"{teacher.input_size} px in {teacher.precision}; {counted(info.images, 'image')} -> {teacher.grid} x "
        f"{teacher.grid} tokens of {teacher.token_dim} ({info.codec}){share}"
    )


def _build_missing(
    config: TokenizeConfig,
    writer: StoreWriter,
    shards: range,
    missing: Sequence[int],
    images: MiddleImages,
    teacher: Teacher,
    codebooks_from: Path,
) -> float:
    """Get the codec ready and build this process's missing shards; returns images per second."""
    options = LoaderOptions(config.batch_size, config.workers, config.strict)
    total, left = count_images(writer.info, shards), count_images(writer.info, missing)
    if left < writer.info.images:  # less than a whole store, which was checked before it was begun
        check_disk(writer.folder, images, left)
    with _resumable(config):
        codec = _prepare_codec(config, writer, images, teacher, options, codebooks_from)
        start = time.monotonic()
        with Progress("tokenize", "images", total=total, done=total - left) as progress:
            build_shards(writer, codec, missing, images, teacher, options, progress)
    return round(left / (time.monotonic() - start), 2)


@contextlib.contextmanager
def _resumable(config: TokenizeConfig) -> Iterator[None]:
    """Say what to do after an interruption, or when the device's memory is full."""
    try:
        with memory_hint(f"give --batch-size {max(1, config.batch_size // 2)}, and the same call continues"):
            yield
    except KeyboardInterrupt as stop:
        raise InterruptedRunError("interrupted; finished shards are kept, and the same call continues") from stop


def _prepare_codec(
    config: TokenizeConfig,
    writer: StoreWriter,
    images: MiddleImages,
    teacher: Teacher,
    options: LoaderOptions,
    codebooks_from: Path,
) -> Codec:
    """The store's codec. Codebooks are learnt once; then every process and every middle size reads the same file.

    Raises:
        InputError: the codebooks of existing shards are gone.
    """
    info, file = writer.info, writer.folder / CODEBOOKS_FILE
    shapes = learnt_shapes(info.codec, info.token_dim)
    if not shapes:
        return stored_codec(writer.folder, info)
    for existing in (writer.folder / CODEBOOKS_COPY, codebooks_from / CODEBOOKS_FILE):
        if not file.exists() and existing.exists():
            writer.keep_codebooks(load_codec(info.codec, info.token_dim, load_tensors(existing, shapes)))
    if file.exists():
        return stored_codec(writer.folder, info)
    if len(writer.missing_shards()) < info.shards:
        raise InputError(
            f"{file}: is gone, and the shards that are there can't be read without; bring it back, or take another "
            "folder"
        )
    num_images = min(config.codec_images, info.parts[min(images.sources)].images)
    total = sum(len(positions) for _, positions in images.evenly_spaced(num_images, options.batch_size))
    with Progress(f"learn {info.codec}", "images", total=total) as progress:
        sample = sample_tokens(images, teacher, options, num_images, config.seed, progress)
    writer.keep_codebooks(learn_from(info.codec, sample.tokens, sample.means, config.seed))
    return stored_codec(writer.folder, info)  # another process may have kept its codebooks first


def _report_finished(store: TokenStore, images_per_second: float | None, is_first_size: bool) -> dict[str, Any]:
    """Say what the store holds, and once for all middle sizes, what looks wrong in it."""
    if store.skipped:
        log.info(_skipped_images(store))
    summary = store_summary(store, images_per_second)
    megabytes, kilobytes = summary["bytes"] / 1e6, summary["bytes_per_image"] / 1e3
    log.info(
        f"{store.folder}: {counted(len(store), 'image')}, {store.skipped} skipped, {megabytes:.1f} MB "
        f"({kilobytes:.1f} kB an image)"
    )
    if is_first_size:
        quality = look_at(store)
        for line in as_lines(quality, store):
            log.warning(line)
        summary["quality"] = as_json(quality, store)
    return summary


def _skipped_images(store: TokenStore) -> str:
    """The first images that were skipped, each with the reason, a line each."""
    rows: list[dict[str, str]] = []
    for batch in read_rows(store.files.path(INDEX_FILE), store.info):  # the index may list millions of images
        if len(rows) < SHOWN_SKIPS:
            rows += batch.filter(pa.compute.less(batch["row"], 0)).slice(0, SHOWN_SKIPS).to_pylist()
    lines = [f"skipped {store.skipped} of {counted(store.info.images, 'file')}:"]
    lines += [f"  {row['path']}: {row['status']}" for row in rows[:SHOWN_SKIPS]]
    if store.skipped > SHOWN_SKIPS:
        more = store.skipped - SHOWN_SKIPS
        lines.append(f"  ... and {more} more; all are in {store.folder / INDEX_FILE}, column status")
    return "\n".join(lines)


def _summary_of_share(writer: StoreWriter, shards: range, images_per_second: float | None) -> dict[str, Any]:
    """The JSON of a process that finishes before the others."""
    images = [image for shard in shards for image in writer.header(shard).images]
    decoded = sum(image.row >= 0 for image in images)
    num_bytes = sum(shard_path(writer.folder, shard).stat().st_size for shard in shards)
    return {
        "images": decoded,
        "skipped": len(images) - decoded,
        "grid": writer.info.grid,
        "token_dim": writer.info.token_dim,
        "codec": writer.info.codec,
        "bytes": num_bytes,
        "bytes_per_image": round(num_bytes / max(1, decoded)),
        "images_per_second": images_per_second,
        "finished": False,
    }
