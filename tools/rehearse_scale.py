"""Rehearse a store of millions of images on one machine: what its parts take in time and memory.

    python tools/rehearse_scale.py --images 1300000 --folder /tmp/rehearsal

The store is synthetic. Its images are tiny (8 x 8 px, 2 x 2 tokens of 4 channels), so a million of them take 0.5 GB.
What is measured depends on the number of images and of shards alone: listing, the index, opening, an epoch's shuffle,
`inspect`, `verify`, and the memory of the processes of a training run. The package's own writer writes the store, and
the commands run as a user runs them. Needs Linux.

A process's own memory is what it has written and shares with no other process (Private_Dirty of smaps_rollup). A run on
a store of `BASELINE_IMAGES` images shows how much of it has nothing to do with the number of images.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastmae.images.image_list import ListInfo, write_list
from fastmae.images.tar_shards import TarSource
from fastmae.tokens import TokenStore
from fastmae.tokens.codec import load_codec
from fastmae.tokens.encoded import EncodedImages
from fastmae.tokens.format import INDEX_FILE, MANIFEST_FILE, Part, StoreInfo, list_name
from fastmae.tokens.shard_header import ImageRecord
from fastmae.tokens.writer import StoredPixels, StoreWriter, begin_folder
from fastmae.training.sampler import ShuffleOrder

MIDDLE_SIZE, PATCH_SIZE, CHANNELS, TOKEN_DIM = 8, 4, 3, 4
IMAGES_PER_FOLDER = 1300
"""Images that share a folder, about as in ImageNet."""
BASELINE_IMAGES = 1024
TEACHER = {
    "spec": "synthetic",
    "kind": "vit",
    "block": 0,
    "last": 1,
    "norm": "none",
    "input_size": MIDDLE_SIZE,
    "channels": [0, 1, 2],
    "weights_sha256": "0" * 64,
    "weights_file": None,
}
TAR_MEMBERS = 100_000
"""Most members of the tar that is listed. Each takes 1 kB."""
STUDENT = {
    "encoder": "vit_tiny_patch16_224",
    "encoder-depth": 1,
    "encoder-width": 32,
    "encoder-heads": 1,
    "image-size": MIDDLE_SIZE,
    "decoder-width": 32,
    "decoder-heads": 1,
    "warmup-epochs": 0,
    "device": "cpu",
}
"""Options of a student whose steps cost little, so that the loading shows."""
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part: what was measured.
        seconds: wall time.
        cpu_seconds: CPU time, child processes included.
        main_mb: megabytes of the main process's own memory: what it grew by, or for a command its maximum.
        worker_mb: maximum for the largest loading process; None where there is none.
    """

    part: str
    seconds: float
    cpu_seconds: float
    main_mb: float | None = None
    worker_mb: float | None = None


def timed(part: str, action: Callable[[], object]) -> Row:
    """The time that an action takes."""
    start, cpu_start = time.monotonic(), _cpu_seconds()
    action()
    return Row(part, time.monotonic() - start, _cpu_seconds() - cpu_start)


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def keys(images: int) -> Iterator[bytes]:
    """The keys of the images, in their order."""
    for image in range(images):
        folder = f"n{image // IMAGES_PER_FOLDER:08d}"
        yield f"{folder}/{folder}_{image:010d}.JPEG".encode()


def build(folder: Path, images: int, shard_size: int) -> list[Row]:
    """Build a synthetic store; the times of its list, its shards and of finishing it."""
    begin_folder(folder)
    listed: list[ListInfo] = []
    rows = [
        timed(
            "image list, sorted and written",
            lambda: listed.append(write_list(keys(images), folder / list_name(0))),
        )
    ]
    writer = StoreWriter(folder, _description(folder, listed[0], shard_size))
    rows.append(timed(f"{writer.info.shards} shards, written", lambda: _write_shards(writer)))
    rows.append(timed("`finish`: statistics, index, manifest", writer.finish))
    return rows


def _description(folder: Path, listed: ListInfo, shard_size: int) -> StoreInfo:
    return StoreInfo(
        teacher=TEACHER,
        token_dim=TOKEN_DIM,
        middle_size=MIDDLE_SIZE,
        patch_size=PATCH_SIZE,
        channels=CHANNELS,
        resize="whole",
        codec="fp16",
        flips="approximate",
        pixels="raw",
        jpeg_quality=0,
        shard_size=shard_size,
        parts=(Part(listed.images, listed.sha256, str(folder.absolute()), "folder"),),
    )


def _write_shards(writer: StoreWriter) -> None:
    """Fill a store with random tokens and pixels, other ones in each shard."""
    info, codec, names = writer.info, load_codec("fp16", TOKEN_DIM, {}), keys(writer.info.images)
    generator = torch.Generator().manual_seed(0)
    for shard in range(info.shards):
        count = len(info.part_of(shard)[1])
        tokens = torch.randn(count, info.grid, info.grid, TOKEN_DIM, generator=generator)
        pixels = torch.randint(
            0, 256, (count, CHANNELS, MIDDLE_SIZE, MIDDLE_SIZE), dtype=torch.uint8, generator=generator
        )
        values = pixels.transpose(0, 1).flatten(1).double() / 255
        sums = torch.stack([values.sum(1), values.square().sum(1)])
        records = [ImageRecord(next(names).decode(), row, 500, 375, "ok") for row in range(count)]
        encoded = EncodedImages.of(codec, tokens)
        writer.write_shard(shard, [encoded], StoredPixels([pixels], None), sums, records)


