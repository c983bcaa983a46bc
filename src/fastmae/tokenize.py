"""`fastmae tokenize`: the offline stage (Sec. 3.2.4, Fig. 3a).

Image files -> middle images (in worker processes) -> teacher (here) -> shards (written by a thread). The three overlap.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastmae.config import TokenizeConfig
from fastmae.device import memory_hint, own_device
from fastmae.durable import holds_anything, write_json
from fastmae.errors import InputError, InterruptedRunError
from fastmae.images.decode import UndecodableError
from fastmae.images.middle import MiddleImage, make_middle_image
from fastmae.images.sources import list_digest, list_images
from fastmae.inspect import store_summary, summary_over_scales
from fastmae.loading import guarded, heed_only_the_parent, worker_count
from fastmae.processes import this_process
from fastmae.progress import Progress
from fastmae.teachers import Teacher
from fastmae.teachers.factory import load_network
from fastmae.tokens import TokenStore
from fastmae.tokens.format import SCALES_FILE, ImageRecord, StoreInfo, shard_path
from fastmae.tokens.writer import StoreWriter

SHOWN_SKIPS = 20


def tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Build a store, a process's part of one, or continue either; the command's JSON."""
    sizes = middle_sizes(config)
    _check(config)
    rank, world_size = _share(config)
    paths = list_images(config.images)
    network = load_network(config.teacher, config.teacher_weights)
    if len(sizes) == 1:
        return _tokenize(config, sizes[0], config.store, paths, network, rank, world_size)
    _begin_scales(config.store, sizes)
    summaries = []
    for size in sizes:
        print(f"middle size {size}:")
        summaries.append(_tokenize(config, size, config.store / str(size), paths, deepcopy(network), rank, world_size))
    return summary_over_scales(summaries)


def _tokenize(
    config: TokenizeConfig,
    size: int,
    folder: Path,
    paths: list[str],
    network: tuple[nn.Module, str | None],
    rank: int,
    world_size: int,
) -> dict[str, Any]:
    """The store of one middle size."""
    model, weights_file = network
    teacher = Teacher(
        config.teacher, model, size, size // config.patch_size,
        config.teacher_block, config.teacher_norm, config.teacher_size, config.teacher_last, weights_file,
        teacher_channels(config),
    ).to(own_device(config.device))  # fmt: skip
    writer = StoreWriter(folder, _store_info(config, size, paths, teacher))
    share = range(rank, writer.info.shards, world_size)
    _announce(config, teacher, len(paths), share, world_size)
    missing = [shard for shard in writer.missing_shards() if shard in share]
    wanted, left = (sum(len(writer.info.shard_images(shard)) for shard in shards) for shards in (share, missing))
    begun = time.monotonic()
    try:
        smaller = memory_hint(f"give --batch-size {max(1, config.batch_size // 2)}, and the same call continues")
        with smaller, Progress("tokenize", "images", total=wanted, done=wanted - left) as progress:
            _fill(writer, missing, paths, teacher, config, progress)
    except KeyboardInterrupt as stop:
        raise InterruptedRunError("interrupted; finished shards are kept, and the same call continues") from stop
    rate = round(left / (time.monotonic() - begun), 2)
    others = writer.missing_shards()
    if others:
        print(f"{folder}: this process's {len(share)} shards are done; {len(others)} of others are still to come")
        return _summary_of_share(writer, share, rate)
    if missing or not writer.finished:
        writer.finish()
    store = TokenStore(folder)
    _name_skipped(store)
    summary = store_summary(store, images_per_second=rate)
    megabytes, kilobytes = summary["bytes"] / 1e6, summary["bytes_per_image"] / 1e3
    print(f"{folder}: {len(store)} images, {store.skipped} skipped, {megabytes:.1f} MB ({kilobytes:.1f} kB an image)")
    return summary


def middle_sizes(config: TokenizeConfig) -> list[int]:
    """`--middle-size`, smallest first.

    Raises:
        InputError: no whole numbers, or not made of whole patches.
    """
    given = str(config.middle_size)
    try:
        sizes = sorted({int(size) for size in given.split(",")})
    except ValueError as error:
        raise InputError(f"--middle-size {given}: give a number of pixels, or several with commas between them, as 256,352,448") from error
    patch = config.patch_size
    for size in sizes:
        if patch < 1 or size < patch or size % patch:
            near = max(1, round(size / max(1, patch))) * max(1, patch)
            raise InputError(f"--middle-size {size}: not a multiple of --patch-size {patch}; take {near}")
    return sizes