def list_tar(folder: Path, members: int) -> Row:
    """The time of listing a tar of so many images, of one byte each."""
    tar = folder / "members.tar"
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for key in keys(members):
            member = tarfile.TarInfo(key.decode())
            member.size = 1
            file.addfile(member, io.BytesIO(b"x"))
    row = timed(f"{members} members of a tar, listed", lambda: list(TarSource(tar).entries()))
    tar.unlink()
    return row


def opening(folder: Path) -> Row:
    """Time and memory of opening a store. Call it in a fresh process."""
    stores: list[TokenStore] = []
    return _with_memory("opening", lambda: stores.append(TokenStore(folder)))


def shuffling(folder: Path, window: int) -> Row:
    """Time and memory of an epoch's order. Call it in a fresh process."""
    order = ShuffleOrder(TokenStore(folder).shard_sizes, 0, window)
    name = f"an epoch's shuffle, {f'{window} shards at a time' if window else 'of all images'}"
    return _with_memory(name, lambda: order.epoch(0))


def _with_memory(part: str, action: Callable[[], object]) -> Row:
    before = own_megabytes("self")
    row = timed(part, action)
    return Row(part, row.seconds, row.cpu_seconds, own_megabytes("self") - before)


def in_a_fresh_process(measure: Callable[..., Row], *args: Any) -> Row:
    """What a measurement gives in a new interpreter, whose memory nothing else has grown."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def own_megabytes(pid: int | str) -> float:
    """Megabytes that a process has written and shares with no other; 0.0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


def loading_processes(pid: int) -> list[int]:
    """The child processes of a command, without Python's own resource tracker."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text(encoding="ascii").split()]
            found += [c for c in children if b"resource_tracker" not in Path(f"/proc/{c}/cmdline").read_bytes()]
        except OSError:  # the process is gone
            continue
    return found


def command(part: str, *args: str) -> Row:
    """Time and memory of a command.

    Raises:
        SystemExit: the command failed.
    """
    main = worker = 0.0

    def run() -> None:
        nonlocal main, worker
        call = [sys.executable, "-m", "fastmae", *args]
        with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while True:
                try:
                    errors = process.communicate(timeout=POLL_SECONDS)[1]
                    break
                except subprocess.TimeoutExpired:
                    main = max(main, own_megabytes(process.pid))
                    worker = max([worker, *(own_megabytes(child) for child in loading_processes(process.pid))])
        if process.returncode:
            raise SystemExit(f"{' '.join(call)}: exit code {process.returncode}\n{errors}")

    row = timed(part, run)
    return Row(part, row.seconds, row.cpu_seconds, main, worker or None)


def pretraining(store: Path, images: int, args: argparse.Namespace) -> Row:
    """Time and memory of the first steps of a training run."""
    run = args.folder / "run"
    size = {"epochs": args.steps * args.batch_size / images, "batch-size": args.batch_size, "workers": args.workers}
    options = [f"--{name}={value}" for name, value in {**STUDENT, **size}.items()]
    part = f"`pretrain` on {images} images, {args.steps} steps of {args.batch_size}"
    row = command(part, "pretrain", str(store), str(run), *options)
    shutil.rmtree(run)
    return row


def rehearse(args: argparse.Namespace) -> list[Row]:
    """All measurements, in the order of a store's life."""
    store, baseline = args.folder / "store", args.folder / "baseline"
    build(baseline, BASELINE_IMAGES, args.shard_size)
    rows = build(store, args.images, args.shard_size)
    rows.insert(0, list_tar(args.folder, min(args.images, TAR_MEMBERS)))
    rows.append(in_a_fresh_process(opening, store))
    rows += [in_a_fresh_process(shuffling, store, window) for window in (0, args.window)]
    rows.append(command("`inspect`", "inspect", str(store)))
    rows.append(command("`verify`", "verify", str(store)))
    rows.append(pretraining(baseline, BASELINE_IMAGES, args))
    rows.append(pretraining(store, args.images, args))
    return rows


def table(rows: list[Row]) -> str:
    """The measurements as a Markdown table."""
    head = ["| | s | CPU s | own MB | of a loading process |", "|---|---|---|---|---|"]
    return "\n".join(
        [
            *head,
            *(
                f"| {row.part} | {row.seconds:.2f} | {row.cpu_seconds:.2f} | {_number(row.main_mb)} "
                f"| {_number(row.worker_mb)} |"
                for row in rows
            ),
        ]
    )


def _number(megabytes: float | None) -> str:
    return "" if megabytes is None else f"{megabytes:.0f}"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Rehearse a store of millions of images on one machine.")
    parser.add_argument("--images", type=int, default=1_300_000, help="images of the store")
    parser.add_argument("--shard-size", type=int, default=256, help="images per shard, as in `fastmae tokenize`")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder; 0.5 GB per million images")
    parser.add_argument("--window", type=int, default=64, help="shards per group of the second shuffle")
    parser.add_argument("--steps", type=int, default=300, help="steps of the training run")
    parser.add_argument("--batch-size", type=int, default=1024, help="views per step")
    parser.add_argument("--workers", type=int, default=2, help="loading processes")
    parser.add_argument("--keep", action="store_true", help="leave the store where it is")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)
    if args.folder.exists():
        parser.error(f"{args.folder} exists; give a new folder")
    return args


def main() -> None:
    """Build the store, measure, print the figures, and remove the store."""
    args = parsed()
    args.folder.mkdir(parents=True)
    try:
        rows = rehearse(args)
        names = (list_name(0), INDEX_FILE, MANIFEST_FILE)
        sizes = {name: (args.folder / "store" / name).stat().st_size for name in names}
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "bytes": sizes}))
    else:
        print(table(rows), "", *(f"{name}: {size / 1e6:.2f} MB" for name, size in sizes.items()), sep="\n")


if __name__ == "__main__":
    main()