def teacher_channels(config: TokenizeConfig) -> tuple[int, ...]:
    """`--teacher-channels`: which channel the teacher takes as red, green and blue.

    Raises:
        InputError: not three of the channels, or none named for images that are neither RGB nor grey.
    """
    if not config.teacher_channels:
        if config.channels not in (1, 3):
            raise InputError(
                f"--channels {config.channels}: say which of them the teacher sees as red, green and blue: --teacher-channels 0,1,2"
            )
        return (0, 1, 2) if config.channels == 3 else (0, 0, 0)
    try:
        chosen = tuple(int(channel) for channel in config.teacher_channels.split(","))
    except ValueError:
        chosen = ()
    if len(chosen) != 3 or not all(0 <= channel < config.channels for channel in chosen):
        raise InputError(f"--teacher-channels {config.teacher_channels}: give three numbers from 0 to {config.channels - 1}, as 0,1,2")
    return chosen


def _begin_scales(folder: Path, sizes: list[int]) -> None:
    file = folder / SCALES_FILE
    if file.exists():
        begun = [store.name for store in sorted(folder.iterdir()) if store.is_dir()]
        if set(begun) - {str(size) for size in sizes}:
            raise InputError(f"{folder}: was begun with --middle-size {','.join(begun)}; give it again, or another folder")
    elif folder.exists() and (not folder.is_dir() or holds_anything(folder)) and not file.exists():
        raise InputError(f"{folder}: exists and is not a token store of several sizes; give a folder that is new or empty")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"sizes": sizes})


@dataclass(frozen=True)
class _Skipped:
    """An image that could not be decoded, and why."""

    reason: str


class _MiddleImages(Dataset):
    """Place in the list -> its middle image, or why there is none; read in worker processes."""

    def __init__(self, folder: Path, paths: list[str], size: int, resize: str, jpeg_quality: int | None, channels: int):
        self.folder, self.paths = folder, paths
        self.size, self.resize, self.jpeg_quality, self.channels = size, resize, jpeg_quality, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> MiddleImage | _Skipped:
        path = self.folder / self.paths[place]
        try:
            return make_middle_image(path, self.size, self.resize, self.jpeg_quality, self.channels)
        except UndecodableError as error:
            return _Skipped(str(error))
        except PermissionError as error:
            return _Skipped(f"can't be read: {error.strerror}")
        except FileNotFoundError:
            if path.is_symlink():
                return _Skipped("a link to a file that is not there")
            raise
        # Any other OSError (a failing disk, a lost mount) stops the command: it says nothing about the image.


def _fill(
    writer: StoreWriter,
    missing: list[int],
    paths: list[str],
    teacher: Teacher,
    config: TokenizeConfig,
    progress: Progress,
) -> None:
    """Make the missing shards. Batches never cross a shard, so a shard's bytes don't depend on where a call began."""
    quality = config.jpeg_quality if config.pixels == "jpeg" else None
    images = _MiddleImages(config.images, paths, writer.info.middle_size, config.resize, quality, config.channels)
    batches = [
        (shard, list(places[start : start + config.batch_size]))
        for shard in missing
        for places in [writer.info.shard_images(shard)]
        for start in range(0, len(places), config.batch_size)
    ]
    workers = min(worker_count(config.workers), len(batches))
    loader = DataLoader(
        images, batch_sampler=[places for _, places in batches], num_workers=workers, collate_fn=list,
        prefetch_factor=2 if workers else None, worker_init_fn=heed_only_the_parent,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as disk:
        writing: Future[None] | None = None
        shard_parts: list[_Part] = []
        for (shard, places), loaded in zip(batches, guarded(loader), strict=True):
            shard_parts.append(_run_teacher(teacher, [paths[place] for place in places], loaded, config))
            progress.advance(len(places))
            if places[-1] == writer.info.shard_images(shard)[-1]:
                if writing is not None:
                    writing.result()
                writing = disk.submit(_write, writer, shard, shard_parts)
                shard_parts = []
        if writing is not None:
            writing.result()


@dataclass(frozen=True)
class _Part:
    """A batch after the teacher: tokens float32 [n, grid, grid, C] (and the mirrored images') and stored pixels of the n decoded;
    sums and sums of squares float64 [2, K] of their pixels; records of all."""

    tokens: torch.Tensor
    flipped_tokens: torch.Tensor | None
    pixels: list[torch.Tensor]
    pixel_sums: torch.Tensor
    records: list[tuple[str, MiddleImage | _Skipped]]


def _run_teacher(teacher: Teacher, paths: list[str], loaded: list[MiddleImage | _Skipped], config: TokenizeConfig) -> _Part:
    for path, image in zip(paths, loaded, strict=True):
        if config.strict and isinstance(image, _Skipped):
            raise InputError(f"{config.images / path}: {image.reason}; repair or remove it, or leave out --strict to skip it")
    decoded = [image for image in loaded if isinstance(image, MiddleImage)]
    empty = torch.zeros(0, teacher.grid, teacher.grid, teacher.token_dim)
    tokens, flipped = empty, empty if config.flips == "stored" else None
    sums = torch.zeros(2, config.channels, dtype=torch.float64)
    if decoded:
        device = teacher.mean.device
        pixels = torch.stack([image.pixels for image in decoded])
        values = pixels.transpose(0, 1).flatten(1).double() / 255
        sums = torch.stack([values.sum(1), values.square().sum(1)])
        if device.type == "cuda":
            pixels = pixels.pin_memory()
        pixels = pixels.to(device, non_blocking=True)
        tokens = teacher(pixels).cpu()
        if flipped is not None:
            flipped = teacher(pixels.flip(-1)).cpu()
    kept = [image.pixels if image.jpeg is None else image.jpeg for image in decoded]
    return _Part(tokens, flipped, kept, sums, list(zip(paths, loaded, strict=True)))


def _write(writer: StoreWriter, shard: int, parts: list[_Part]) -> None:
    records: list[ImageRecord] = []
    row = 0
    for path, image in (record for part in parts for record in part.records):
        if isinstance(image, _Skipped):
            records.append(ImageRecord(path, -1, 0, 0, image.reason))
        else:
            records.append(ImageRecord(path, row, image.width, image.height, "ok"))
            row += 1
    flipped = [part.flipped_tokens for part in parts if part.flipped_tokens is not None]
    writer.write_shard(
        shard,
        torch.cat([part.tokens for part in parts]),
        [pixels for part in parts for pixels in part.pixels],
        torch.stack([part.pixel_sums for part in parts]).sum(0),
        records,
        torch.cat(flipped) if flipped else None,
    )


def _check(config: TokenizeConfig) -> None:
    if config.channels < 1:
        raise InputError(f"--channels {config.channels}: give 1 or more")
    teacher_channels(config)
    if config.pixels == "jpeg" and config.channels not in (1, 3):
        raise InputError(f"--channels {config.channels}: a JPEG holds 1 or 3; take --pixels raw")
    if not 1 <= config.jpeg_quality <= 100:
        raise InputError(f"--jpeg-quality {config.jpeg_quality}: give 1 to 100")
    for name in ("shard_size", "batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: give 1 or more")
    if config.store.resolve().is_relative_to(config.images.resolve()):
        raise InputError(f"{config.store}: lies inside the images' folder; take a place outside {config.images}")


def _store_info(config: TokenizeConfig, size: int, paths: list[str], teacher: Teacher) -> StoreInfo:
    return StoreInfo(
        teacher=teacher.describe(),
        token_dim=teacher.token_dim,
        middle_size=size,
        patch_size=config.patch_size,
        channels=config.channels,
        resize=config.resize,
        codec=config.codec,
        flips=config.flips,
        pixels=config.pixels,
        jpeg_quality=config.jpeg_quality if config.pixels == "jpeg" else 0,
        shard_size=config.shard_size,
        images=len(paths),
        images_sha256=list_digest(paths),
        source=str(config.images.absolute()),
    )


def _share(config: TokenizeConfig) -> tuple[int, int]:
    """(rank, world size), from the flags, or as torchrun or srun has started this process."""
    rank, world_size = config.rank, config.world_size
    if rank is None and world_size is None:
        rank, world_size = this_process().rank, this_process().world_size
    if rank is None or world_size is None:
        raise InputError("--rank and --world-size go together; give both or neither")
    if not 0 <= rank < world_size:
        raise InputError(f"--rank {rank}: give 0 to {world_size - 1} for --world-size {world_size}")
    return rank, world_size


def _announce(config: TokenizeConfig, teacher: Teacher, images: int, share: range, world_size: int) -> None:
    averaged = f" and {teacher.last - 1} before it" if teacher.last > 1 else ""
    part = f"; {len(share)} of its shards here, {world_size} processes" if world_size > 1 else ""
    print(
        f"teacher {teacher.spec}, block {teacher.block}{averaged}, norm {teacher.norm}, looks at {teacher.input_size} px; "
        f"{images} images -> {teacher.grid} x {teacher.grid} tokens of {teacher.token_dim} ({config.codec}){part}"
    )


def _name_skipped(store: TokenStore) -> None:
    if not store.skipped:
        return
    rows = [row for row in store.table().select(["path", "status"]).to_pylist() if row["status"] != "ok"]
    print(f"skipped {len(rows)} of {store.info.images} files:")
    for row in rows[:SHOWN_SKIPS]:
        print(f"  {row['path']}: {row['status']}")
    if len(rows) > SHOWN_SKIPS:
        print(f"  ... and {len(rows) - SHOWN_SKIPS} more; all are in {store.folder / 'index.parquet'}, column status")


def _summary_of_share(writer: StoreWriter, share: range, images_per_second: float) -> dict[str, Any]:
    """The JSON of a process that finished before the others."""
    records = [image for shard in share for image in writer.header(shard).images]
    decoded = sum(image.row >= 0 for image in records)
    size = sum(shard_path(writer.folder, shard).stat().st_size for shard in share)
    return {
        "images": decoded,
        "skipped": len(records) - decoded,
        "grid": writer.info.grid,
        "token_dim": writer.info.token_dim,
        "bytes": size,
        "bytes_per_image": round(size / max(1, decoded)),
        "images_per_second": images_per_second,
        "finished": False,
    }
